"""A pod without a shell: keeps what the engine asked for until a test answers, and checks every step it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from placement.cache import Copy
from placement.engine import Engine
from placement.holdings import HoldState
from placement.lifecycle import CopyState
from placement.limits import Limits
from placement.messages import (
    Action,
    CopyUnwanted,
    CopyWanted,
    Demote,
    Demoted,
    DropHeld,
    EnsureLoaded,
    EstimateSize,
    Event,
    HeldDropped,
    Hop,
    LoadFailed,
    LoadFinished,
    Publish,
    Route,
    SettleVModel,
    SizeEstimated,
    StartLoad,
    StartUnload,
    UnloadFinished,
    Unpublish,
    Wake,
)
from placement.policies.lru import Lru
from placement.records import CopyRecord, CopyStatus, ModelId, ModelRecord, PodId, PodRecord, Tier
from placement.view import ClusterView

START_MS = 1_000_000


class Waiter:
    """Somebody waits for a model's copy to change (`Driver.changed`)."""

    woken = False


class Pod:
    """One engine, and the work it has given out."""

    def __init__(
        self, capacity_bytes: int = 10, *, pod_id: PodId = "p1", view: ClusterView | None = None, **limits: Any
    ) -> None:
        self.view = ClusterView() if view is None else view
        self.limits = Limits(capacity_bytes, **limits)
        self.engine = Engine(pod_id, f"{pod_id}:8033", self.limits, self.view, Lru, Random(1))
        self.cache = self.engine.cache
        self.now_ms = START_MS
        self.estimating: dict[ModelId, ModelRecord] = {}
        self.loading: dict[ModelId, ModelRecord] = {}
        self.memory: dict[ModelId, int] = {}
        """What loaders hold, in true bytes; it goes when an unload has finished."""
        self.unloading: set[ModelId] = set()
        self.lower: dict[Tier, dict[ModelId, tuple[int, int]]] = {tier: {} for tier in self.engine.copies.lower}
        """What lies below the device: registration and true bytes; they go when a drop has finished."""
        self.reading: dict[ModelId, StartLoad] = {}
        self.keeping: dict[ModelId, Tier] = {}
        """Unloads that are to leave a copy."""
        self.demoting: dict[ModelId, Demote] = {}
        self.dropping: set[tuple[ModelId, Tier]] = set()
        self.registered: dict[ModelId, int] = {}
        """The registration of what is in memory."""
        self.published: dict[ModelId, CopyRecord] = {}
        self.wishes: list[EnsureLoaded | SettleVModel] = []
        self._waiters: dict[ModelId, list[Waiter]] = {}

    # What a test says

    def register(self, *model_ids: ModelId, created: int = 1) -> None:
        for model_id in model_ids:
            self.view.apply(model_record(model_id, created))

    def want(self, model_id: ModelId, last_used_ms: int | None = None) -> list[Action]:
        return self.step(CopyWanted(model_id, self.now_ms if last_used_ms is None else last_used_ms))

    def load(self, model_id: ModelId, size_bytes: int = 1, last_used_ms: int | None = None) -> Copy:
        """Bring a model to LOADED, registered and estimated right."""
        if model_id not in self.view.models:
            self.register(model_id)
        self.want(model_id, last_used_ms)
        self.step(SizeEstimated(model_id, size_bytes))
        self.finish(model_id, size_bytes)
        assert self.state(model_id) is CopyState.LOADED
        return self.copy(model_id)

    def queue(self, model_id: ModelId, size_bytes: int = 1) -> list[Action]:
        """Want a registered model and answer its estimate; what follows from that."""
        self.want(model_id)
        return self.step(SizeEstimated(model_id, size_bytes))

    def pin_loaded(self, model_id: ModelId, size_bytes: int) -> Copy:
        self.load(model_id, size_bytes)
        return self.pinned(model_id)

    def finish(self, model_id: ModelId, size_bytes: int, *, keeps: bool = True) -> list[Action]:
        """With `keeps`, all tiers are filled that were to be and have the room."""
        keep = self.reading[model_id].keep
        kept = {tier: size_bytes for tier, most in keep.items() if keeps and size_bytes <= most}
        return self.step(LoadFinished(model_id, size_bytes, kept))

    def unload(self, model_id: ModelId, *, keeps: bool = True) -> list[Action]:
        return self.step(UnloadFinished(model_id, keeps and model_id in self.keeping))

    def demote(self, model_id: ModelId, *, keeps: bool = True) -> list[Action]:
        return self.step(Demoted(model_id, self.demoting[model_id].target, keeps))

    def dropped(self, model_id: ModelId, tier: Tier) -> list[Action]:
        return self.step(HeldDropped(model_id, tier))

    def give_up(self, model_id: ModelId) -> None:
        self.step(CopyUnwanted(model_id))
        self.unload(model_id)

    def settle(self) -> None:
        """Answer all work and release all pins, until there is none."""
        for copy in list(self.cache.copies.values()):
            while copy.pins:
                self.unpin(copy)
        while self.is_busy:
            for model_id in list(self.demoting):
                self.demote(model_id)
            for model_id, tier in list(self.dropping):
                self.dropped(model_id, tier)
            for model_id in list(self.estimating):
                self.step(SizeEstimated(model_id, 2))
            for model_id in list(self.loading):
                self.finish(model_id, 2)
            for model_id in list(self.unloading):
                self.unload(model_id)

    def pinned(self, model_id: ModelId) -> Copy:
        copy = self.copy(model_id)
        self.engine.pin(copy)
        return copy

    def unpin(self, copy: Copy) -> Sequence[Action]:
        actions = self.engine.unpin(copy, self.now_ms)
        self.carry_out(actions)
        return actions

    def wait(self, model_id: ModelId) -> Waiter:
        waiter = Waiter()
        self._waiters.setdefault(model_id, []).append(waiter)
        return waiter

    # What a test asks

    @property
    def is_busy(self) -> bool:
        """Whether the engine waits for an answer."""
        return bool(self.estimating or self.loading or self.unloading or self.demoting or self.dropping)

    def started(self, model_id: ModelId) -> StartLoad:
        return StartLoad(self.view.models[model_id])

    def copy(self, model_id: ModelId) -> Copy:
        return self.cache.copies[model_id]

    def state(self, model_id: ModelId) -> CopyState:
        copy = self.cache.copies.get(model_id)
        return CopyState.GONE if copy is None else copy.state

    def check(self) -> None:
        """What holds whatever has happened."""
        self.cache.check()
        self._check_lower()
        held = {model_id for holdings in self.lower.values() for model_id in holdings}
        for model_id in self.published.keys() | self.cache.copies.keys() | held:
            assert _gist(self.published.get(model_id)) == _gist(self.engine.copies.published(model_id))
        assert not any(self.copy(model_id).pins for model_id in self.unloading)
        assert set(self.loading) == {m for m in self.cache.copies if self.state(m) is CopyState.LOADING}

    def _check_lower(self) -> None:
        """True bytes below the device are the books'; with those on their way there they never exceed a tier."""
        for tier, holdings in self.engine.copies.lower.items():
            holdings.check()
            coming = [job.keep.get(tier, 0) for job in self.reading.values()]
            coming += [self.memory[m] for m, below in self.keeping.items() if below is tier]
            coming += [self.lower[job.source][m][1] for m, job in self.demoting.items() if job.target is tier]
            there = {model_id: size_bytes for model_id, (_, size_bytes) in self.lower[tier].items()}
            assert sum(there.values()) + sum(coming) <= holdings.capacity_bytes
            lying = (HoldState.HELD, HoldState.DROPPING)
            assert there == {m: h.size_bytes for m, h in holdings.entries.items() if h.state in lying}
        for model_id, load in self.reading.items():
            if load.source is not None:
                assert self.lower[load.source][model_id][0] == load.model.created, "a load reads what it should not"
                assert (model_id, load.source) not in self.dropping, "dropped while it is read"
        for model_id, demotion in self.demoting.items():
            assert (model_id, demotion.source) not in self.dropping, "dropped while it is copied"

    # The shell's part

    def step(self, event: Event) -> list[Action]:
        match event:
            case SizeEstimated(model_id, _):
                self.estimating.pop(model_id)
            case LoadFinished(model_id, size_bytes, kept):
                created = self.loading.pop(model_id).created
                del self.reading[model_id]
                self.memory[model_id], self.registered[model_id] = size_bytes, created
                for tier, kept_bytes in kept.items():
                    self._keep(model_id, tier, created, kept_bytes)
            case LoadFailed(model_id, _, _):
                assert (self.estimating.pop(model_id, None) or self.loading.pop(model_id, None)) is not None
                self.reading.pop(model_id, None)
            case UnloadFinished(model_id, was_kept):
                self.unloading.remove(model_id)
                size_bytes = self.memory.pop(model_id)
                below = self.keeping.pop(model_id, None)
                if was_kept:
                    assert below is not None
                    self._keep(model_id, below, self.registered[model_id], size_bytes)
            case Demoted(model_id, target, was_kept):
                source = self.demoting.pop(model_id).source
                if was_kept:
                    self._keep(model_id, target, *self.lower[source][model_id])
            case HeldDropped(model_id, tier):
                self.dropping.remove((model_id, tier))
                del self.lower[tier][model_id]
        actions = self.engine.step(event, self.now_ms)
        self.carry_out(actions)
        return actions

    def _keep(self, model_id: ModelId, tier: Tier, created: int, size_bytes: int) -> None:
        assert model_id not in self.lower[tier], "held twice"
        self.lower[tier][model_id] = created, size_bytes

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case EstimateSize(model):
                    assert model.model_id not in self.estimating
                    self.estimating[model.model_id] = model
                case StartLoad(model):
                    assert model.model_id not in self.loading.keys() | self.memory.keys(), "loaded twice"
                    assert len(self.loading) < self.limits.load_slots, "more loads than slots"
                    self.loading[model.model_id] = model
                    self.reading[model.model_id] = action
                case StartUnload(model_id, keep):
                    assert model_id in self.memory
                    assert model_id not in self.unloading
                    self.unloading.add(model_id)
                    if keep is not None:
                        self.keeping[model_id] = keep
                case Demote(model_id):
                    assert model_id not in self.demoting
                    self.demoting[model_id] = action
                case DropHeld(model_id, tier):
                    assert model_id in self.lower[tier]
                    assert (model_id, tier) not in self.dropping
                    self.dropping.add((model_id, tier))
                case Publish(record):
                    self.published[record.model_id] = record
                case Unpublish(model_id):
                    self.published.pop(model_id, None)
                case Wake(model_id):
                    for waiter in self._waiters.pop(model_id, ()):
                        waiter.woken = True
                case EnsureLoaded() | SettleVModel():
                    self.wishes.append(action)
        self.check()


