"""One pod: its engine, and the shell around it: what `mesh.driver` and `mesh.mirror` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import TYPE_CHECKING, Any, Final

from placement import messages
from placement.cache import Copy
from placement.engine import Engine
from placement.limits import Limits
from placement.messages import (
    Action,
    CopyUnwanted,
    Demote,
    DrainStarted,
    DropHeld,
    EnsureLoaded,
    EstimateSize,
    Event,
    LoadOn,
    Publish,
    SettleVModel,
    StartLoad,
    StartUnload,
    Unpublish,
    Wake,
)
from placement.records import ModelId, ModelRecord, PodId, VModelRecord, copy_key, pod_key, vmodel_key
from placement.simulator.clock import TICKS_PER_MS, Tick, ticks
from placement.simulator.loader import Loader
from placement.simulator.publisher import Publisher
from placement.simulator.requests import Call
from placement.simulator.views import LaggedView, OwnView

if TYPE_CHECKING:
    from placement.simulator.world import World

_REPLACED: Final = 10_000 * TICKS_PER_MS
"""`mesh.pod`: half of drain_timeout_s."""
_LOOK: Final = 50 * TICKS_PER_MS


class SimPod:
    """A pod's process, from its start to its end; `life` counts how often a pod of this name was started."""

    def __init__(self, world: World, number: int, life: int) -> None:
        options = world.options
        self.world = world
        self.number = number
        self.life = life
        self.pod_id: PodId = f"p{number}"
        self.alive = True
        self.serving = False
        """Takes calls."""
        self.cut_off = False
        """From the registry."""
        self.rng = Random(f"{options.seed} {self.pod_id} {life}")
        self.usual_lag = ticks(options.lag_ms * self.rng.uniform(0.2, 2))
        self.lag = self.usual_lag
        self.skew_ms = self.rng.randint(-options.faults.skew_ms, options.faults.skew_ms)
        self.view = (
            OwnView(world.registry)
            if options.own_views
            else LaggedView(world.registry, models_change=bool(options.faults.registrations))
        )
        self.batch = world.registry.last
        self._tick_every = ticks(options.tick_ms)
        limits = Limits(
            options.capacity_bytes,
            host_bytes=options.host_bytes,
            disk_bytes=options.disk_bytes,
            host_mode=options.host_mode,
            load_slots=options.load_slots,
            load_timeout_ms=options.load_timeout_ms,
        )
        self.engine = Engine(
            self.pod_id, f"{self.pod_id}:8033", limits, self.view, world.policy, Random(self.rng.random())
        )
        self.loader: Loader = Loader(self)
        self.publisher: Publisher = Publisher(self)
        self.waiters: dict[ModelId, list[Call]] = {}
        """`mesh.driver.Driver.changed`"""
        self.calls: dict[Call, None] = {}
        """Those that are here."""
        self.run_slots: list[Tick] = [0] * options.run_slots
        """When each is free."""
        self.runs: dict[ModelId, tuple[int, float]] = {}
        """Of each model since the last tick: how many, and how long they took in ms."""
        self.unknown: dict[ModelId, Tick] = {}
        """`mesh.directory`: models the registry did not know, and until when it is not asked again."""
        self._leading: set[Action] = set()
        """What was asked of other pods and is still under way."""

    def __repr__(self) -> str:
        return f"{self.pod_id}#{self.life}"

    @property
    def now_ms(self) -> int:
        """By this pod's clock."""
        return self.world.unix_ms + self.skew_ms

    # Life

    def start(self) -> None:
        """It serves once the registry knows it."""
        self.world.clock.after(self.rng.randint(1, self._tick_every), self._tick)
        self.publisher.put(pod_key(self.pod_id), self.engine.pod_record())
        self.publisher.connect()

    def drain(self) -> None:
        """`mesh.pod.Pod._live`: replacements first, then the lease goes, then requests end, then the process."""
        self.step(DrainStarted())
        self.publisher.put(pod_key(self.pod_id), self.engine.pod_record())
        self._await_replaced(self.world.clock.now + _REPLACED)

    def _await_replaced(self, until: Tick) -> None:
        if not self.alive:
            return
        self.sync()
        if self.engine.is_replaced(self.now_ms) or self.world.clock.now >= until:
            self.serving = False
            self.publisher.close()
        else:
            self.world.clock.after(_LOOK, self._await_replaced, until)

    def _tick(self, _: object) -> None:
        if self.alive:
            self.sync()
            runs, self.runs = self.runs, {}
            self.step(messages.Tick(runs))
            self.publisher.put(pod_key(self.pod_id), self.engine.pod_record())
            self.world.clock.after(self._tick_every, self._tick)

    # What the watch brings

    def sync(self, _: object = None) -> None:
        """See what the watch has brought by now. Called before anything else happens here."""
        batch, seen_by = self.batch.next, self.world.clock.now - self.lag
        while batch is not None and batch.tick <= seen_by and not self.cut_off and self.alive:
            self.batch = batch
            for model_id in self.view.follow(batch):
                self.step(CopyUnwanted(model_id))
            batch = batch.next

    def reread(self) -> None:
        """The watch was compacted."""
        for model_id in self.view.reread(self.world.registry):
            self.step(CopyUnwanted(model_id))

    def fetch(self, key: str) -> bool:
        """`mesh.mirror.Mirror.fetch`: read a model past the watch's lag. Whether the view has it then."""
        record = self.world.registry.get(key)
        if isinstance(record, ModelRecord) and record.revision > self.view.seen:
            changed = self.view.apply(record)
            if changed is not None:
                self.step(CopyUnwanted(changed))
        return record is not None and key.partition("/")[2] in self.view.models

    # The engine

    def step(self, event: Event) -> None:
        if self.world.trace is not None:
            self.world.trace.add(self, event)
        actions = self.engine.step(event, self.now_ms)
        self._carry_out(actions)
        self.world.checks.after(self, event, actions)

    def unpin(self, copy: Copy) -> None:
        actions = self.engine.unpin(copy, self.now_ms)
        if actions and self.alive:
            self._carry_out(actions)
            self.world.checks.after(self, None, actions)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        if self.alive:
            for action in actions:
                if self.world.trace is not None:
                    self.world.trace.add(self, action)
                CARRY_OUT[type(action)](self, action)

    def _wake(self, action: Wake) -> None:
        for call in self.waiters.pop(action.model_id, ()):
            self.world.clock.after(0, self.world.go, call)

    # What concerns other pods

    def _lead(self, action: EnsureLoaded | LoadOn | SettleVModel) -> None:
        """The same is planned at every tick until it shows: carry it out once at a time."""
        if action not in self._leading:
            self._leading.add(action)
            late = ticks(2 * self.world.options.write_ms) if isinstance(action, SettleVModel) else 0
            self.world.clock.after(late, self._led, action)

    def _led(self, action: EnsureLoaded | LoadOn | SettleVModel) -> None:
        if not self.alive:
            return
        match action:
            case EnsureLoaded(model_id):
                self.world.ensure(self, model_id, lambda _: self._leading.discard(action))
            case LoadOn(model_id, pod_id):
                self.world.load_on(self, model_id, pod_id, lambda _: self._leading.discard(action))
            case SettleVModel():
                self._settle(action)

    def _settle(self, action: SettleVModel) -> None:
        """`mesh.vmodels`: a compare-and-set."""
        self._leading.discard(action)
        key = vmodel_key(action.old.vmodel_id)
        known = self.world.registry.get(key)
        if (
            self.alive
            and not self.cut_off
            and isinstance(known, VModelRecord)
            and known.revision == action.old.revision
        ):
            self.world.registry.put(key, action.new)


CARRY_OUT: Final[dict[type[Any], Callable[[SimPod, Any], None]]] = {
    EstimateSize: lambda pod, action: pod.loader.estimate(action),
    StartLoad: lambda pod, action: pod.loader.load(action),
    StartUnload: lambda pod, action: pod.loader.unload(action),
    Demote: lambda pod, action: pod.loader.demote(action),
    DropHeld: lambda pod, action: pod.loader.drop(action),
    Publish: lambda pod, action: pod.publisher.put(copy_key(pod.pod_id, action.copy.model_id), action.copy),
    Unpublish: lambda pod, action: pod.publisher.delete(copy_key(pod.pod_id, action.model_id)),
    Wake: SimPod._wake,
    EnsureLoaded: SimPod._lead,
    LoadOn: SimPod._lead,
    SettleVModel: SimPod._lead,
}
"""What the shell does with an action: a line here for each kind."""
