"""Moves of copies that have to be told: the books change, and the shell hears what it must do and say."""

from __future__ import annotations

from math import ceil
from typing import Final

from placement.cache import Cache, Copy
from placement.lifecycle import Move
from placement.limits import Limits
from placement.messages import Action, StartLoad, StartUnload, Wake
from placement.published import Published
from placement.stats import Stats
from placement.tiers import LowerTiers

GUARD: Final = 2.0
"""For how many times its reload what was loaded for requests does not go for a lesser one."""
MAX_GUARD_MS: Final = 2_000


class Moves:
    """What can be done to a copy. Every method appends to `actions` what the shell must do."""

    def __init__(self, limits: Limits, cache: Cache, tiers: LowerTiers, published: Published, stats: Stats) -> None:
        self.cache = cache
        self._limits = limits
        self._tiers = tiers
        self._published = published
        self._stats = stats

    def promise(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Its room on the device is promised; so is what its load will leave in lower tiers."""
        copy.waited_ms = now_ms - copy.since_ms
        self.cache.move(copy, Move.PROMISE, now_ms)
        self._tiers.promise_load(copy, now_ms, actions)
        self.start_load(copy, now_ms, actions)

    def start_load(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """If all that was promised to it is free."""
        if copy.size_bytes <= self.cache.free_bytes and self._tiers.may_start(copy):
            copy.waited_ms += now_ms - copy.since_ms
            self.cache.move(copy, Move.START, now_ms)
            self._tiers.start(copy, now_ms)
            source = None if copy.source is None else copy.source.tier
            actions.append(StartLoad(copy.model, source, {fill.tier: fill.size_bytes for fill in copy.fills}))

    def settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """It serves from now on."""
        copy.reload_ms = self._tiers.reload_ms(copy.model, copy.measured_bytes)
        if not copy.is_prefetch:
            copy.guarded_until_ms = now_ms + min(MAX_GUARD_MS, ceil(GUARD * copy.reload_ms))
        copy.slo_ms = copy.model.slo_ms or self._limits.slo_ms
        self.cache.move(copy, Move.SETTLE, now_ms)
        self._tell(copy, actions)

    def fail(self, copy: Copy, error: str, retryable: bool, now_ms: int, actions: list[Action]) -> None:
        self.cache.move(copy, Move.FAIL, now_ms)
        self._tiers.load_given_up(copy, not retryable, now_ms, actions)
        self._failed(copy, error, retryable, actions)

    def expire(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Its load takes too long: others get the slot, and who waits for it hears of that."""
        self.cache.move(copy, Move.EXPIRE, now_ms)
        self._stats.loads_overdue += 1
        copy.error, copy.retryable = f"not loaded after {self._limits.load_timeout_ms / 1000:g} s", True
        self._tell(copy, actions)

    def evict(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """It does not serve any more, and goes as soon as nobody uses it."""
        self.cache.move(copy, Move.EVICT, now_ms)
        self._tell(copy, actions)
        self._tiers.promise_unload(copy, now_ms, actions)
        self.start_unload(copy, now_ms, actions)

    def start_unload(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """If nobody uses it, and there is room below for what is to be kept of it."""
        if not copy.pins and not copy.unload_started and self._tiers.may_start(copy):
            copy.unload_started = True
            self._tiers.start(copy, now_ms)
            keep = copy.fills[0].tier if copy.fills else None
            actions.append(StartUnload(copy.model.model_id, keep))

    def unloaded(self, copy: Copy, kept: bool, now_ms: int, actions: list[Action]) -> None:
        """Its bytes are free. One that was given up because there was no room for it is remembered as failed."""
        if copy.error:
            self.cache.move(copy, Move.REJECT, now_ms)
            self._failed(copy, copy.error, copy.retryable, actions)
        else:
            self.cache.move(copy, Move.UNLOADED, now_ms)
            self._tiers.unload_ended(copy, kept, now_ms, actions)
            actions.append(Wake(copy.model.model_id))

    def drop(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """A copy that holds no memory ceases to exist."""
        self.cache.move(copy, Move.DROP, now_ms)
        self._tiers.load_given_up(copy, False, now_ms, actions)
        self._tell(copy, actions)

    def too_large(self, size_bytes: int) -> str:
        return f"needs {size_bytes} bytes; this pod holds {self._limits.capacity_bytes} bytes"

    def _failed(self, copy: Copy, error: str, retryable: bool, actions: list[Action]) -> None:
        """Keep a failure in mind and tell of it."""
        self._stats.loads_failed += 1
        expiry_ms = self._limits.retryable_expiry_ms if retryable else self._limits.failure_expiry_ms
        copy.error, copy.retryable, copy.size_bytes = error, retryable, 0
        copy.expires_ms = copy.since_ms + expiry_ms
        if not copy.doomed:
            self._tell(copy, actions)

    def _tell(self, copy: Copy, actions: list[Action]) -> None:
        """The registry and whoever waits."""
        self._published.tell(copy.model.model_id, actions)
        actions.append(Wake(copy.model.model_id))
