"""The process's memory: how much a load took, and how to give it back after an unload.

A model's bytes are what malloc handed out to the thread that loaded it (`arenas`), or, where that is not told, the sum
of glibc's `mallinfo2` over all arenas. Either agrees with trimmed RSS within some percent for ONNX models. RSS itself
was off by up to 45 % for models below 10 MB (free lists are resident too) and by any amount while another model loads.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from types import TracebackType
from typing import ClassVar, Final, Self

from loaders.memory import arenas

_TRIM_INTERVAL_S: Final = 1.0
_NOISE_BYTES: Final = 8 << 20
"""What requests in flight may take, of all arenas."""
_OWN_NOISE_BYTES: Final = 64 << 10
"""What the loading thread may have in use for other things."""


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>, glibc 2.33 and later."""

    _fields_: ClassVar = [
        ("not_mmapped", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("limits", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("free", ctypes.c_size_t * 2),
    ]
    hblkhd: int
    """Bytes in mmapped blocks."""
    uordblks: int
    """Bytes in use in arenas."""


_libc: Final = ctypes.CDLL(None)
_mallinfo2: Final = getattr(_libc, "mallinfo2", None)
_malloc_trim: Final = getattr(_libc, "malloc_trim", None)
_mallopt: Final = getattr(_libc, "mallopt", None) if _mallinfo2 is not None else None  # glibc's, as are the numbers
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
if _mallinfo2 is not None:
    _mallinfo2.restype = _MallInfo2
if _malloc_trim is not None:
    _malloc_trim.argtypes = [ctypes.c_size_t]


def resident_bytes() -> int:
    """Resident set size of this process in bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def private_bytes() -> int:
    """Resident bytes without shared memory; 0 where there is no /proc."""
    try:
        with open("/proc/self/status", "rb") as status:
            told = dict(line.split(b":", 1) for line in status)
    except FileNotFoundError:
        return 0
    return sum(int(told[name].split()[0]) << 10 for name in (b"RssAnon", b"RssFile") if name in told)


def keep_message_buffers() -> None:
    """Have malloc reuse the memory of messages, which otherwise it maps and unmaps for each: requests of 600 KB cost a
    third less. Blocks that are larger, such as weights, are given back to the system at once as before."""
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        _mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def malloc_bytes() -> int:
    """Bytes malloc has handed out and not got back, in all threads; 0 where the C library does not tell."""
    if _mallinfo2 is None:
        return 0
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


class Change:
    """One load or unload in progress, as a context manager that gives back what is free when it ends.

    `measured` trusts malloc only if no other change overlapped and the figure is plausible. So bytes are right when
    large models load one by one, and no worse than the estimate otherwise; loads never wait for each other. Every
    loader wraps its own loads and unloads, so that they are not taken for another's.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _running: ClassVar[int] = 0
    _begun: ClassVar[int] = 0
    _frameworks: ClassVar[set[str]] = set()
    """Those that have been measured."""

    def __enter__(self) -> Self:
        with Change._lock:
            self._alone = Change._running == 0
            Change._running += 1
            Change._begun += 1
            self._number = Change._begun
        self._arena = arenas.own_arena()
        self._own_before = arenas.in_use()
        self._before = malloc_bytes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with Change._lock:
            Change._running -= 1
        give_back()

    def measured(self, estimate: int, framework: str = "") -> int:
        """Bytes taken since the change began, asked within it; `estimate` if that figure is not this load's alone. The
        first load of a framework takes what the framework itself needs: only for a large model is that little.

        Requests in flight move malloc's sum too (a 200 kB model loaded beside two busy ones came out at up to 660 kB):
        below `_NOISE_BYTES` only the thread's own arena tells (`_OWN_NOISE_BYTES`). Below half and above four times the
        estimate, the estimate is nearer to the truth.
        """
        own = self._own_bytes()
        taken = malloc_bytes() - self._before if own is None else own
        is_first = framework not in Change._frameworks
        Change._frameworks.add(framework)
        least = _NOISE_BYTES if own is None or is_first else _OWN_NOISE_BYTES
        alone = self._alone and self._number == Change._begun
        plausible = estimate >= least and estimate // 2 <= taken <= estimate * 4
        return taken if alone and plausible else estimate

    def _own_bytes(self) -> int | None:
        before, now = self._own_before, arenas.in_use()
        if self._arena is None or before is None or now is None or self._arena >= len(before.arenas):
            return None
        grown = now.arenas[self._arena] - before.arenas[self._arena]
        return grown + now.mapped - before.mapped


class _Trimmer:
    """At most one `malloc_trim` a second; a call that comes too early is made up for by one timer thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -_TRIM_INTERVAL_S
        self._promised = False

    def __call__(self) -> None:
        with self._lock:
            if self._promised:
                return
            wait_s = self._last + _TRIM_INTERVAL_S - time.monotonic()
            if wait_s > 0:
                timer = threading.Timer(wait_s, self._trim)
                timer.daemon = True
                timer.start()
                self._promised = True
                return
        self._trim()

    def _trim(self) -> None:
        with self._lock:
            self._last = time.monotonic()
            self._promised = False
        if _malloc_trim is not None:
            _malloc_trim(0)


give_back: Final = _Trimmer()
"""Return freed memory to the system, which glibc does not do by itself: 500 unloaded ONNX sessions still held 390 of
546 MB, 2 MB once trimmed; 40 loaded ones of 6.9 MB held 407 MB, 266 MB once trimmed of what their parser had used.

One trim a second at most (4 to 8 ms), and one always follows the last call. Does nothing where there is no glibc.
"""
