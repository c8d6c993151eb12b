"""LRU-2: give up the copy whose use before the last lies furthest back (O'Neil, O'Neil, Weikum: The LRU-K Page
Replacement Algorithm, SIGMOD 1993).

A model asked for once goes before any that was asked for twice, so that a scan over many models pushes out none that is
in regular use. Uses within `CORRELATED_MS` are one (the paper's Correlated Reference Period): a burst is no habit.
When a copy goes, its last use is remembered (the Retained Information). Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

from typing import Final

from placement.policies.base import Worth
from placement.policies.ghosts import Ghosts
from placement.policies.ordered import OrderedPolicy
from placement.records import ModelId

CORRELATED_MS: Final = 1_000


class Lru2(OrderedPolicy[tuple[int, int]]):
    def __init__(self) -> None:
        super().__init__()
        self._uses = self._order.keys
        """(the use before the last, 0: there was none; the last use), ms; of uses that count."""
        self._ghosts = Ghosts[int]()

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        before_ms = self._ghosts.pop(model_id) or 0
        self._order.put(model_id, (before_ms if before_ms + CORRELATED_MS <= used_ms else 0, used_ms))

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        last_ms = self._uses[model_id][1]
        if now_ms - last_ms >= CORRELATED_MS:
            self._uses[model_id] = (last_ms, now_ms)

    def evict(self, model_id: ModelId) -> None:
        self._ghosts.put(model_id, self._uses[model_id][1], len(self._uses))
        self.remove(model_id)

    def _last_used_ms(self, model_id: ModelId) -> int:
        return self._uses[model_id][1]
