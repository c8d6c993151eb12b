"""Before a pod goes, what is in use there is loaded elsewhere; until then it serves on.

(ModelMesh takes its copy away first, and requests stall until another is loaded: mm#142.)
"""

from __future__ import annotations

from typing import Final

from placement.cache import Cache, Copy
from placement.lifecycle import CopyState
from placement.messages import Action
from placement.peers import Peers
from placement.records import ModelRecord
from placement.view import ClusterView

USED_MS: Final = 3_600_000
"""What was not used for so long is loaded again when it is asked for (ModelMesh: CUTOFF_AGE)."""
AT_ONCE: Final = 8


class Drain:
    """Of one pod."""

    def __init__(self, view: ClusterView, cache: Cache, peers: Peers) -> None:
        self._view = view
        self._cache = cache
        self._peers = peers

    def plan(self, now_ms: int, actions: list[Action]) -> None:
        """Ask for the copies that are to take the place of those here, what was used last first. A replacement goes
        where room is free, or where the coldest copy was used before it."""
        under_way = 0
        for copy, model in self._to_replace(now_ms):
            if not self._peers.to_come(model.model_id, now_ms):
                cold_ms = max(0, now_ms - copy.used_ms)
                wish = self._peers.ask(model, now_ms, cold_ms=cold_ms, used_ms=copy.used_ms)
                if wish is None:
                    continue
                actions.append(wish)
            under_way += 1
            if under_way == AT_ONCE:
                return

    def is_done(self, now_ms: int) -> bool:
        """Whether nothing more is on its way; what could be replaced is, once `plan` has been asked."""
        return not any(self._peers.to_come(model.model_id, now_ms) for _, model in self._to_replace(now_ms))

    def _to_replace(self, now_ms: int) -> list[tuple[Copy, ModelRecord]]:
        found: list[tuple[Copy, ModelRecord]] = []
        for copy in self._cache.in_state(CopyState.LOADED):
            model = self._view.models.get(copy.model.model_id)
            if model is None or self._peers.holders(model.model_id):
                continue
            if model.pinned or model.min_copies or now_ms - copy.used_ms < USED_MS:
                found.append((copy, model))
        return sorted(found, key=lambda pair: (-pair[0].used_ms, pair[1].model_id))
