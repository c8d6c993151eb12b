"""One pod's copies on their way in and out: what each event does to them, and what must be done next.

The engine owns one `LocalCopies`; nothing else moves a copy. Every method appends to `actions` what the shell must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from placement.cache import Cache, Copy
from placement.lifecycle import IN_FLIGHT, CopyState, Move
from placement.messages import (
    Action,
    CopyWanted,
    EstimateSize,
    Publish,
    StartLoad,
    StartUnload,
    Unpublish,
    Wake,
)
from placement.policies.base import EvictionPolicy
from placement.records import CopyRecord, CopyStatus, ModelId, PodId
from placement.stats import Stats
from placement.view import ClusterView


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pod may do."""

    capacity_bytes: int
    load_slots: int = 2
    """Loads under way at once, evictions they wait for included."""
    failure_expiry_ms: int = 60_000
    """How long a failed load is remembered."""
    retryable_expiry_ms: int = 5_000
    """The same for failures whose loader says that they may pass."""
    load_tries: int = 3
    """Pods on which a load may fail before a request gives up."""
    suspect_ms: int = 2_000
    """How long a peer that could not be reached is avoided."""


class LocalCopies:
    """The copies of one pod, from wanted to gone."""

    def __init__(self, pod_id: PodId, limits: Limits, view: ClusterView, policy: EvictionPolicy, stats: Stats) -> None:
        self.pod_id = pod_id
        self.limits = limits
        self.cache = Cache(limits.capacity_bytes, policy)
        self._view = view
        self._stats = stats
        self._queue: list[Copy] = []
        """Wanted copies in order of arrival: QUEUED, estimated or not."""
        self._starved = False
        """Something waits for bytes that pins hold."""

    def __repr__(self) -> str:
        return f"{self.cache!r} queued={len(self._queue)}"

    def unpin(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        copy.pins -= 1
        if copy.pins == 0 and (self._starved or copy.state is CopyState.UNLOADING):
            self._start_unload(copy, actions)
            self.advance(now_ms, actions)

    def records(self) -> dict[ModelId, CopyRecord]:
        """This pod's copies as the registry should tell them."""
        records = ((model_id, self.published(model_id)) for model_id in self.cache.copies)
        return {model_id: record for model_id, record in records if record is not None}

    def published(self, model_id: ModelId) -> CopyRecord | None:
        """A model's copy as the registry should tell it; None: it should not."""
        copy = self.cache.copies.get(model_id)
        return None if copy is None or copy.doomed or copy.state not in _PUBLISHED else self.record(copy)

    def record(self, copy: Copy) -> CopyRecord:
        return CopyRecord(
            model_id=copy.model.model_id,
            pod_id=self.pod_id,
            status=_PUBLISHED[copy.state],
            since_ms=copy.since_ms,
            size_bytes=copy.size_bytes,
            error=copy.error,
            retryable=copy.retryable,
        )

    def wanted(self, event: CopyWanted, now_ms: int, actions: list[Action]) -> None:
        copy = self.cache.copies.get(event.model_id)
        if copy is None:
            copy = Copy(self._view.models[event.model_id], since_ms=now_ms, used_ms=event.last_used_ms)
            self.cache.add(copy)
            self._queue.append(copy)
            actions += (Publish(self.record(copy)), EstimateSize(copy.model))
        elif copy.state is CopyState.UNLOADING or copy.doomed:
            copy.reload = True
        elif copy.state is CopyState.LOADED:
            self.cache.policy.touch(event.model_id, event.last_used_ms)
        else:
            copy.used_ms = max(copy.used_ms, event.last_used_ms)

    def estimated(self, copy: Copy, size_bytes: int, now_ms: int, actions: list[Action]) -> None:
        if copy.doomed:
            self._drop(copy, now_ms, actions)
            return
        copy.estimated = True
        copy.size_bytes = self._view.measured(copy.model.model_id) or size_bytes
        if copy.size_bytes > self.limits.capacity_bytes:
            self.failed(copy, self._too_large(copy.size_bytes), False, now_ms, actions)

    def loaded(self, copy: Copy, size_bytes: int, now_ms: int) -> None:
        """The load has ended well; `advance` corrects the books."""
        self._stats.loads_finished += 1
        self._view.learn_size(copy.model.model_id, size_bytes)
        copy.measured_bytes = size_bytes
        self.cache.move(copy, Move.FINISH, now_ms)

    def failed(self, copy: Copy, error: str, retryable: bool, now_ms: int, actions: list[Action]) -> None:
        if copy.state is CopyState.QUEUED:
            self._queue.remove(copy)
        self.cache.move(copy, Move.FAIL, now_ms)
        self._stats.loads_failed += 1
        copy.error, copy.retryable, copy.size_bytes = error, retryable, 0
        copy.expires_ms = now_ms + (self.limits.retryable_expiry_ms if retryable else self.limits.failure_expiry_ms)
        if copy.doomed:
            self._drop(copy, now_ms, actions)
        else:
            actions += (Publish(self.record(copy)), Wake(copy.model.model_id))

    def unloaded(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        if copy.error:
            self.failed(copy, copy.error, copy.retryable, now_ms, actions)
        else:
            self.cache.move(copy, Move.UNLOADED, now_ms)
            self._gone(copy, now_ms, actions)

    def unwanted(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """The model was removed, or somebody asked for this copy to be given up."""
        copy.reload = False
        match copy.state:
            case CopyState.LOADED:
                self._evict(copy, now_ms, actions)
            case CopyState.UNLOADING:
                copy.error = ""
            case CopyState.WAITING | CopyState.FAILED:
                self._drop(copy, now_ms, actions)
            case CopyState.QUEUED if copy.estimated:
                self._drop(copy, now_ms, actions)
            case _:  # the loader is at work and cannot be stopped: its answer will find the copy doomed
                copy.doomed = True
                actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))

    def expire(self, now_ms: int, actions: list[Action]) -> None:
        """Forget failures whose time has come."""
        copies = self.cache.copies.values()
        for copy in [c for c in copies if c.state is CopyState.FAILED and c.expires_ms <= now_ms]:
            self._drop(copy, now_ms, actions)

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Let every copy go as far as bytes and slots allow: SIZING first, then WAITING, then the queue."""
        self._starved = False
        count = self.cache.count
        if count(CopyState.SIZING, CopyState.WAITING):
            copies = list(self.cache.copies.values())
            for copy in [c for c in copies if c.state is CopyState.SIZING]:
                self._settle(copy, now_ms, actions)
            for copy in [c for c in copies if c.state is CopyState.WAITING]:
                if copy.size_bytes <= self.cache.free_bytes:
                    self._load(copy, now_ms, actions)
        if count(CopyState.SIZING):
            return  # room is being made for a copy that is in memory already; promise none of it to others
        for copy in [c for c in self._queue if c.estimated]:
            if count(CopyState.WAITING, CopyState.LOADING) >= self.limits.load_slots:
                break
            if self._make_room(copy.size_bytes, now_ms, actions):
                self._queue.remove(copy)
                self.cache.move(copy, Move.PROMISE, now_ms)
                if copy.size_bytes <= self.cache.free_bytes:
                    self._load(copy, now_ms, actions)

    def _load(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.START, now_ms)
        actions.append(StartLoad(copy.model))

    def _settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Correct the books of a loaded copy; one that turned out larger may have to wait for evictions, or to go."""
        excess = copy.measured_bytes - copy.size_bytes
        if copy.doomed:
            self._evict(copy, now_ms, actions)
        elif copy.measured_bytes > self.limits.capacity_bytes:
            copy.error, copy.retryable = self._too_large(copy.measured_bytes), False
            self._evict(copy, now_ms, actions)
        elif self._make_room(excess, now_ms, actions):
            if excess <= self.cache.free_bytes:
                self.cache.move(copy, Move.SETTLE, now_ms)
                actions += (Publish(self.record(copy)), Wake(copy.model.model_id))
        elif not self.cache.count(CopyState.LOADED, CopyState.UNLOADING):
            # Only loads hold the room, perhaps waiting for each other: this one gives way.
            copy.error = (
                f"loaded as {copy.measured_bytes} bytes instead of {copy.size_bytes}, for which there is no room"
            )
            copy.retryable = True
            self._evict(copy, now_ms, actions)

    def _make_room(self, need_bytes: int, now_ms: int, actions: list[Action]) -> bool:
        """Evict until `need_bytes` can be promised; False: pins and loads hold too much."""
        victims = self.cache.victims(need_bytes - (self.limits.capacity_bytes - self.cache.committed_bytes))
        if victims is None:
            self._starved = True
            return False
        for victim in victims:
            self._stats.evictions += 1
            self._evict(victim, now_ms, actions)
        return True

    def _evict(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.EVICT, now_ms)
        actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))
        self._start_unload(copy, actions)

    def _start_unload(self, copy: Copy, actions: list[Action]) -> None:
        if copy.state is CopyState.UNLOADING and not copy.unload_started and not copy.pins:
            copy.unload_started = True
            actions.append(StartUnload(copy.model.model_id))

    def _drop(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """A copy that holds no memory ceases to exist."""
        if copy.state is CopyState.QUEUED:
            self._queue.remove(copy)
        self.cache.move(copy, Move.DROP, now_ms)
        self._gone(copy, now_ms, actions)

    def _gone(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        model_id = copy.model.model_id
        actions += (Unpublish(model_id), Wake(model_id))
        if copy.reload and model_id in self._view.models:
            self.wanted(CopyWanted(model_id, now_ms), now_ms, actions)

    def _too_large(self, size_bytes: int) -> str:
        return f"needs {size_bytes} bytes; this pod holds {self.limits.capacity_bytes} bytes"


_PUBLISHED: Final = {
    **dict.fromkeys(IN_FLIGHT, CopyStatus.LOADING),
    CopyState.LOADED: CopyStatus.LOADED,
    CopyState.FAILED: CopyStatus.FAILED,
}
