"""Two buffers at the end of a device's slab, through which bytes go that have no place in the host tier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from loaders.base import LoaderError
from loaders.memory.device import Copying, Device, Move
from loaders.memory.weights_index import Contents

BUFFER_BYTES: Final = 16 << 20
"""Of each of the two buffers of the slab through which files go to the device."""


class Source(Protocol):
    """Where a model's bytes come from: a `weights.WeightsFile`, or what a bench makes up."""

    @property
    def contents(self) -> Contents: ...

    def verify(self) -> None:
        """
        Raises:
            CorruptWeights: the bytes are not those that were written.
        """
        ...

    def read_into(self, target: memoryview, offset: int) -> None:
        """
        Raises:
            LoaderError: they cannot be read.
        """
        ...


class Buffers:
    """One is filled while the other is copied. One transfer at a time has them, others wait."""

    def __init__(self, device: Device, offset: int, size_bytes: int) -> None:
        self._device = device
        self._offsets = offset, offset + size_bytes
        self._size_bytes = size_bytes
        self._lock = threading.Lock()

    def up(self, source: Source, moves: Sequence[Move]) -> None:
        """Read those pieces of a run into the arena.

        Raises:
            LoaderError: from the source or the device; nothing is under way any more.
        """
        started: list[Copying | None] = [None, None]
        turn = 0
        with self._lock:
            try:
                for move in moves:
                    for done in range(0, move.size_bytes, self._size_bytes):
                        size_bytes = min(self._size_bytes, move.size_bytes - done)
                        at, before = self._offsets[turn], started[turn]
                        if before is not None:
                            before.wait()
                        source.read_into(self._device.slab[at : at + size_bytes], move.source + done)
                        started[turn] = self._device.up([Move(at, move.target + done, size_bytes)])
                        turn = 1 - turn
            except BaseException:
                for copying in filter(None, started):
                    with suppress(LoaderError):  # what is raised says why; but nobody may write to freed bytes
                        copying.wait()
                raise
            for copying in filter(None, started):
                copying.wait()

    def down(self, offset: int, size_bytes: int, take: Callable[[memoryview], None]) -> None:
        """Hand over what lies there in the arena, piece by piece.

        Raises:
            LoaderError: from the device.
        """
        at = self._offsets[0]
        with self._lock:
            for done in range(0, size_bytes, self._size_bytes):
                piece_bytes = min(self._size_bytes, size_bytes - done)
                self._device.down([Move(offset + done, at, piece_bytes)]).wait()
                take(self._device.slab[at : at + piece_bytes])
