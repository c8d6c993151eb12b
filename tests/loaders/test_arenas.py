"""`loaders.memory.arenas`: malloc_info(3) of glibc, as the manual page has it."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from loaders.memory import arenas
from loaders.memory.process import Change, malloc_bytes

pytestmark = pytest.mark.skipif(arenas.in_use() is None, reason="the C library is not glibc")

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]


def test_the_sum_is_mallinfos() -> None:
    found = arenas.in_use()
    assert found is not None
    assert sum(found.arenas) + found.mapped == pytest.approx(malloc_bytes(), rel=0.02)


def test_a_load_is_measured_beside_other_threads() -> None:
    """What others take meanwhile, far more than it, is not counted."""
    begin, taken = threading.Event(), threading.Event()
    blocks: list[int] = []

    def other() -> None:
        assert begin.wait(10)
        blocks.extend(libc.malloc(50_000) for _ in range(100))
        taken.set()

    def load() -> int:
        with Change() as change:
            change.measured(0)  # so that the next one is not the first
            begin.set()
            assert taken.wait(10)
            mine = [libc.malloc(10_000) for _ in range(30)]
            measured = change.measured(400_000)
            for block in mine:
                libc.free(block)
            return measured

    with ThreadPoolExecutor(1) as busy, ThreadPoolExecutor(1) as loading:
        running = busy.submit(other)
        assert loading.submit(load).result() == pytest.approx(300_000, rel=0.1)
        running.result()
    for block in blocks:
        libc.free(block)


def test_too_little_to_tell_gives_way_to_the_estimate() -> None:
    with Change() as change:
        block = libc.malloc(30_000)
        assert change.measured(50_000) == 50_000
        libc.free(block)
