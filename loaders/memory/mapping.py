"""Files mapped into memory, read-only, without the interpreter lock while the system works and without a file that is
kept open. Python's own `mmap` holds the lock while it reads in (276 ms for 440 MB from disk) and while it unmaps, which
would stop every request of the pod, and keeps a descriptor for each mapping.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import lru_cache
from typing import Any, Final

import numpy as np

from loaders.memory.arrays import Run

_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ: Final = 22

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_file(number: int, size_bytes: int, *, own: bool = False) -> Run:
    """The first bytes of an open file, which may be closed then; unmapped when the last view of them is gone.

    `own`: they may be written to, and pages that are become the process's own. Some frameworks insist on that.

    Raises:
        OSError
    """
    access, kind = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE) if own else (mmap.PROT_READ, mmap.MAP_SHARED)
    address = _libc.mmap(None, size_bytes, access, kind, number, 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    buffer = _bytes_type(size_bytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, size_bytes).atexit = False  # a thread may still run on it
    mapped = np.frombuffer(buffer, np.uint8)
    mapped.flags.writeable = own
    return mapped


def populate(mapped: Run) -> None:
    """Have the system map all pages at once, those it must read first included. Where it cannot (Linux before 5.14)
    nothing is lost but time: they are read when they are touched."""
    _libc.madvise(mapped.ctypes.data, mapped.nbytes, _MADV_POPULATE_READ)


@lru_cache(maxsize=256)
def _bytes_type(size_bytes: int) -> Any:
    return ctypes.c_ubyte * size_bytes
