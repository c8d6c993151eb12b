"""Least recently used: give up the copy whose last use lies furthest back.

A copy may enter at any age (a bulk registration must not push out what is in use), so the order is by time of use, not
by arrival. Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

from collections.abc import Generator

from placement.policies.base import Worth
from placement.policies.ordered import Ordered
from placement.records import ModelId


class Lru:
    def __init__(self) -> None:
        self._order = Ordered[int]()
        self._used_ms = self._order.keys

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        self._order.put(model_id, used_ms)

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        pass

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        if now_ms > self._used_ms[model_id]:
            self._used_ms[model_id] = now_ms

    def evict(self, model_id: ModelId) -> None:
        self._order.discard(model_id)

    def remove(self, model_id: ModelId) -> None:
        self._order.discard(model_id)

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        return self._order.ascending()

    def oldest_used_ms(self) -> int:
        first = self._order.first()
        return 0 if first is None else self._used_ms[first]
