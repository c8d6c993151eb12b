"""Host memory as a device: arena and slab are anonymous memory; copies are made by the thread that asks for them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loaders.base import Tensor
from loaders.memory.device import DeviceFull, DeviceMemory, Move, Span, placed
from loaders.memory.layout import Layout


class Done:
    """Copies that have ended well."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class HostDevice:
    """Copies with memmove, which takes no interpreter lock. Shared memory, so that other processes that this one forks
    see the same bytes."""

    def __init__(self, arena_bytes: int, slab_bytes: int) -> None:
        """
        Raises:
            DeviceFull: the system refuses the memory.
        """
        self.arena_bytes, self.slab_bytes = arena_bytes, slab_bytes
        self._arena, self.arena = anonymous(arena_bytes)
        self._slab, self.slab = anonymous(slab_bytes)

    def up(self, moves: Sequence[Move]) -> Done:
        for source, target, size_bytes in moves:
            ctypes.memmove(self._arena + target, self._slab + source, size_bytes)
        return Done()

    def down(self, moves: Sequence[Move]) -> Done:
        for source, target, size_bytes in moves:
            ctypes.memmove(self._slab + target, self._arena + source, size_bytes)
        return Done()

    def shift(self, moves: Sequence[Move], in_slab: bool) -> Done:
        memory = self._slab if in_slab else self._arena
        for source, target, size_bytes in moves:
            ctypes.memmove(memory + target, memory + source, size_bytes)
        return Done()

    def views(self, layout: Layout, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        """Read-only: one tensor's bytes may be several models'."""
        from loaders.memory.arrays import WEIGHT_DTYPES

        arena = np.frombuffer(self.arena, np.uint8)
        arena.flags.writeable = False
        return {
            place.name: arena[at : at + place.size_bytes].view(WEIGHT_DTYPES[place.datatype]).reshape(place.shape)
            for place, at in placed(layout, spans)
        }

    def memory(self) -> DeviceMemory:
        """Of the machine."""
        pages, free, page_bytes = (os.sysconf(f"SC_{name}") for name in ("PHYS_PAGES", "AVPHYS_PAGES", "PAGE_SIZE"))
        return DeviceMemory(pages * page_bytes, (pages - free) * page_bytes)

    def close(self) -> None:
        """The system takes the memory back when the last view of it is gone."""
        self.arena = self.slab = memoryview(b"")


def anonymous(size_bytes: int, flags: int = mmap.MAP_SHARED) -> tuple[int, memoryview]:
    """Address and bytes of new memory, zeros, that takes pages when they are written.

    Raises:
        DeviceFull: the system refuses it.
    """
    try:
        mapped = mmap.mmap(-1, max(size_bytes, 1), flags)
    except (OSError, OverflowError, ValueError) as error:
        raise DeviceFull(f"host memory of {size_bytes} bytes cannot be had: {error}") from error
    view: Any = ctypes.c_char.from_buffer(mapped)
    return ctypes.addressof(view), memoryview(mapped)[:size_bytes]
