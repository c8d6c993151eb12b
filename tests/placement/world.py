"""Pods under a registry whose watches lag, with requests that walk as `mesh.router` lets them: every step is checked.

Each operation takes a source of chance, so that hypothesis and plain seeded runs can both drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from random import Random
from typing import Any, Final

from placement.cache import Copy
from placement.holdings import HoldState
from placement.lifecycle import IN_FLIGHT, CopyState
from placement.messages import (
    CopyUnwanted,
    CopyWanted,
    DrainStarted,
    Forward,
    Hop,
    Join,
    LoadFailed,
    LoadHere,
    Refuse,
    Serve,
    SizeEstimated,
    Tick,
    Why,
)
from placement.records import ModelId, PodId, model_key
from tests.placement.pods import START_MS, Pod, Waiter, model_record
from tests.placement.registry import Registry

ATTEMPTS: Final = 6
"""mesh.router.ATTEMPTS"""
MODELS: Final = [f"m{i}" for i in range(7)]

Walk = Generator[Waiter | None, None, None]
"""Yields a waiter to be woken by, or None while the model runs; ends when the request does."""


class Refused(Exception):
    """The request's error (`MeshError`)."""

    def __init__(self, why: Why | None, *, elsewhere: bool = True) -> None:
        super().__init__(why)
        self.elsewhere = elsewhere