def model_record(model_id: ModelId, created: int = 1, **members: Any) -> ModelRecord:
    path = f"/models/{model_id}/{created}"
    return ModelRecord(model_id, "synthetic", path, revision=created, created=created, **members)


def peer(pod_id: PodId, **members: Any) -> PodRecord:
    return PodRecord(**{"pod_id": pod_id, "address": f"{pod_id}:8033", "capacity_bytes": 10, **members})


def held(pod_id: PodId, model_id: ModelId, status: CopyStatus = CopyStatus.LOADED, **members: Any) -> CopyRecord:
    return CopyRecord(model_id, pod_id, status, **members)


def _gist(record: CopyRecord | None) -> object:
    """What others decide by; times and estimates may be as old as the last change of status."""
    if record is None:
        return None
    return record.status, record.tier, record.error, record.size_bytes if record.status is CopyStatus.LOADED else 0


def route(pod: Pod, model_id: str = "a", hop: Hop = Hop.CLIENT, *exclude: str, used_ms: int | None = None) -> Route:
    """Where the pod sends a request."""
    return pod.engine.route(model_id, hop, set(exclude), pod.now_ms, used_ms)


def peers(pod: Pod, *pod_ids: str) -> None:
    """Let the pod know of others, empty ones."""
    for pod_id in pod_ids:
        pod.view.apply(peer(pod_id))
