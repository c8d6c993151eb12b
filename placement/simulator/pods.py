"""One pod: its engine, and the shell around it: what `mesh.driver`, `mesh.mirror` and `mesh.publisher` do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, Final

from placement import messages
from placement.cache import Copy
from placement.engine import Engine
from placement.limits import Limits
from placement.messages import (
    Action,
    CopyUnwanted,
    DrainStarted,
    EnsureLoaded,
    EstimateSize,
    Event,
    LoadFailed,
    LoadFinished,
    LoadOn,
    Publish,
    SettleVModel,
    SizeEstimated,
    StartLoad,
    StartUnload,
    UnloadFinished,
    Unpublish,
    Wake,
)
from placement.records import (
    CopyRecord,
    ModelId,
    ModelRecord,
    PodId,
    Record,
    VModelRecord,
    copy_key,
    pod_key,
    vmodel_key,
)
from placement.simulator.clock import TICKS_PER_MS, Tick, ticks
from placement.simulator.registry import Session
from placement.simulator.requests import Call
from placement.simulator.views import LaggedView, OwnView

if TYPE_CHECKING:
    from placement.simulator.world import World

START_MS: Final = 1_700_000_000_000
"""The world begins at this Unix time."""
_TICK: Final = 500 * TICKS_PER_MS
_RETRY: Final = 500 * TICKS_PER_MS
_WRITTEN_AT_ONCE: Final = 64
"""`mesh.publisher`"""


@dataclass(eq=False, slots=True)
class Resident:
    """A model in a pod's memory."""

    size_bytes: int
    """True."""
    users: int = 0
    """Requests that run on it."""


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
        self.view = OwnView(world.registry) if options.own_views else LaggedView(world.registry)
        self.batch = world.registry.last
        self.rng = Random(f"{options.seed} {self.pod_id} {life}")
        self.lag = ticks(options.lag_ms * self.rng.uniform(0.2, 2))
        self.cut_off = False
        """From the registry."""
        self.skew_ms = self.rng.randint(-options.faults.skew_ms, options.faults.skew_ms)
        limits = Limits(options.capacity_bytes, load_slots=options.load_slots)
        self.engine = Engine(
            self.pod_id, f"{self.pod_id}:8033", limits, self.view, world.policy, Random(self.rng.random())
        )
        self.memory: dict[ModelId, Resident] = {}
        self.loading: dict[ModelId, ModelRecord] = {}
        self.estimating: dict[ModelId, ModelRecord] = {}
        self.waiters: dict[ModelId, list[Call]] = {}
        """`mesh.driver.Driver.changed`"""
        self.calls: dict[Call, None] = {}
        """Those that are here."""
        self.slots: list[Tick] = [0] * options.run_slots
        """When each is free."""
        self.unknown: dict[ModelId, Tick] = {}
        """`mesh.directory`: models the registry did not know, and until when it is not asked again."""
        self.session: Session | None = None
        self._leading: set[Action] = set()
        """What the leader asked for and is still under way."""
        self._wanted: dict[str, Record] = {}
        self._dirty: dict[str, None] = {}
        self._writing = False

    def __repr__(self) -> str:
        return f"{self.pod_id}#{self.life}"

    @property
    def now_ms(self) -> int:
        """By this pod's clock."""
        return START_MS + self.world.clock.now // TICKS_PER_MS + self.skew_ms

    # Life

    def start(self) -> None:
        """It serves once the registry knows it."""
        self.world.clock.after(self.rng.randint(1, _TICK), self._tick)
        self.put(pod_key(self.pod_id), self.engine.pod_record())
        self._connect()

    def drain(self) -> None:
        """`mesh.pod.Pod._live`: the lease goes first, then requests end, then the process."""
        self.serving = False
        self.step(DrainStarted())
        session, self.session = self.session, None
        if session is not None and not self.cut_off:
            self.world.registry.end(session)

    def _tick(self, _: object) -> None:
        if self.alive:
            self.sync()
            self.step(messages.Tick())
            self.put(pod_key(self.pod_id), self.engine.pod_record())
            self.world.clock.after(_TICK, self._tick)

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
        model_id = key.partition("/")[2]
        if isinstance(record, ModelRecord) and record.revision > self.view.seen:
            changed = self.view.apply(record)
            if changed is not None:
                self.step(CopyUnwanted(changed))
        return model_id in self.view.models and record is not None

    # The engine

    def step(self, event: Event) -> None:
        world = self.world
        if world.trace is not None:
            world.trace.add(self, event)
        actions = self.engine.step(event, self.now_ms)
        self._carry_out(actions)
        world.checks.after(self, event, actions)

    def unpin(self, copy: Copy) -> None:
        actions = self.engine.unpin(copy, self.now_ms)
        if actions and self.alive:
            self._carry_out(actions)
            self.world.checks.after(self, None, actions)

    def wake(self, model_id: ModelId) -> None:
        for call in self.waiters.pop(model_id, ()):
            self.world.clock.after(0, self.world.go, call)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        if self.alive:
            for action in actions:
                if self.world.trace is not None:
                    self.world.trace.add(self, action)
                CARRY_OUT[type(action)](self, action)

    # Loads. Each answer is that of a process: it is nothing to the next one of the same name.

    def _estimate(self, action: EstimateSize) -> None:
        model = action.model
        self.estimating[model.model_id] = model
        self._later(2.0, self._estimated, model)

    def _estimated(self, model: ModelRecord) -> None:
        del self.estimating[model.model_id]
        self.step(SizeEstimated(model.model_id, self.world.estimate_bytes(model)))

    def _load(self, action: StartLoad) -> None:
        model = action.model
        self.loading[model.model_id] = model
        ms, fails = self.world.load(self, model)
        self._later(ms, self._load_failed if fails else self._loaded, model)

    def _loaded(self, model: ModelRecord) -> None:
        del self.loading[model.model_id]
        resident = self.memory[model.model_id] = Resident(self.world.true_bytes(model))
        self.step(LoadFinished(model.model_id, resident.size_bytes))

    def _load_failed(self, model: ModelRecord) -> None:
        del self.loading[model.model_id]
        self.step(LoadFailed(model.model_id, "broken", self.rng.random() < 0.5))

    def _unload(self, action: StartUnload) -> None:
        self._later(1.0, self._unloaded, action.model_id)

    def _unloaded(self, model_id: ModelId) -> None:
        del self.memory[model_id]
        self.step(UnloadFinished(model_id))

    def _later(self, ms: float, call: Callable[[Any], None], argument: Any) -> None:
        self.world.clock.after(ticks(ms), self._if_alive, (call, argument))

    def _if_alive(self, what: tuple[Callable[[Any], None], Any]) -> None:
        if self.alive:
            self.sync()
            what[0](what[1])

    # What the registry is told (`mesh.publisher`)

    def put(self, key: str, record: Record) -> None:
        if self._wanted.get(key) != record:
            self._wanted[key] = record
            self._touch(key)

    def delete(self, key: str) -> None:
        if self._wanted.pop(key, None) is not None:
            self._touch(key)

    def wanted_copy(self, model_id: ModelId) -> CopyRecord | None:
        """What the registry should hold of the copy here."""
        record = self._wanted.get(copy_key(self.pod_id, model_id))
        return record if isinstance(record, CopyRecord) else None

    def _connect(self, _: object = None) -> None:
        if not self.alive or self.engine.draining:
            return
        if self.cut_off:
            self.world.clock.after(_RETRY, self._connect)
            return
        self.session = self.world.registry.open()
        self.world.clock.after(ticks(self.world.options.lease_ttl_ms / 3), self._renew, self.session)
        self._dirty = dict.fromkeys(self._wanted)
        self._write()

    def _renew(self, session: Session) -> None:
        if self.session is not session or not self.alive:
            return
        if session.alive or self.cut_off:
            if not self.cut_off:
                session.renewed = self.world.clock.now
            self.world.clock.after(ticks(self.world.options.lease_ttl_ms / 3), self._renew, session)
        else:
            self.session = None
            self._connect()

    def _touch(self, key: str) -> None:
        self._dirty[key] = None
        if not self._writing:
            self._write()

    def _write(self, _: object = None) -> None:
        self._writing = bool(self._dirty) and self.session is not None and self.alive
        if self._writing:
            keys = list(islice(self._dirty, _WRITTEN_AT_ONCE))
            values = [(key, self._wanted.get(key)) for key in keys]
            for key in keys:
                del self._dirty[key]
            ms = self.rng.expovariate(1 / self.world.options.write_ms)
            self.world.clock.after(ticks(ms), self._written, (self.session, values))

    def _written(self, what: tuple[Session, list[tuple[str, Record | None]]]) -> None:
        session, values = what
        if not self.alive:
            return
        if session.alive and not self.cut_off:
            for key, record in values:
                self.world.registry.put(key, record, session)
            self.serving = not self.engine.draining
            self._write()
        else:
            self._dirty |= dict.fromkeys(key for key, _ in values)
            self.world.clock.after(_RETRY, self._write)

    # The leader's work

    def _lead(self, action: EnsureLoaded | SettleVModel | LoadOn, ms: float, call: Callable[[Any], None]) -> None:
        """The same is planned at every tick until it shows: carry it out once at a time."""
        if action not in self._leading:
            self._leading.add(action)
            self._later(ms, call, action)

    def _ensure(self, action: EnsureLoaded) -> None:
        self.world.ensure(self, action.model_id, lambda _: self._leading.discard(action))

    def _load_on(self, action: LoadOn) -> None:
        self.world.load_on(self, action, lambda _: self._leading.discard(action))

    def _settle(self, action: SettleVModel) -> None:
        """`mesh.vmodels`: a compare-and-set."""
        self._leading.discard(action)
        key = vmodel_key(action.old.vmodel_id)
        known = self.world.registry.get(key)
        if not self.cut_off and isinstance(known, VModelRecord) and known.revision == action.old.revision:
            self.world.registry.put(key, action.new)


CARRY_OUT: Final[dict[type[Any], Callable[[SimPod, Any], None]]] = {
    EstimateSize: SimPod._estimate,
    StartLoad: SimPod._load,
    StartUnload: SimPod._unload,
    Publish: lambda pod, action: pod.put(copy_key(pod.pod_id, action.copy.model_id), action.copy),
    Unpublish: lambda pod, action: pod.delete(copy_key(pod.pod_id, action.model_id)),
    Wake: lambda pod, action: pod.wake(action.model_id),
    EnsureLoaded: lambda pod, action: pod._lead(action, 1.0, pod._ensure),
    LoadOn: lambda pod, action: pod._lead(action, 1.0, pod._load_on),
    SettleVModel: lambda pod, action: pod._lead(action, 5.0, pod._settle),
}
"""What the shell does with an action: a line here for each kind."""
