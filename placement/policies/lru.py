"""Least recently used: give up the copy whose last use lies furthest back.

A copy may enter at any age (a bulk registration must not push out what is in use), so the order is by time of use, not
by arrival. Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

from placement.policies.base import Worth
from placement.policies.ordered import OrderedPolicy
from placement.records import ModelId


class Lru(OrderedPolicy[int]):
    def __init__(self) -> None:
        super().__init__()
        self._used_ms = self._order.keys

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        self._order.put(model_id, used_ms)

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        if now_ms > self._used_ms[model_id]:
            self._used_ms[model_id] = now_ms

    def _last_used_ms(self, model_id: ModelId) -> int:
        return self._used_ms[model_id]
