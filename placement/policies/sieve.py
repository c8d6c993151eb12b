"""SIEVE: a hand walks from the oldest copy to the newest and over again; it passes those used since it last came by,
and the first that was not has to go (Zhang et al.: SIEVE is Simpler than LRU, NSDI 2024).

Copies never move, so one that is asked for once sits right before the hand and goes soon: scans pass through. Touch
O(1), eviction O(n) over the pod's copies.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice

from placement.policies.base import Worth
from placement.records import ModelId


class Sieve:
    def __init__(self) -> None:
        self._visited: dict[ModelId, bool] = {}
        """In order of arrival."""
        self._used_ms: dict[ModelId, int] = {}
        self._hand: ModelId | None = None
        """The next one to look at; None: the oldest."""

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        self.remove(model_id)
        self._visited[model_id] = uses > 1
        self._used_ms[model_id] = used_ms

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        pass

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        if now_ms >= self._used_ms[model_id]:
            self._used_ms[model_id] = now_ms
            self._visited[model_id] = True

    def evict(self, model_id: ModelId) -> None:
        """The hand goes to it, around once more if it was passed, and on to the next."""
        path = self._from_hand()
        passed = path.index(model_id)
        for other in path if self._visited[model_id] else path[:passed]:
            self._visited[other] = False
        self._hand = model_id
        self.remove(model_id)

    def remove(self, model_id: ModelId) -> None:
        if model_id in self._visited:
            if self._hand == model_id:
                self._hand = next(islice(self._from_hand(), 1, None), None)
            del self._visited[model_id], self._used_ms[model_id]

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        path = self._from_hand()
        for lap in (False, True):
            yield from (model_id for model_id in path if self._visited[model_id] is lap)

    def oldest_used_ms(self) -> int:
        return next((self._used_ms[model_id] for model_id in self.coldest(0)), 0)

    def _from_hand(self) -> list[ModelId]:
        """All copies in the order in which the hand will come by."""
        path = list(self._visited)
        at = 0 if self._hand is None else path.index(self._hand)
        return path[at:] + path[:at]
