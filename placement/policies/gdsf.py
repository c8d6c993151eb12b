"""GreedyDual-Size-Frequency: give up the copy with the least `L + uses * reload_ms / size_bytes` (Cherkasova: Improving
WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HP Labs 1998; the same idea keeps functions warm
in FaasCache, ASPLOS 2021).

L, the clock, is the value of the last one given up; it only grows, and a copy takes it up when it is used, so that
values age without being touched. With all uses counted as one this is Landlord (Young 1998), whose cost is within
k / (k - h + 1) of the optimum's. Touch O(1), eviction O(log n) amortised.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.policies.base import Worth
from placement.policies.ordered import OrderedPolicy
from placement.records import ModelId


@dataclass(slots=True)
class _Entry:
    cost_per_byte: float
    uses: int
    used_ms: int


class Gdsf(OrderedPolicy[float]):
    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0
        self._entries: dict[ModelId, _Entry] = {}

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        entry = self._entries[model_id] = _Entry(_cost_per_byte(worth), max(1, uses), used_ms)
        self._order.put(model_id, self.clock + entry.uses * entry.cost_per_byte)

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        entry = self._entries[model_id]
        value = self._order.keys[model_id] - entry.uses * entry.cost_per_byte
        entry.cost_per_byte = _cost_per_byte(worth)
        self._order.put(model_id, value + entry.uses * entry.cost_per_byte)

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        entry = self._entries[model_id]
        if now_ms >= entry.used_ms:
            entry.used_ms = now_ms
            entry.uses += 1
            self._order.keys[model_id] = self.clock + entry.uses * entry.cost_per_byte

    def evict(self, model_id: ModelId) -> None:
        self.clock = max(self.clock, self._order.keys[model_id])
        self.remove(model_id)

    def remove(self, model_id: ModelId) -> None:
        super().remove(model_id)
        self._entries.pop(model_id, None)

    def _last_used_ms(self, model_id: ModelId) -> int:
        return self._entries[model_id].used_ms


def _cost_per_byte(worth: Worth) -> float:
    return worth.reload_ms / max(1, worth.size_bytes)
