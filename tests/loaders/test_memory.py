"""`loaders.memory`: figures of glibc, and memory that really goes back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from loaders.memory import process
from loaders.memory.process import Change, resident_bytes

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not process.malloc_bytes(), reason="the C library is not glibc >= 2.33")


def test_resident_bytes_are_the_kernels() -> None:  # proc(5)
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert resident_bytes() == pytest.approx(int(told.split()[1]) * 1024, rel=0.1)


@pytest.mark.parametrize("size", [10 * MIB, 50 * MIB])
def test_a_change_measures_what_it_took(size: int) -> None:
    with Change() as change:
        taken = np.empty(size, np.uint8)
        assert change.measured(size + size // 3) == pytest.approx(taken.nbytes, rel=0.05)


def test_implausible_figures_give_way_to_the_estimate() -> None:
    with Change() as change:
        taken = np.ones(40 * MIB, np.uint8)
        for estimate in (100, 7 * MIB, 9 * MIB, 90 * MIB):  # the first two: too small to tell from requests
            assert change.measured(estimate) == estimate
        assert change.measured(50 * MIB) < 41 * MIB
    assert taken.all()


def test_overlapping_changes_fall_back_to_the_estimate() -> None:
    with Change() as first:
        with Change() as second:
            taken = np.ones(10 * MIB, np.uint8)
            assert second.measured(11 * MIB) == 11 * MIB
        assert first.measured(12 * MIB) == 12 * MIB  # also after the other one is over
    with Change() as later:
        again = np.ones(10 * MIB, np.uint8)
        assert later.measured(12 * MIB) < 11 * MIB
    assert taken.all()
    assert again.all()


def test_trims_at_most_once_per_interval_and_once_after_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[float] = []
    done = threading.Event()

    def trim(pad: int) -> None:
        trims.append(time.monotonic())
        if len(trims) == 2:
            done.set()

    monkeypatch.setattr(process, "_malloc_trim", trim)
    monkeypatch.setattr(process, "_TRIM_INTERVAL_S", 0.2)
    give_back = process._Trimmer()
    for _ in range(50):
        give_back()
    assert len(trims) == 1
    assert done.wait(5)
    assert trims[1] - trims[0] >= 0.19
