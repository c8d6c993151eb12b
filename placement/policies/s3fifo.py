"""S3-FIFO: three queues (Yang et al.: FIFO Queues are All You Need for Cache Eviction, SOSP 2023).

New copies enter a small queue that may take a tenth of the bytes. Those used more than once until they reach its end
move to the main queue; the others go, and are remembered in the ghost queue. Who comes back from there enters the main
queue at once. The main queue lets a copy pass once for each of its last uses, three at most. The paper counts
objects; models differ in size by five orders of magnitude, so these queues count bytes. Touch O(1), eviction O(n).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import takewhile
from typing import Final

from placement.policies.base import Worth
from placement.policies.ghosts import Ghosts
from placement.records import ModelId

SMALL_SHARE: Final = 0.1
MOST_USES: Final = 3

Queue = dict[ModelId, int]
"""Uses since arrival, or since the last lap in the main queue; the oldest first."""


class S3Fifo:
    def __init__(self) -> None:
        self._small: Queue = {}
        self._main: Queue = {}
        self._ghosts = Ghosts[bool](per_copy=1)
        self._sizes: dict[ModelId, int] = {}
        self._used_ms: dict[ModelId, int] = {}

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        self.remove(model_id)
        queue = self._main if self._ghosts.pop(model_id) else self._small
        queue[model_id] = min(MOST_USES, max(0, uses - 1))
        self._sizes[model_id] = worth.size_bytes
        self._used_ms[model_id] = used_ms

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        self._sizes[model_id] = worth.size_bytes

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        if now_ms >= self._used_ms[model_id]:
            self._used_ms[model_id] = now_ms
            queue = self._small if model_id in self._small else self._main
            if queue[model_id] < MOST_USES:
                queue[model_id] += 1

    def evict(self, model_id: ModelId) -> None:
        """The queues move until it comes out; those that came out before it are in use, and enter the main queue."""
        new = model_id in self._small
        walk = _walk(self._small, self._main, self._sizes)
        self._main |= dict.fromkeys(list(takewhile(lambda out: out != model_id, walk)), 0)
        if new:
            self._ghosts.put(model_id, True, len(self._sizes))
        self.remove(model_id)

    def remove(self, model_id: ModelId) -> None:
        self._small.pop(model_id, None)
        self._main.pop(model_id, None)
        self._sizes.pop(model_id, None)
        self._used_ms.pop(model_id, None)

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        return _walk(self._small.copy(), self._main.copy(), self._sizes)

    def oldest_used_ms(self) -> int:
        return next((self._used_ms[model_id] for model_id in self.coldest(0)), 0)


def _walk(small: Queue, main: Queue, sizes: Mapping[ModelId, int]) -> Generator[ModelId, None, None]:
    """Let the queues move and tell what comes out of them."""
    small_bytes = sum(sizes[model_id] for model_id in small)
    all_bytes = small_bytes + sum(sizes[model_id] for model_id in main)
    while small or main:
        from_small = not main or (bool(small) and small_bytes >= SMALL_SHARE * all_bytes)
        queue = small if from_small else main
        model_id = next(iter(queue))
        uses = queue.pop(model_id)
        if from_small:
            small_bytes -= sizes[model_id]
        if from_small and uses > 1:
            main[model_id] = 0
        elif not from_small and uses > 0:
            main[model_id] = uses - 1
        else:
            all_bytes -= sizes[model_id]
            yield model_id
