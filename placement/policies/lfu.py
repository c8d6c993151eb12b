"""Least frequently used: give up the copy with the fewest uses, the one used longest ago among equals.

Counts outlive the copy ("perfect" LFU) as long as the model is remembered, and never fade: what was popular stays. A
yardstick, not a recommendation. Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

from placement.policies.base import Worth
from placement.policies.ghosts import Ghosts
from placement.policies.ordered import OrderedPolicy
from placement.records import ModelId


class Lfu(OrderedPolicy[tuple[int, int]]):
    def __init__(self) -> None:
        super().__init__()
        self._uses = self._order.keys
        """(number of uses, the last one's ms)."""
        self._ghosts = Ghosts[int]()

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        self._order.put(model_id, ((self._ghosts.pop(model_id) or 0) + uses, used_ms))

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        uses, last_ms = self._uses[model_id]
        if now_ms >= last_ms:
            self._uses[model_id] = (uses + 1, now_ms)

    def evict(self, model_id: ModelId) -> None:
        self._ghosts.put(model_id, self._uses[model_id][0], len(self._uses))
        self.remove(model_id)

    def _last_used_ms(self, model_id: ModelId) -> int:
        return self._uses[model_id][1]
