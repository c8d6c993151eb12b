"""Which queued copies may load, and which loaded ones go for them."""

from __future__ import annotations

from placement.cache import Cache, Copy
from placement.lifecycle import CopyState, Move
from placement.limits import Limits
from placement.messages import Action
from placement.moves import Moves
from placement.stats import Stats


class Admission:
    """Promises room on one pod, and makes it."""

    def __init__(self, limits: Limits, cache: Cache, moves: Moves, stats: Stats) -> None:
        self.starved = False
        """Something waits for bytes that pins hold."""
        self._limits = limits
        self._cache = cache
        self._moves = moves
        self._stats = stats

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Let every copy go as far as bytes and slots allow: SIZING first, then WAITING, then the queue."""
        self.starved = False
        cache = self._cache
        # Those that turned out smaller first: the others may need what they give back.
        for copy in sorted(cache.in_state(CopyState.SIZING), key=_excess_bytes):
            self._settle(copy, now_ms, actions)
        if cache.count(CopyState.SIZING):
            return  # more is in memory than the books say: start and promise nothing until they agree
        for copy in list(cache.in_state(CopyState.WAITING)):
            if copy.size_bytes <= cache.free_bytes:
                self._moves.load(copy, now_ms, actions)
        slots = self._limits.load_slots - cache.count(CopyState.WAITING, CopyState.LOADING)
        if slots > 0:
            self._promise(slots, now_ms, actions)

    def _promise(self, slots: int, now_ms: int, actions: list[Action]) -> None:
        """Take copies from the queue in order of arrival. One for which pins and loads leave no room is overtaken by
        smaller ones, so that it does not hold up the pod."""
        no_room_for = self._limits.capacity_bytes + 1
        for copy in [c for c in self._cache.in_state(CopyState.QUEUED) if c.estimated]:
            if copy.size_bytes >= no_room_for or not self._make_room(copy.size_bytes, now_ms, actions):
                no_room_for = min(no_room_for, copy.size_bytes)
                if now_ms - copy.since_ms >= self._limits.queue_patience_ms:
                    copy.no_room = True
                    error = f"no room for {copy.size_bytes} bytes: all is in use"
                    self._moves.fail(copy, error, True, now_ms, actions)
                continue
            self._cache.move(copy, Move.PROMISE, now_ms)
            if copy.size_bytes <= self._cache.free_bytes:
                self._moves.load(copy, now_ms, actions)
            slots -= 1
            if slots == 0:
                return

    def _settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Correct the books of a loaded copy; one that turned out larger may have to wait for evictions, or to go."""
        excess = _excess_bytes(copy)
        if copy.measured_bytes > self._limits.capacity_bytes:
            copy.error, copy.retryable = self._moves.too_large(copy.measured_bytes), False
            self._moves.evict(copy, now_ms, actions)
        elif self._make_room(excess, now_ms, actions):
            if excess <= self._cache.free_bytes:
                self._moves.settle(copy, now_ms, actions)
        elif now_ms - copy.since_ms >= self._limits.room_patience_ms:
            # Pins hold the room, or other copies that turned out larger and wait for this one's: it gives way.
            copy.error = (
                f"loaded as {copy.measured_bytes} bytes instead of {copy.size_bytes}, for which there is no room"
            )
            copy.retryable = copy.no_room = True
            self._moves.evict(copy, now_ms, actions)

    def _make_room(self, need_bytes: int, now_ms: int, actions: list[Action]) -> bool:
        """Evict until `need_bytes` can be promised; False: pins and loads hold too much."""
        need_bytes -= self._limits.capacity_bytes - self._cache.committed_bytes
        victims = self._cache.victims(need_bytes, now_ms)
        if victims is None:
            self.starved = True
            return False
        for victim in victims:
            self._stats.evictions += 1
            self._cache.policy.evict(victim.model.model_id)
            self._moves.evict(victim, now_ms, actions)
        return True


def _excess_bytes(copy: Copy) -> int:
    """How much larger a SIZING copy is than the books say; negative: smaller."""
    return copy.measured_bytes - copy.size_bytes
