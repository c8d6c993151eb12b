"""An order of copies by a key that uses only ever raise: what LRU, LRU-K, LFU and GreedyDual have in common.

A heap holds one entry per copy with the key it had when it was pushed; raising a key only writes it down, and stale
entries are pushed down again when they surface. Raise O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Any, Final, Generic, TypeVar

from placement.policies.base import Worth
from placement.records import ModelId

K = TypeVar("K", bound=Any)


class Ordered(Generic[K]):
    """Copies by key; equal keys by order of arrival."""

    def __init__(self) -> None:
        self.keys: Final[dict[ModelId, K]] = {}
        """Live. A key may be replaced by a larger one; `put` makes it smaller."""
        self._heap: list[tuple[K, int, ModelId]] = []
        self._arrivals: dict[ModelId, int] = {}
        self._next_arrival = 0

    def put(self, model_id: ModelId, key: K) -> None:
        """A copy arrives, or its key is to be a smaller one."""
        self._next_arrival += 1
        self.keys[model_id] = key
        self._arrivals[model_id] = self._next_arrival
        heapq.heappush(self._heap, (key, self._next_arrival, model_id))
        if len(self._heap) > 2 * len(self.keys) + 64:  # mostly entries of copies that are gone
            self._heap = [(self.keys[m], a, m) for _, a, m in self._heap if self._arrivals.get(m) == a]
            heapq.heapify(self._heap)

    def discard(self, model_id: ModelId) -> None:
        if model_id in self.keys:
            del self.keys[model_id], self._arrivals[model_id]

    def ascending(self) -> Generator[ModelId, None, None]:
        """The smallest first. Keys must not change while somebody walks, who closes it."""
        walked: list[tuple[K, int, ModelId]] = []
        try:
            while self._settle():
                walked.append(heapq.heappop(self._heap))
                yield walked[-1][2]
        finally:
            for entry in walked:
                heapq.heappush(self._heap, entry)

    def first(self) -> ModelId | None:
        """The one with the smallest key."""
        return self._heap[0][2] if self._settle() else None

    def _settle(self) -> bool:
        """Bring a true entry to the top; False when there is none."""
        while self._heap:
            key, arrival, model_id = self._heap[0]
            if self._arrivals.get(model_id) != arrival:
                heapq.heappop(self._heap)
            elif self.keys[model_id] != key:
                heapq.heapreplace(self._heap, (self.keys[model_id], arrival, model_id))
            else:
                return True
        return False


class OrderedPolicy(Generic[K]):
    """An `EvictionPolicy` that gives up the copy with the smallest key; worth and evictions teach it nothing unless it
    says otherwise."""

    def __init__(self) -> None:
        self._order = Ordered[K]()

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        pass

    def evict(self, model_id: ModelId) -> None:
        self.remove(model_id)

    def remove(self, model_id: ModelId) -> None:
        self._order.discard(model_id)

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        return self._order.ascending()

    def oldest_used_ms(self) -> int:
        first = self._order.first()
        return 0 if first is None else self._last_used_ms(first)

    def _last_used_ms(self, model_id: ModelId) -> int:
        raise NotImplementedError