class World:
    def __init__(self, pods: int, capacity_bytes: int, *, exact: bool, load_slots: int = 2, **limits: Any) -> None:
        limits |= {"load_slots": load_slots, "load_tries": 2}
        self.pods = {f"p{i}": Pod(capacity_bytes, pod_id=f"p{i}", **limits) for i in range(pods)}
        self.exact = exact
        """Estimates are right: then true bytes must stay within the capacity as well."""
        self.now_ms = START_MS
        self.requests: list[tuple[Walk, Waiter | None]] = []
        self.routes = dict.fromkeys(self.pods, 0)
        self.ended = 0
        self._capacity_bytes = capacity_bytes
        self._unreachable: set[PodId] = set()
        self._registry = Registry()
        self._sizes: dict[tuple[ModelId, int], int] = {}
        for pod in self.pods.values():
            self._registry.write_pod(pod)
        for pod in self.pods.values():
            self._registry.deliver(pod)

    # Operations

    def register(self, rng: Random) -> None:
        self._register(rng, rng.choice(MODELS))

    def remove(self, rng: Random) -> None:
        self._registry.write(model_key(rng.choice(MODELS)), None)

    def register_anew(self, rng: Random) -> None:
        model_id = rng.choice(MODELS)
        self._registry.write(model_key(model_id), None)
        self._register(rng, model_id)

    def give_up(self, rng: Random) -> None:
        self._pod(rng).step(CopyUnwanted(rng.choice(MODELS)))

    def request(self, rng: Random) -> None:
        used_ms = rng.choice([None, None, self.now_ms - 3_600_000, self.now_ms + 3_600_000])
        walk = self._walk(self._pod(rng), rng.choice(MODELS), Hop.CLIENT, used_ms)
        self._go_on(walk)

    def resume(self, rng: Random) -> None:
        """A woken request goes on, or a running one ends."""
        ready = [i for i, (_, waiter) in enumerate(self.requests) if waiter is None or waiter.woken]
        if ready:
            self._go_on(self.requests.pop(rng.choice(ready))[0])

    def cancel(self, rng: Random) -> None:
        if self.requests:
            self.requests.pop(rng.randrange(len(self.requests)))[0].close()
            self.ended += 1

    def estimated(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted(pod.estimating), self._estimate)

    def loaded(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted(pod.loading), self._load)

    def failed(self, rng: Random) -> None:
        def fail(pod: Pod, model_id: ModelId, rng: Random) -> None:
            pod.step(LoadFailed(model_id, "broken", rng.random() < 0.5))

        self._answer(rng, lambda pod: sorted(pod.estimating.keys() | pod.loading.keys()), fail)

    def unloaded(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted(pod.unloading), self._unload)

    def demoted(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted(pod.demoting), lambda pod, m, rng: pod.demote(m, keeps=_mostly(rng)))

    def dropped(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted({m for m, _ in pod.dropping}), self._drop)

    def tick(self, rng: Random) -> None:
        self._let_pass(rng.choice([1, 500, 2_500, 61_000]))
        pod = self._pod(rng)
        pod.step(Tick())
        self._registry.write_pod(pod)

    def deliver(self, rng: Random) -> None:
        self._registry.deliver(self._pod(rng), rng.choice([1, 3, None]))

    def read_anew(self, rng: Random) -> None:
        self._registry.snapshot(self._pod(rng))

    def drain(self, rng: Random) -> None:
        """Never the last one, or nothing would happen any more."""
        if sum(not pod.engine.draining for pod in self.pods.values()) > 1 and rng.random() < 0.1:
            self._pod(rng).step(DrainStarted())

    def cut_or_mend(self, rng: Random) -> None:
        self._unreachable = set() if self._unreachable else {rng.choice(sorted(self.pods))}

    # Checks

    def check(self) -> None:
        for pod in self.pods.values():
            pod.check()
            self._registry.write_copies(pod)
            stats = pod.engine.stats
            placed = stats.hits + stats.joins + stats.loads + stats.forwards + stats.refusals
            assert placed == self.routes[pod.engine.pod_id]  # placement.stats
            if self.exact:
                on_the_way = sum(self._sizes[m, record.created] for m, record in pod.loading.items())
                assert sum(pod.memory.values()) + on_the_way <= self._capacity_bytes

    def settle(self, rng: Random) -> None:
        """Answer everything, release everything, let time pass: then nothing may be under way, and no request left."""
        self._unreachable.clear()
        for _ in range(500):
            for pod in self.pods.values():
                for model_id in sorted(pod.estimating):
                    self._estimate(pod, model_id, rng)
                for model_id in sorted(pod.loading):
                    self._load(pod, model_id, rng)
                for model_id in sorted(pod.unloading):
                    self._unload(pod, model_id, rng)
                for model_id in sorted(pod.demoting):
                    pod.demote(model_id)
                for model_id, tier in sorted(pod.dropping):
                    pod.dropped(model_id, tier)
            for _ in range(len(self.requests)):
                self.resume(rng)
            self._let_pass(500)
            for pod in self.pods.values():
                pod.step(Tick())
                self._registry.write_pod(pod)
            self.check()
            for pod in self.pods.values():
                self._registry.deliver(pod)
            busy = any(pod.is_busy for pod in self.pods.values())
            if not busy and not self.requests:
                break
        assert not self.requests, "a request does not end"
        for pod in self.pods.values():
            states = {copy.state for copy in pod.cache.copies.values()}
            assert states <= {CopyState.LOADED, CopyState.FAILED}, pod.engine
            loaded = [copy for copy in pod.cache.copies.values() if copy.state is CopyState.LOADED]
            total = sum(copy.size_bytes for copy in loaded)
            assert pod.cache.committed_bytes == pod.cache.resident_bytes == total == sum(pod.memory.values())
            assert not any(copy.pins for copy in pod.cache.copies.values())
            assert pod.cache.copies.keys() <= pod.view.models.keys(), "a removed model's copy stays"
            for tier, holdings in pod.engine.copies.lower.items():
                assert {holding.state for holding in holdings.entries.values()} <= {HoldState.HELD}
                assert holdings.committed_bytes == holdings.resident_bytes
                assert not any(holding.pins for holding in holdings.entries.values())
                for model_id, (created, _) in pod.lower[tier].items():
                    assert pod.view.models[model_id].created == created, "a removed model's bytes stay"

    # A request (mesh.router.Router.walk)

    def _walk(self, pod: Pod, model_id: ModelId, hop: Hop, used_ms: int | None) -> Walk:
        engine = pod.engine
        exclude: set[PodId] = set()
        for _ in range(ATTEMPTS):
            self.routes[engine.pod_id] += 1
            route = engine.route(model_id, hop, exclude, self.now_ms, used_ms)
            try:
                match route:
                    case Serve(copy):
                        yield from self._serve(pod, copy)
                        return
                    case Join(copy):
                        if (yield from self._join(pod, copy)):
                            return
                    case LoadHere():
                        if (yield from self._load_here(pod, model_id, used_ms)):
                            return
                    case Forward(pod_id, onward):
                        assert hop is Hop.CLIENT, "a forward was forwarded"
                        assert pod_id != engine.pod_id
                        assert pod_id not in exclude
                        yield from self._forward(pod, pod_id, onward, model_id, used_ms)
                        return
                    case Refuse(Why.UNKNOWN_MODEL):
                        if not self._registry.fetch(pod, model_key(model_id)):
                            raise Refused(Why.UNKNOWN_MODEL, elsewhere=False)
                    case Refuse(why):
                        raise Refused(why)
            except Refused as error:
                if hop is not Hop.CLIENT or not error.elsewhere or isinstance(route, Refuse):
                    raise
                exclude.add(route.pod_id if isinstance(route, Forward) else engine.pod_id)
        raise Refused(None)

    def _serve(self, pod: Pod, copy: Copy) -> Walk:
        assert copy.state is CopyState.LOADED
        assert copy.model.model_id in pod.memory
        pod.engine.pin(copy)
        try:
            yield None
            assert copy.model.model_id in pod.memory, "unloaded under a request"
        finally:
            pod.unpin(copy)

    def _join(self, pod: Pod, copy: Copy) -> Generator[Waiter | None, None, bool]:
        pod.engine.pin(copy)
        try:
            while copy.state in IN_FLIGHT and not copy.doomed:
                yield pod.wait(copy.model.model_id)
            if copy.state is CopyState.LOADED:
                yield from self._serve(pod, copy)
                return True
            if copy.state is CopyState.FAILED:
                raise Refused(Why.LOAD_FAILED)
            return False
        finally:
            pod.unpin(copy)

    def _load_here(self, pod: Pod, model_id: ModelId, used_ms: int | None) -> Generator[Waiter | None, None, bool]:
        if model_id not in pod.view.models:
            raise Refused(Why.UNKNOWN_MODEL, elsewhere=False)
        pod.step(CopyWanted(model_id, self.now_ms if used_ms is None else used_ms))
        copy = pod.copy(model_id)
        assert copy.state is not CopyState.FAILED, "a failed load is tried again before its expiry"
        if copy.state in IN_FLIGHT and not copy.doomed:
            return (yield from self._join(pod, copy))
        yield pod.wait(model_id)
        return False

    def _forward(self, pod: Pod, pod_id: PodId, hop: Hop, model_id: ModelId, used_ms: int | None) -> Walk:
        reached = pod_id not in self._unreachable
        pod.engine.forward_started(pod_id)
        try:
            if not reached:
                raise Refused(Why.NO_POD)
            yield from self._walk(self.pods[pod_id], model_id, hop, used_ms)
        finally:
            pod.engine.forward_ended(pod_id, reached=reached, now_ms=self.now_ms)

    def _go_on(self, walk: Walk) -> None:
        try:
            self.requests.append((walk, next(walk)))
        except (StopIteration, Refused):
            self.ended += 1

    # Models and their loader

    def _register(self, rng: Random, model_id: ModelId) -> None:
        if model_key(model_id) not in self._registry.records:
            created = self._registry.next_revision
            largest = self._capacity_bytes + 3 if rng.random() < 0.1 else max(1, self._capacity_bytes // 2)
            self._sizes[model_id, created] = rng.randint(1, largest)
            self._registry.write(model_key(model_id), model_record(model_id, created))

    def _estimate(self, pod: Pod, model_id: ModelId, rng: Random) -> None:
        size_bytes = self._sizes[model_id, pod.estimating[model_id].created]
        if not self.exact:
            size_bytes = max(1, size_bytes + rng.choice([-size_bytes // 2, -1, 0, 1]))
        pod.step(SizeEstimated(model_id, size_bytes))

    def _load(self, pod: Pod, model_id: ModelId, rng: Random) -> None:
        pod.finish(model_id, self._sizes[model_id, pod.loading[model_id].created], keeps=_mostly(rng))

    def _unload(self, pod: Pod, model_id: ModelId, rng: Random) -> None:
        pod.unload(model_id, keeps=_mostly(rng))

    def _drop(self, pod: Pod, model_id: ModelId, rng: Random) -> None:
        pod.dropped(model_id, rng.choice(sorted(tier for m, tier in pod.dropping if m == model_id)))

    def _answer(
        self, rng: Random, asked: Callable[[Pod], Sequence[ModelId]], how: Callable[[Pod, ModelId, Random], object]
    ) -> None:
        work = [(pod, model_id) for pod in self.pods.values() for model_id in asked(pod)]
        if work:
            pod, model_id = rng.choice(work)
            how(pod, model_id, rng)

    def _pod(self, rng: Random) -> Pod:
        return self.pods[rng.choice(sorted(self.pods))]

    def _let_pass(self, ms: int) -> None:
        self.now_ms += ms
        for pod in self.pods.values():
            pod.now_ms = self.now_ms


def _mostly(rng: Random) -> bool:
    """Whether what is to be kept in a lower tier really is."""
    return rng.random() < 0.8


Operation = Callable[[World, Random], None]

COMMON: Final[tuple[Operation, ...]] = (
    World.register,
    World.request,
    World.resume,
    World.estimated,
    World.loaded,
    World.unloaded,
    World.demoted,
    World.dropped,
    World.deliver,
    World.tick,
)
RARE: Final[tuple[Operation, ...]] = (
    World.remove,
    World.register_anew,
    World.give_up,
    World.cancel,
    World.failed,
    World.read_anew,
    World.drain,
    World.cut_or_mend,
)
