"""One pod's copies on their way in and out: what each event does to them, and what must be done next.

The engine owns one `LocalCopies`; nothing else moves a copy. Every method appends to `actions` what the shell must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from placement.cache import Cache, Copy
from placement.costs import LoadCosts
from placement.lifecycle import IN_FLIGHT, CopyState, IllegalMove, Move
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
    room_patience_ms: int = 2_000
    """How long a copy that turned out larger than estimated may wait for its room before it is given up."""
    queue_patience_ms: int = 10_000
    """How long a copy may be queued before finding no room for it is the answer."""
    slo_ms: int = 100
    """Within what requests should be answered for models that were registered without a word on it."""


class LocalCopies:
    """The copies of one pod, from wanted to gone."""

    def __init__(self, pod_id: PodId, limits: Limits, view: ClusterView, policy: EvictionPolicy, stats: Stats) -> None:
        self.pod_id = pod_id
        self.limits = limits
        self.cache = Cache(limits.capacity_bytes, policy)
        self.costs = LoadCosts()
        self._view = view
        self._stats = stats
        self._starved = False
        """Something waits for bytes that pins hold."""

    def __repr__(self) -> str:
        return f"{self.cache!r} queued={self.cache.count(CopyState.QUEUED)}"

    def unpin(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        assert copy.pins > 0, copy
        copy.pins -= 1
        if copy.pins == 0 and (self._starved or copy.state is CopyState.UNLOADING):
            self._start_unload(copy, actions)
            self.advance(now_ms, actions)

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
            registration=copy.model.created,
        )

    def wanted(self, event: CopyWanted, now_ms: int, actions: list[Action]) -> None:
        """A copy that is on its way out has to be gone first: who wants the model hears of that and asks again."""
        copy = self.cache.copies.get(event.model_id)
        used_ms = min(event.last_used_ms, now_ms)
        if copy is None:
            copy = Copy(self._view.models[event.model_id], since_ms=now_ms, used_ms=used_ms)
            self.cache.add(copy)
            actions += (Publish(self.record(copy)), EstimateSize(copy.model))
        elif copy.state is CopyState.LOADED:
            self.cache.policy.touch(event.model_id, used_ms)
        else:
            copy.used_ms = max(copy.used_ms, used_ms)
            copy.uses += 1

    def estimated(self, copy: Copy, size_bytes: int, now_ms: int, actions: list[Action]) -> None:
        if copy.state is not CopyState.QUEUED or copy.estimated:
            raise IllegalMove(f"nobody asked for a size: {copy!r}")
        if copy.doomed:
            self._drop(copy, now_ms, actions)
            return
        copy.estimated = True
        copy.size_bytes = self._view.measured(copy.model.model_id) or size_bytes
        if copy.size_bytes > self.limits.capacity_bytes:
            self.cache.move(copy, Move.FAIL, now_ms)
            self._failed(copy, self._too_large(copy.size_bytes), False, actions)

    def loaded(self, copy: Copy, size_bytes: int, now_ms: int, actions: list[Action]) -> None:
        """The load has ended well; `advance` corrects the books."""
        took_ms = now_ms - copy.since_ms
        self.cache.move(copy, Move.FINISH, now_ms)
        self._stats.loads_finished += 1
        self.costs.observe(copy.model.model_id, None, size_bytes, took_ms)
        copy.measured_bytes = size_bytes
        if copy.doomed:
            self._evict(copy, now_ms, actions)
        else:
            self._view.learn_size(copy.model.model_id, copy.model.created, size_bytes)

    def failed(self, copy: Copy, error: str, retryable: bool, now_ms: int, actions: list[Action]) -> None:
        if copy.estimated and copy.state is CopyState.QUEUED:
            raise IllegalMove(f"nobody is at work on it: {copy!r}")
        self.cache.move(copy, Move.FAIL, now_ms)
        self._failed(copy, error, retryable, actions)
        if copy.doomed:
            self._drop(copy, now_ms, actions)

    def unloaded(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        if not copy.unload_started:
            raise IllegalMove(f"nobody asked for an unload: {copy!r}")
        if copy.error:
            self.cache.move(copy, Move.REJECT, now_ms)
            self._failed(copy, copy.error, copy.retryable, actions)
        else:
            self.cache.move(copy, Move.UNLOADED, now_ms)
            actions.append(Wake(copy.model.model_id))

    def unwanted(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """The model was removed, or somebody asked for this copy to be given up."""
        match copy.state:
            case CopyState.LOADED | CopyState.SIZING:
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
        for copy in [c for c in self.cache.in_state(CopyState.FAILED) if c.expires_ms <= now_ms]:
            self._drop(copy, now_ms, actions)

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Let every copy go as far as bytes and slots allow: SIZING first, then WAITING, then the queue."""
        self._starved = False
        cache = self.cache
        # Those that turned out smaller first: the others may need what they give back.
        for copy in sorted(cache.in_state(CopyState.SIZING), key=_excess_bytes):
            self._settle(copy, now_ms, actions)
        if cache.count(CopyState.SIZING):
            return  # more is in memory than the books say: start and promise nothing until they agree
        for copy in list(cache.in_state(CopyState.WAITING)):
            if copy.size_bytes <= cache.free_bytes:
                self._load(copy, now_ms, actions)
        slots = self.limits.load_slots - cache.count(CopyState.WAITING, CopyState.LOADING)
        if slots > 0:
            self._promise(slots, now_ms, actions)

    def _promise(self, slots: int, now_ms: int, actions: list[Action]) -> None:
        """Take copies from the queue in order of arrival. One for which pins and loads leave no room is overtaken by
        smaller ones, so that it does not hold up the pod."""
        no_room_for = self.limits.capacity_bytes + 1
        for copy in [c for c in self.cache.in_state(CopyState.QUEUED) if c.estimated]:
            if copy.size_bytes >= no_room_for or not self._make_room(copy.size_bytes, now_ms, actions):
                no_room_for = min(no_room_for, copy.size_bytes)
                if now_ms - copy.since_ms >= self.limits.queue_patience_ms:
                    copy.no_room = True
                    self.cache.move(copy, Move.FAIL, now_ms)
                    self._failed(copy, f"no room for {copy.size_bytes} bytes: all is in use", True, actions)
                continue
            self.cache.move(copy, Move.PROMISE, now_ms)
            if copy.size_bytes <= self.cache.free_bytes:
                self._load(copy, now_ms, actions)
            slots -= 1
            if slots == 0:
                return

    def _failed(self, copy: Copy, error: str, retryable: bool, actions: list[Action]) -> None:
        """Keep a failure in mind and tell of it."""
        self._stats.loads_failed += 1
        expiry_ms = self.limits.retryable_expiry_ms if retryable else self.limits.failure_expiry_ms
        copy.error, copy.retryable, copy.size_bytes = error, retryable, 0
        copy.expires_ms = copy.since_ms + expiry_ms
        if not copy.doomed:
            actions += (Publish(self.record(copy)), Wake(copy.model.model_id))

    def _load(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.START, now_ms)
        actions.append(StartLoad(copy.model))

    def _settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Correct the books of a loaded copy; one that turned out larger may have to wait for evictions, or to go."""
        excess = _excess_bytes(copy)
        if copy.measured_bytes > self.limits.capacity_bytes:
            copy.error, copy.retryable = self._too_large(copy.measured_bytes), False
            self._evict(copy, now_ms, actions)
        elif self._make_room(excess, now_ms, actions):
            if excess <= self.cache.free_bytes:
                copy.reload_ms = self.costs.reload_ms(copy.model.model_id, None, copy.measured_bytes)
                copy.slo_ms = copy.model.slo_ms or self.limits.slo_ms
                self.cache.move(copy, Move.SETTLE, now_ms)
                actions += (Publish(self.record(copy)), Wake(copy.model.model_id))
        elif now_ms - copy.since_ms >= self.limits.room_patience_ms:
            # Pins hold the room, or other copies that turned out larger and wait for this one's: it gives way.
            copy.error = (
                f"loaded as {copy.measured_bytes} bytes instead of {copy.size_bytes}, for which there is no room"
            )
            copy.retryable = copy.no_room = True
            self._evict(copy, now_ms, actions)

    def _make_room(self, need_bytes: int, now_ms: int, actions: list[Action]) -> bool:
        """Evict until `need_bytes` can be promised; False: pins and loads hold too much."""
        need_bytes -= self.limits.capacity_bytes - self.cache.committed_bytes
        victims = self.cache.victims(need_bytes, now_ms)
        if victims is None:
            self._starved = True
            return False
        for victim in victims:
            self._stats.evictions += 1
            self.cache.policy.evict(victim.model.model_id)
            self._evict(victim, now_ms, actions)
        return True

    def _evict(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.EVICT, now_ms)
        actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))
        self._start_unload(copy, actions)

    def _start_unload(self, copy: Copy, actions: list[Action]) -> None:
        if copy.state is CopyState.UNLOADING and not copy.pins:
            copy.unload_started = True
            actions.append(StartUnload(copy.model.model_id))

    def _drop(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """A copy that holds no memory ceases to exist."""
        self.cache.move(copy, Move.DROP, now_ms)
        actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))

    def _too_large(self, size_bytes: int) -> str:
        return f"needs {size_bytes} bytes; this pod holds {self.limits.capacity_bytes} bytes"


def _excess_bytes(copy: Copy) -> int:
    """How much larger a SIZING copy is than the books say; negative: smaller."""
    return copy.measured_bytes - copy.size_bytes


_PUBLISHED: Final = {
    **dict.fromkeys(IN_FLIGHT, CopyStatus.LOADING),
    CopyState.LOADED: CopyStatus.LOADED,
    CopyState.FAILED: CopyStatus.FAILED,
}
