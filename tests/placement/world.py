"""Pods under a registry whose watches lag, with requests that walk as `mesh.router` lets them: every step is checked.

Each operation takes a source of chance, so that hypothesis and plain seeded runs can both drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from placement.holdings import HoldState
from placement.lifecycle import CopyState
from placement.messages import (
    CopyUnwanted,
    CopyWanted,
    DrainStarted,
    Hop,
    LoadFailed,
    SizeEstimated,
    Tick,
)
from placement.records import ModelId, model_key
from tests.placement.pods import Pod, model_record
from tests.placement.requests import Requests

MODELS: Final = [f"m{i}" for i in range(7)]


class World(Requests):
    def __init__(self, pods: int, capacity_bytes: int, *, exact: bool, load_slots: int = 2, **limits: Any) -> None:
        limits |= {"load_slots": load_slots, "load_tries": 2}
        super().__init__({f"p{i}": Pod(capacity_bytes, pod_id=f"p{i}", **limits) for i in range(pods)})
        self.exact = exact
        """Estimates are right: then true bytes must stay within the capacity as well."""
        self._capacity_bytes = capacity_bytes
        self._sizes: dict[tuple[ModelId, int], int] = {}
        for pod in self.pods.values():
            self.registry.write_pod(pod)
        for pod in self.pods.values():
            self.registry.deliver(pod)

    # Operations

    def register(self, rng: Random) -> None:
        self._register(rng, rng.choice(MODELS))

    def remove(self, rng: Random) -> None:
        self.registry.write(model_key(rng.choice(MODELS)), None)

    def register_anew(self, rng: Random) -> None:
        model_id = rng.choice(MODELS)
        self.registry.write(model_key(model_id), None)
        self._register(rng, model_id)

    def give_up(self, rng: Random) -> None:
        self._pod(rng).step(CopyUnwanted(rng.choice(MODELS)))

    def prefetch(self, rng: Random) -> None:
        pod, model_id = self._pod(rng), rng.choice(MODELS)
        if model_id in pod.view.models and not pod.engine.draining:
            pod.step(CopyWanted(model_id, self.now_ms, is_prefetch=True))

    def request(self, rng: Random) -> None:
        used_ms = rng.choice([None, None, self.now_ms - 3_600_000, self.now_ms + 3_600_000])
        walk = self.walk(self._pod(rng), rng.choice(MODELS), Hop.CLIENT, used_ms)
        self.go_on(walk)

    def resume(self, rng: Random) -> None:
        """A woken request goes on, or a running one ends."""
        ready = [i for i, (_, waiter) in enumerate(self.requests) if waiter is None or waiter.woken]
        if ready:
            self.go_on(self.requests.pop(rng.choice(ready))[0])

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
        self._answer(rng, lambda pod: sorted(pod.below.demoting), lambda pod, m, rng: pod.demote(m, keeps=_mostly(rng)))

    def dropped(self, rng: Random) -> None:
        self._answer(rng, lambda pod: sorted({m for m, _ in pod.below.dropping}), self._drop)

    def tick(self, rng: Random) -> None:
        self._let_pass(rng.choice([1, 500, 2_500, 61_000]))
        pod = self._pod(rng)
        pod.step(Tick())
        self.registry.write_pod(pod)

    def deliver(self, rng: Random) -> None:
        self.registry.deliver(self._pod(rng), rng.choice([1, 3, None]))

    def read_anew(self, rng: Random) -> None:
        self.registry.snapshot(self._pod(rng))

    def drain(self, rng: Random) -> None:
        """Never the last one, or nothing would happen any more."""
        if sum(not pod.engine.draining for pod in self.pods.values()) > 1 and rng.random() < 0.1:
            self._pod(rng).step(DrainStarted())

    def cut_or_mend(self, rng: Random) -> None:
        self.unreachable = set() if self.unreachable else {rng.choice(sorted(self.pods))}

    # Checks

    def check(self) -> None:
        for pod in self.pods.values():
            pod.check()
            self.registry.write_copies(pod)
            stats = pod.engine.stats
            placed = stats.hits + stats.joins + stats.loads + stats.forwards + stats.refusals
            assert placed == self.routes[pod.engine.pod_id]  # placement.stats
            if self.exact:
                on_the_way = sum(self._sizes[m, record.created] for m, record in pod.loading.items())
                assert sum(pod.memory.values()) + on_the_way <= self._capacity_bytes

    def settle(self, rng: Random) -> None:
        """Answer everything, release everything, let time pass: then nothing may be under way, and no request left."""
        self.unreachable.clear()
        for _ in range(500):
            for pod in self.pods.values():
                for model_id in sorted(pod.estimating):
                    self._estimate(pod, model_id, rng)
                for model_id in sorted(pod.loading):
                    self._load(pod, model_id, rng)
                for model_id in sorted(pod.unloading):
                    self._unload(pod, model_id, rng)
                for model_id in sorted(pod.below.demoting):
                    pod.demote(model_id)
                for model_id, tier in sorted(pod.below.dropping):
                    pod.dropped(model_id, tier)
            for _ in range(len(self.requests)):
                self.resume(rng)
            self._let_pass(500)
            for pod in self.pods.values():
                pod.step(Tick())
                self.registry.write_pod(pod)
            self.check()
            for pod in self.pods.values():
                self.registry.deliver(pod)
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
                for model_id, (created, _) in pod.below.held[tier].items():
                    assert pod.view.models[model_id].created == created, "a removed model's bytes stay"

    # Models and their loader

    def _register(self, rng: Random, model_id: ModelId) -> None:
        if model_key(model_id) not in self.registry.records:
            created = self.registry.next_revision
            largest = self._capacity_bytes + 3 if rng.random() < 0.1 else max(1, self._capacity_bytes // 2)
            self._sizes[model_id, created] = rng.randint(1, largest)
            self.registry.write(model_key(model_id), model_record(model_id, created))

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
        pod.dropped(model_id, rng.choice(sorted(tier for m, tier in pod.below.dropping if m == model_id)))

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
    World.prefetch,
    World.read_anew,
    World.drain,
    World.cut_or_mend,
)
