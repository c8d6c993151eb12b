"""What goes wrong, and when. Each kind is a line in a table; all draws come from the seed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final

from placement.messages import CopyUnwanted
from placement.records import ModelId, ModelRecord, VModelRecord, model_key, vmodel_key
from placement.simulator.clock import Tick, ticks

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod
    from placement.simulator.world import World

_FAILURES_EXPIRE_MS: Final = 61_000


class Chaos:
    """Faults of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.faults = world.options.faults
        self.rng = Random(f"chaos {world.options.seed}")
        self.sizes: dict[tuple[ModelId, int], int] = {}
        """Of models that were registered with other contents than the workload's."""
        self._ended = False
        self._hung = False

    @property
    def heals_in_ms(self) -> float:
        """How long what went wrong may have consequences after `end`."""
        if not self.faults.any:
            return 0
        options, faults = self.world.options, self.faults
        hung = faults.hang_ms if faults.hung_loads else 0
        return _FAILURES_EXPIRE_MS + options.lease_ttl_ms + options.timeout_ms + faults.down_ms + hung + 20_000

    # Of loads and models

    def load(self, load_ms: float) -> tuple[float, bool]:
        """How long a load takes, in ms, and whether it fails then."""
        faults, draw = self.faults, self.rng.random
        if self._ended or not faults.any:
            return load_ms, False
        if draw() < faults.hung_loads:
            return faults.hang_ms, True
        if draw() < faults.slow_loads:
            load_ms *= 10
        return load_ms, draw() < faults.failed_loads

    def leaves(self) -> Tick:
        """After what time a client gives up; 0: it does not."""
        if not self.faults.cancels or self.rng.random() >= self.faults.cancels:
            return 0
        return ticks(self.rng.expovariate(1 / 1_000))

    def keeps(self) -> bool:
        """Whether a copy down succeeds."""
        return self._ended or not self.faults.unkept or self.rng.random() >= self.faults.unkept

    def misjudge(self, model: ModelRecord, size_bytes: int) -> int:
        rng = Random(f"{self.world.options.seed} {model.model_id} {model.created}")
        if not self.faults.misjudged_sizes or rng.random() >= self.faults.misjudged_sizes:
            return size_bytes
        return max(1, round(size_bytes * rng.uniform(0.5, 1.5)))

    # Their times

    def begin(self, _: object) -> None:
        for kind in FAULTS:
            self._again(kind)

    def end(self) -> None:
        """Nothing new goes wrong, and what is cut is mended."""
        self._ended = True
        self.world.transport.cut.clear()
        for pod in self.world.pods.values():
            pod.cut_off = False
            pod.lag = pod.usual_lag

    def _again(self, kind: str) -> None:
        per_minute = getattr(self.faults, kind) * (1 if kind in _OF_THE_MESH else self.world.options.pods)
        if per_minute:
            self.world.clock.after(ticks(self.rng.expovariate(per_minute / 60_000)), self._strike, kind)

    def _strike(self, kind: str) -> None:
        if not self._ended:
            if kind in _OF_THE_MESH:
                _OF_THE_MESH[kind](self)
            else:
                pod = self.world.pods[self.rng.choice(list(self.world.pods))]
                if pod.alive:
                    self.say(pod, kind)
                    _OF_A_POD[kind](self, pod)
            self._again(kind)

    def say(self, pod: SimPod, what: str) -> None:
        if self.world.trace is not None:
            self.world.trace.add(pod, f"FAULT {what}")

    def _for(self, most_ms: float) -> Tick:
        return ticks(self.rng.uniform(0.1, 1) * most_ms)

    # Of pods

    def _crash(self, pod: SimPod) -> None:
        self.world.kill(pod)
        self.world.clock.after(self._for(self.faults.down_ms), self._restart, pod.number)

    def _restart(self, number: int) -> None:
        self.world.start(number)

    def _drain(self, pod: SimPod) -> None:
        if not pod.engine.draining:
            pod.drain()
            self.world.clock.after(self._for(self.world.options.timeout_ms), self._drained, pod)

    def _drained(self, pod: SimPod) -> None:
        if pod.alive:
            self._crash(pod)

    def _lose_lease(self, pod: SimPod) -> None:
        if pod.publisher.session is not None:
            self.world.registry.end(pod.publisher.session)

    def _cut_registry(self, pod: SimPod) -> None:
        pod.cut_off = True
        self.world.clock.after(self._for(self.faults.cut_ms), self._mend_registry, pod)

    def _mend_registry(self, pod: SimPod) -> None:
        pod.cut_off = False

    def _cut_pod(self, pod: SimPod) -> None:
        others = [other.number for other in self.world.pods.values() if other is not pod]
        if others:
            pair = frozenset((pod.number, self.rng.choice(others)))
            self.world.transport.cut.add(pair)
            self.world.clock.after(self._for(self.faults.cut_ms), self.world.transport.cut.discard, pair)

    def _lag(self, pod: SimPod) -> None:
        pod.lag = self._for(self.faults.behind_ms)
        self.world.clock.after(2 * pod.lag, self._catch_up, pod)

    def _catch_up(self, pod: SimPod) -> None:
        pod.lag = pod.usual_lag

    def _compact(self, pod: SimPod) -> None:
        if not pod.cut_off:
            pod.reread()

    # Of the mesh

    def _register(self) -> None:
        """A model is removed, comes back, or is registered anew with other contents."""
        registry, model_id = self.world.registry, self.rng.choice(list(self.world.models))
        if registry.get(model_key(model_id)) is not None:
            registry.put(model_key(model_id), None)
            if self.rng.random() < 0.5:
                return
        number = registry.revision + 1
        registry.put(model_key(model_id), self.world.registration(model_id, number))
        most = self.world.options.capacity_bytes
        large = self.rng.random() < self.faults.oversized
        self.sizes[model_id, number] = self.rng.randint(most + 1, 2 * most) if large else self.rng.randint(1, most // 2)

    def _give_up(self) -> None:
        pod = self.world.pods[self.rng.choice(list(self.world.pods))]
        copies = list(pod.engine.cache.copies)
        if pod.alive and copies:
            pod.step(CopyUnwanted(self.rng.choice(copies)))

    def _alias(self) -> None:
        """`setVModel`: the alias goes over to its new target when that is loaded, or has a share for that, until it is
        promoted or given up; and requests for the alias."""
        registry, rng = self.world.registry, self.rng
        vmodel_id = f"v{rng.randrange(3)}"
        known = registry.get(vmodel_key(vmodel_id))
        others = list(self.world.models)
        if isinstance(known, VModelRecord):
            target = rng.choice([known.active, known.target, rng.choice(others)])
            active = known.active
        else:
            copies = registry.head.copies
            target = active = max(rng.choices(others, k=8), key=lambda model_id: len(copies(model_id)))
        share = 0 if active == target else rng.choice(_SHARES)
        if registry.get(model_key(target)) is not None:
            moved = VModelRecord(
                vmodel_id,
                active,
                target,
                canary=share > 0,
                canary_percent=max(0, share - 1),
                since_ms=self.world.unix_ms,
            )
            registry.put(vmodel_key(vmodel_id), moved)
        for _ in range(_ASKED):
            self.world.clock.after(self._for(10_000), self._ask_alias, vmodel_id)

    def _ask_alias(self, vmodel_id: str) -> None:
        """`mesh.directory.Directory`: the pod that is asked chooses the side."""
        world = self.world
        pod = world.pods[self.rng.choice(list(world.pods))]
        key = self.rng.choice((None, f"user {self.rng.randrange(100)}"))
        if not pod.serving or self._ended:
            return
        pod.sync()
        vmodel = pod.view.vmodels.get(vmodel_id)
        if vmodel is not None:
            model_id = pod.engine.sides.choose(vmodel, key)
            world.checks.sided(pod, vmodel, model_id)
            world.ensure(pod, model_id, lambda _: None)


_SHARES: Final = (0, 0, 1, 11, 91)
"""None, and one more than a canary's percent."""
_ASKED: Final = 8
_OF_A_POD: Final[dict[str, Callable[[Chaos, SimPod], None]]] = {
    "crashes": Chaos._crash,
    "drains": Chaos._drain,
    "lost_leases": Chaos._lose_lease,
    "registry_cuts": Chaos._cut_registry,
    "pod_cuts": Chaos._cut_pod,
    "lags": Chaos._lag,
    "compactions": Chaos._compact,
}
_OF_THE_MESH: Final[dict[str, Callable[[Chaos], None]]] = {
    "registrations": Chaos._register,
    "give_ups": Chaos._give_up,
    "vmodels": Chaos._alias,
}
FAULTS: Final = (*_OF_A_POD, *_OF_THE_MESH)
"""Names in `options.Faults`."""
