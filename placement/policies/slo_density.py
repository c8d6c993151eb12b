"""SLO density: give up the copy whose absence would cost the least per byte, in late answers.

    value = rate * (P(late) + LATENCY_WEIGHT * reload / slo) / size_bytes

A request that misses is late if its load's wait for a turn, the reload and the run take longer together than the SLO.
The second and third are the model's own; the first is the pod's: P(late) is the share of its last `WAITS` loads that
waited longer than this model could bear. So an idle link keeps what cannot be reloaded in time and lets the rest go,
and a busy one, where every miss is late, keeps as many models as it can. The second term counts the wait itself, and
that a long load holds up others.

The rate is the larger of two decayed counts: one remembers a habit, one follows a burst, which begins with a second
use. It outlives the copy. Frequency times cost over size is GreedyDual-Size-Frequency's (`gdsf`); counting in SLOs,
with a wait that is learned, is ours. `bench/README.md` has the figures; the decision on the default eviction policy
says what else was tried.

Touch O(1). The order is worked out afresh once a second, O(n log n); in between, what was used moves, O(log n) each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from math import exp
from typing import Final

from placement.policies.base import Worth
from placement.policies.ghosts import Ghosts
from placement.policies.ordered import Ordered
from placement.records import ModelId

FAST_MS: Final = 60_000
SLOW_MS: Final = 1_800_000
LATENCY_WEIGHT: Final = 0.2
WAITS: Final = 32
_STEP_MS: Final = 1_000


@dataclass(slots=True)
class _Rate:
    """Decayed counts of uses."""

    used_ms: int
    as_of_ms: int
    """Until when the counts have faded."""
    fast: float = 0.0
    slow: float = 0.0

    def use(self, now_ms: int, uses: int = 1) -> None:
        """They fade in steps: of a busy model, most uses are two additions."""
        elapsed_ms = now_ms - self.as_of_ms
        if elapsed_ms >= _STEP_MS:
            self.fast *= exp(-elapsed_ms / FAST_MS)
            self.slow *= exp(-elapsed_ms / SLOW_MS)
            self.as_of_ms = now_ms
        self.used_ms = max(self.used_ms, now_ms)
        self.fast += uses
        self.slow += uses

    def per_ms(self, now_ms: int) -> float:
        elapsed_ms = max(0, now_ms - self.as_of_ms)
        habit = self.slow * exp(-elapsed_ms / SLOW_MS) / SLOW_MS
        return max(habit, (self.fast * exp(-elapsed_ms / FAST_MS) - 1) / FAST_MS)


@dataclass(slots=True)
class _Entry:
    worth: Worth
    rate: _Rate


class SloDensity:
    def __init__(self) -> None:
        self._entries: dict[ModelId, _Entry] = {}
        self._ghosts = Ghosts[_Rate]()
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._sorted_waits: list[float] = []
        """As of `_as_of_ms`, like the order."""
        self._order = Ordered[float]()
        self._used: set[ModelId] = set()
        """Since the order was last looked at."""
        self._as_of_ms = 0

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        rate = self._ghosts.pop(model_id) or _Rate(used_ms, used_ms)
        rate.use(used_ms, uses)
        self._entries[model_id] = _Entry(worth, rate)
        self._waits.append(worth.waited_ms)
        self._order.put(model_id, self._value(model_id))

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        self._entries[model_id].worth = worth
        self._order.put(model_id, self._value(model_id))

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        rate = self._entries[model_id].rate
        if now_ms >= rate.used_ms:
            rate.use(now_ms)
            self._used.add(model_id)

    def evict(self, model_id: ModelId) -> None:
        self._ghosts.put(model_id, self._entries[model_id].rate, len(self._entries))
        self.remove(model_id)

    def remove(self, model_id: ModelId) -> None:
        self._entries.pop(model_id, None)
        self._order.discard(model_id)
        self._used.discard(model_id)

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        self._refresh(now_ms - now_ms % _STEP_MS)
        return self._order.ascending()

    def oldest_used_ms(self) -> int:
        self._refresh(self._as_of_ms)
        first = self._order.first()
        return 0 if first is None else self._entries[first].rate.used_ms

    def _refresh(self, as_of_ms: int) -> None:
        """Bring the order up to date: rates as of this time or of their last use, whichever is later."""
        if as_of_ms != self._as_of_ms:
            self._as_of_ms = as_of_ms
            self._sorted_waits = sorted(self._waits)
            self._order = Ordered()
            for model_id in self._entries:
                self._order.put(model_id, self._value(model_id))
        else:
            keys = self._order.keys
            for model_id in self._used:
                keys[model_id] = max(keys[model_id], self._value(model_id))
        self._used.clear()

    def _value(self, model_id: ModelId) -> float:
        worth = self._entries[model_id].worth
        late = self._late(worth.slo_ms - worth.run_ms - worth.reload_ms)
        cost = late + LATENCY_WEIGHT * worth.reload_ms / worth.slo_ms
        return self._rate(model_id) * cost / max(1, worth.size_bytes)

    def _rate(self, model_id: ModelId) -> float:
        return self._entries[model_id].rate.per_ms(self._as_of_ms)

    def _late(self, slack_ms: float) -> float:
        """The odds that a load waits longer than this for its turn."""
        waits = self._sorted_waits
        if slack_ms < 0:
            return 1.0
        return 1 - bisect_right(waits, slack_ms) / len(waits) if waits else 0.0
