"""Moves of copies that have to be told: the books change, and the shell hears what it must do and say."""

from __future__ import annotations

from typing import Final

from placement.cache import Cache, Copy
from placement.costs import LoadCosts
from placement.lifecycle import IN_FLIGHT, CopyState, Move
from placement.limits import Limits
from placement.messages import Action, Publish, StartLoad, StartUnload, Unpublish, Wake
from placement.records import CopyRecord, CopyStatus, ModelId, PodId
from placement.stats import Stats


class Moves:
    """What can be done to a copy. Every method appends to `actions` what the shell must do."""

    def __init__(self, pod_id: PodId, limits: Limits, cache: Cache, costs: LoadCosts, stats: Stats) -> None:
        self.pod_id = pod_id
        self.cache = cache
        self._costs = costs
        self._limits = limits
        self._stats = stats

    def published(self, model_id: ModelId) -> CopyRecord | None:
        """A model's copy as the registry should tell it; None: it should not."""
        copy = self.cache.copies.get(model_id)
        return None if copy is None or copy.doomed or copy.state not in _PUBLISHED else self._record(copy)

    def publish(self, copy: Copy, actions: list[Action]) -> None:
        actions.append(Publish(self._record(copy)))

    def load(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.START, now_ms)
        actions.append(StartLoad(copy.model))

    def settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """It serves from now on."""
        copy.reload_ms = self._costs.reload_ms(copy.model.model_id, None, copy.measured_bytes)
        copy.slo_ms = copy.model.slo_ms or self._limits.slo_ms
        self.cache.move(copy, Move.SETTLE, now_ms)
        self.publish(copy, actions)
        actions.append(Wake(copy.model.model_id))

    def fail(self, copy: Copy, error: str, retryable: bool, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.FAIL, now_ms)
        self._failed(copy, error, retryable, actions)

    def evict(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """It does not serve any more, and goes as soon as nobody uses it."""
        self.cache.move(copy, Move.EVICT, now_ms)
        actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))
        self.start_unload(copy, actions)

    def start_unload(self, copy: Copy, actions: list[Action]) -> None:
        if copy.state is CopyState.UNLOADING and not copy.pins:
            copy.unload_started = True
            actions.append(StartUnload(copy.model.model_id))

    def unloaded(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Its bytes are free. One that was given up because there was no room for it is remembered as failed."""
        if copy.error:
            self.cache.move(copy, Move.REJECT, now_ms)
            self._failed(copy, copy.error, copy.retryable, actions)
        else:
            self.cache.move(copy, Move.UNLOADED, now_ms)
            actions.append(Wake(copy.model.model_id))

    def drop(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """A copy that holds no memory ceases to exist."""
        self.cache.move(copy, Move.DROP, now_ms)
        actions += (Unpublish(copy.model.model_id), Wake(copy.model.model_id))

    def too_large(self, size_bytes: int) -> str:
        return f"needs {size_bytes} bytes; this pod holds {self._limits.capacity_bytes} bytes"

    def _failed(self, copy: Copy, error: str, retryable: bool, actions: list[Action]) -> None:
        """Keep a failure in mind and tell of it."""
        self._stats.loads_failed += 1
        expiry_ms = self._limits.retryable_expiry_ms if retryable else self._limits.failure_expiry_ms
        copy.error, copy.retryable, copy.size_bytes = error, retryable, 0
        copy.expires_ms = copy.since_ms + expiry_ms
        if not copy.doomed:
            self.publish(copy, actions)
            actions.append(Wake(copy.model.model_id))

    def _record(self, copy: Copy) -> CopyRecord:
        return CopyRecord(
            model_id=copy.model.model_id,
            pod_id=self.pod_id,
            status=_PUBLISHED[copy.state],
            since_ms=copy.since_ms,
            size_bytes=copy.size_bytes,
            error=copy.error,
            retryable=copy.retryable,
            no_room=copy.no_room,
            registration=copy.model.created,
        )


_PUBLISHED: Final = {
    **dict.fromkeys(IN_FLIGHT, CopyStatus.LOADING),
    CopyState.LOADED: CopyStatus.LOADED,
    CopyState.FAILED: CopyStatus.FAILED,
}
