"""A pod without a shell: keeps what the engine asked for until a test answers, and checks every step it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from placement.cache import Copy
from placement.engine import Engine
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
    LoadOn,
    Publish,
    Route,
    SettleVModel,
    SizeEstimated,
    StartLoad,
    StartUnload,
    Tick,
    UnloadFinished,
    Unpublish,
    Wake,
)
from placement.policies.base import EvictionPolicy
from placement.policies.lru import Lru
from placement.records import CopyRecord, CopyStatus, ModelId, ModelRecord, PodId, PodRecord, Tier
from placement.view import ClusterView
from tests.placement.below import Below

START_MS = 1_000_000


class Waiter:
    """Somebody waits for a model's copy to change (`Driver.changed`)."""

    woken = False


class Pod:
    """One engine, and the work it has given out."""

    def __init__(
        self,
        capacity_bytes: int = 10,
        *,
        pod_id: PodId = "p1",
        view: ClusterView | None = None,
        policy: Callable[[], EvictionPolicy] = Lru,
        **limits: Any,
    ) -> None:
        self.view = ClusterView() if view is None else view
        self.limits = Limits(capacity_bytes, **limits)
        self.engine = Engine(pod_id, f"{pod_id}:8033", self.limits, self.view, policy, Random(1))
        self.cache = self.engine.cache
        self.now_ms = START_MS
        self.estimating: dict[ModelId, ModelRecord] = {}
        self.loading: dict[ModelId, ModelRecord] = {}
        self.memory: dict[ModelId, int] = {}
        """What loaders hold, in true bytes; it goes when an unload has finished."""
        self.unloading: set[ModelId] = set()
        self.below = Below(self.engine.copies.lower)
        self.published: dict[ModelId, CopyRecord] = {}
        self.wishes: list[EnsureLoaded | SettleVModel | LoadOn] = []
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
        keep = self.below.reading[model_id].keep
        kept = {tier: size_bytes for tier, most in keep.items() if keeps and size_bytes <= most}
        return self.step(LoadFinished(model_id, size_bytes, kept))

    def expire(self) -> list[Action]:
        """Let loads that are under way take too long."""
        self.now_ms += self.limits.load_timeout_ms
        return self.step(Tick())

    def unload(self, model_id: ModelId, *, keeps: bool = True) -> list[Action]:
        return self.step(UnloadFinished(model_id, keeps and model_id in self.below.keeping))

    def demote(self, model_id: ModelId, *, keeps: bool = True) -> list[Action]:
        return self.step(Demoted(model_id, self.below.demoting[model_id].target, keeps))

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
            for model_id in list(self.below.demoting):
                self.demote(model_id)
            for model_id, tier in list(self.below.dropping):
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
        return bool(self.estimating or self.loading or self.unloading or self.below.demoting or self.below.dropping)

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
        self.below.check(self.memory)
        for model_id in self.published.keys() | self.cache.copies.keys() | self.below.models():
            assert _gist(self.published.get(model_id)) == _gist(self.engine.copies.published(model_id))
        assert not any(self.copy(model_id).pins for model_id in self.unloading)
        at_work = (CopyState.LOADING, CopyState.OVERDUE)
        assert set(self.loading) == {m for m in self.cache.copies if self.state(m) in at_work}

    # The shell's part

    def step(self, event: Event) -> list[Action]:
        match event:
            case SizeEstimated(model_id, _):
                self.estimating.pop(model_id)
            case LoadFinished(model_id, size_bytes, kept):
                self.below.loaded(self.loading.pop(model_id), kept)
                self.memory[model_id] = size_bytes
            case LoadFailed(model_id):
                assert (self.estimating.pop(model_id, None) or self.loading.pop(model_id, None)) is not None
                self.below.reading.pop(model_id, None)
            case UnloadFinished(model_id, kept_below):
                self.unloading.remove(model_id)
                self.below.unloaded(model_id, self.memory.pop(model_id), kept_below)
            case Demoted(model_id, target, kept_below):
                self.below.demoted(model_id, target, kept_below)
            case HeldDropped(model_id, tier):
                self.below.dropped(model_id, tier)
        actions = self.engine.step(event, self.now_ms)
        self.carry_out(actions)
        return actions

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case EstimateSize(model):
                    assert model.model_id not in self.estimating
                    self.estimating[model.model_id] = model
                case StartLoad(model):
                    assert model.model_id not in self.loading.keys() | self.memory.keys(), "loaded twice"
                    overdue = self.cache.count(CopyState.OVERDUE)
                    assert len(self.loading) - overdue < self.limits.load_slots, "more loads than slots"
                    self.loading[model.model_id] = model
                    self.below.reading[model.model_id] = action
                    taken = sum(self.memory.values()) + self.cache.bytes_in(CopyState.LOADING, CopyState.OVERDUE)
                    assert taken <= self.limits.capacity_bytes, "a load starts into memory that is not free"
                case StartUnload(model_id, keep):
                    assert model_id in self.memory
                    assert model_id not in self.unloading
                    self.unloading.add(model_id)
                    if keep is not None:
                        self.below.keeping[model_id] = keep
                case Demote() | DropHeld():
                    self.below.take(action)
                case Publish(record):
                    self.published[record.model_id] = record
                case Unpublish(model_id):
                    self.published.pop(model_id, None)
                case Wake(model_id):
                    for waiter in self._waiters.pop(model_id, ()):
                        waiter.woken = True
                case EnsureLoaded() | SettleVModel() | LoadOn():
                    self.wishes.append(action)
        self.check()


def pod_with(capacity_bytes: int = 10, **tiers: Any) -> Pod:
    pod = Pod(capacity_bytes, **tiers)
    pod.register(*"abcdef")
    return pod


def demoted(pod: Pod, model_id: str, size_bytes: int) -> None:
    """Have a model loaded and given up."""
    pod.load(model_id, size_bytes)
    pod.give_up(model_id)


def where(pod: Pod, model_id: str) -> list[Tier]:
    """The lower tiers in which the model lies."""
    return [tier for tier, held in pod.below.held.items() if model_id in held]


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
