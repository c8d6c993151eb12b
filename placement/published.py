"""What a pod tells the registry of its copies: one record per model, of the copy or else of what a lower tier holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from placement.cache import Cache, Copy
from placement.holdings import Holding, Holdings, HoldState
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, CopyState
from placement.messages import Action, Publish, Unpublish
from placement.records import CopyRecord, CopyStatus, ModelId, PodId, Tier


class Published:
    """Level-based: what is told follows from the books, whatever has led there."""

    def __init__(self, pod_id: PodId, cache: Cache, lower: Mapping[Tier, Holdings]) -> None:
        self._pod_id = pod_id
        self._cache = cache
        self._lower = lower

    def record(self, model_id: ModelId) -> CopyRecord | None:
        """What the registry should hold of a model here; None: nothing."""
        copy = self._copy(model_id)
        if copy is not None:
            return self._copy_record(copy)
        for holdings in self._lower.values():
            holding = holdings.entries.get(model_id)
            if holding is not None and holding.state is HoldState.HELD:
                return self._held_record(holding)
        return None

    def tell(self, model_id: ModelId, actions: list[Action]) -> None:
        """The model's copy has changed."""
        record = self.record(model_id)
        actions.append(Unpublish(model_id) if record is None else Publish(record))

    def tell_held(self, model_id: ModelId, actions: list[Action]) -> None:
        """What lower tiers hold of the model has changed, which is of interest while there is no copy."""
        if self._copy(model_id) is None:
            self.tell(model_id, actions)

    def _copy(self, model_id: ModelId) -> Copy | None:
        copy = self._cache.copies.get(model_id)
        return None if copy is None or copy.doomed or copy.state not in _STATUS else copy

    def _copy_record(self, copy: Copy) -> CopyRecord:
        return CopyRecord(
            model_id=copy.model.model_id,
            pod_id=self._pod_id,
            status=_STATUS[copy.state],
            since_ms=copy.since_ms,
            size_bytes=copy.size_bytes,
            error=copy.error,
            retryable=copy.retryable,
            no_room=copy.no_room,
            registration=copy.model.created,
            used_ms=copy.used_ms if copy.state is CopyState.LOADED else 0,
            busy_percent=copy.busy_percent,
        )

    def _held_record(self, holding: Holding) -> CopyRecord:
        return CopyRecord(
            model_id=holding.model.model_id,
            pod_id=self._pod_id,
            status=CopyStatus.HELD,
            since_ms=holding.since_ms,
            size_bytes=holding.size_bytes,
            registration=holding.model.created,
            tier=holding.tier,
            used_ms=holding.used_ms,
        )


_STATUS: Final = {
    **dict.fromkeys(IN_FLIGHT, CopyStatus.LOADING),
    CopyState.LOADED: CopyStatus.LOADED,
    **dict.fromkeys(HAS_FAILED, CopyStatus.FAILED),
}
