"""Slots for fetches from stores. Whose turn it is when one is free, the engine decides (`placement.link`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from placement.records import ModelId


class Fetches:
    """So many at once; the others wait here."""

    def __init__(self, slots: int, next_fetch: Callable[[Collection[ModelId]], ModelId]) -> None:
        self._free = slots
        self._next_fetch = next_fetch
        self._waiting: dict[ModelId, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def turn(self, model_id: ModelId) -> AsyncIterator[None]:
        """Hold a slot. A model's copy has one fetch at a time."""
        if self._free:
            self._free -= 1
        else:
            granted = self._waiting[model_id] = asyncio.get_running_loop().create_future()
            try:
                await granted
            except asyncio.CancelledError:
                if self._waiting.pop(model_id, None) is None:  # it was granted just before
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        if self._waiting:
            self._waiting.pop(self._next_fetch(self._waiting.keys())).set_result(None)
        else:
            self._free += 1
