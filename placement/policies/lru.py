"""Least recently used: give up the copy whose last use lies furthest back.

A copy may enter at any age (a bulk registration must not push out what is in use), so the order is by timestamp, not
by arrival. A heap holds one entry per copy with the timestamp it had when it was pushed; a touch only writes the new
timestamp, and stale entries are pushed down again when they surface. Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator

from placement.records import ModelId


class Lru:
    def __init__(self) -> None:
        self._used_ms: dict[ModelId, int] = {}
        self._heap: list[tuple[int, int, ModelId]] = []
        self._sequence: dict[ModelId, int] = {}
        self._next_sequence = 0

    def insert(self, model_id: ModelId, size_bytes: int, used_ms: int) -> None:
        self._next_sequence += 1
        self._used_ms[model_id] = used_ms
        self._sequence[model_id] = self._next_sequence
        heapq.heappush(self._heap, (used_ms, self._next_sequence, model_id))
        if len(self._heap) > 2 * len(self._used_ms) + 64:  # mostly entries of copies that are gone
            self._heap = [(self._used_ms[m], s, m) for _, s, m in self._heap if self._sequence.get(m) == s]
            heapq.heapify(self._heap)

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        if now_ms > self._used_ms[model_id]:
            self._used_ms[model_id] = now_ms

    def remove(self, model_id: ModelId) -> None:
        self._used_ms.pop(model_id, None)
        self._sequence.pop(model_id, None)

    def coldest(self) -> Generator[ModelId, None, None]:
        walked: list[tuple[int, int, ModelId]] = []
        try:
            while self._settle():
                walked.append(heapq.heappop(self._heap))
                yield walked[-1][2]
        finally:
            for entry in walked:
                heapq.heappush(self._heap, entry)

    def oldest_used_ms(self) -> int:
        return self._heap[0][0] if self._settle() else 0

    def _settle(self) -> bool:
        """Bring a true entry to the top; False when there is none."""
        while self._heap:
            used_ms, sequence, model_id = self._heap[0]
            if self._sequence.get(model_id) != sequence:
                heapq.heappop(self._heap)
            elif self._used_ms[model_id] != used_ms:
                heapq.heapreplace(self._heap, (self._used_ms[model_id], sequence, model_id))
            else:
                return True
        return False
