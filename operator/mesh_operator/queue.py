"""Keys that are to be worked on, each by one worker at a time, now or later."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BACKOFF_S: Final = 0.5
MOST_BACKOFF_S: Final = 60.0


class WorkQueue(Generic[K]):
    """A key that is added while it is worked on is handed out again afterwards; one that waits is handed out once."""

    def __init__(self) -> None:
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        """In `_ready`."""
        self._busy: set[K] = set()
        self._again: set[K] = set()
        """Added while busy."""
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}

    def add(self, key: K) -> None:
        """Have the key worked on as soon as a worker is free."""
        self._cancel(key)
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_later(self, key: K, after_s: float) -> None:
        """Have it worked on after a while; what was said before of later is forgotten."""
        self._cancel(key)
        if key not in self._waiting and key not in self._again:
            self._timers[key] = asyncio.get_running_loop().call_later(after_s, self.add, key)

    def failed(self, key: K) -> None:
        """Work on it again, after a time that doubles with each failure."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self.add_later(key, min(MOST_BACKOFF_S, BACKOFF_S * 2 ** min(failures, 10)))

    def succeeded(self, key: K) -> None:
        self._failures.pop(key, None)

    async def take(self) -> K:
        """The next key; `done` has to follow."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._busy.add(key)
        return key

    def done(self, key: K) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        """No timer fires any more."""
        for key in list(self._timers):
            self._cancel(key)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._busy)

    def _cancel(self, key: K) -> None:
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
