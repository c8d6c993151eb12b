"""Which models run on the loop, with how many requests at once. Authority: mesh.in_line; ARCHITECTURE.md, Threads."""

from __future__ import annotations

import asyncio
import time

import pytest

from mesh import in_line
from mesh.in_line import FAST_S, SLOW_S, TURN_S, InLine, Pace

TIMEOUT_S = 30.0


def test_fast_models_come_in_line_and_slow_ones_leave() -> None:
    pace = Pace()
    for _ in range(8):
        assert not pace.in_line
        pace.measured(FAST_S / 2)
    assert pace.in_line
    pace.measured(SLOW_S * 2)
    assert pace.in_line  # the system may have been busy
    pace.measured(SLOW_S * 2)
    pace.measured(SLOW_S * 2)
    assert not pace.in_line
    for _ in range(70):
        pace.measured(FAST_S / 2)
        assert not pace.in_line
    pace.measured(FAST_S / 2)
    pace.measured(FAST_S / 2)
    assert pace.in_line


async def test_a_model_that_waits_for_another_process_never_comes_in_line() -> None:
    all_paces = InLine(asyncio.get_running_loop())
    all_paces.keep_out("m")
    for _ in range(100):
        all_paces.pace("m", 8).measured(FAST_S / 2)
    assert not all_paces.pace("m", 8).in_line
    all_paces.forget("m")
    for _ in range(100):
        all_paces.pace("m", 8).measured(FAST_S / 2)
    assert all_paces.pace("m", 8).in_line


def test_a_model_that_is_slow_every_other_time_stays_out() -> None:
    pace = Pace()
    for n in range(1_000):
        pace.measured(FAST_S * (n % 2 * 2))
        assert not pace.in_line


async def test_one_turn_has_a_bound() -> None:
    in_line = InLine(asyncio.get_running_loop())
    pace = in_line.pace("m", 100)
    assert pace is in_line.pace("m", 127)
    assert pace is not in_line.pace("m", 128)
    while in_line.has_time:
        in_line.run(pace, lambda: sum(range(5_000)))
    async with asyncio.timeout(TIMEOUT_S):
        while not in_line.has_time:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert in_line.longest_turn_s >= TURN_S
    assert in_line.runs > 0
    in_line.forget("m")
    assert in_line.pace("m", 100) is not pace


def test_a_model_that_looks_slow_gets_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second and one fast run; then after two, four, ... and never because of slow ones."""
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pace = Pace()
    pace.enter()
    for waits_s in (1, 2, 4, 8, 16, 32, 64, 64):
        while pace.in_line:
            pace.measured(SLOW_S * 2)
        now += waits_s - 0.1
        pace.measured(FAST_S / 2)
        assert not pace.in_line
        now += 0.2
        pace.measured(SLOW_S * 2)
        assert not pace.in_line
        pace.measured(FAST_S / 2)
        assert pace.in_line


async def test_batches_grow_while_that_is_sure_to_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    line = InLine(asyncio.get_running_loop())
    assert line.together("m", 100, 8)[0] == 0  # nothing is known
    line.pace("m", 100).enter()
    line.pace("m", 100).measured(FAST_S / 6)
    count, pace = line.together("m", 100, 5)
    assert (count, pace) == (4, line.pace("m", 400))  # unmeasured, twice as many each time
    for _ in range(8):
        pace.measured(FAST_S * 0.6)
    assert line.together("m", 100, 64)[0] == 4  # eight would be slow
    for _ in range(32):
        pace.measured(FAST_S / 5)
    count, larger = line.together("m", 100, 64)
    assert (count, larger) == (16, line.pace("m", 1_600))
    while larger.in_line:
        larger.measured(SLOW_S)
    assert line.together("m", 100, 64)[0] == 8
    now += 1.1
    assert line.together("m", 100, 64) == (16, larger)


async def test_the_longest_run_and_turn_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's bound: TURN_S and one run; whoever asks for more in that turn is told that there is no time."""
    monkeypatch.setattr(in_line, "TURN_S", 0.001)
    line = InLine(asyncio.get_running_loop())
    pace = Pace()
    line.ran(pace, 0.0007)
    assert line.has_time
    line.ran(pace, 0.0005)
    assert not line.has_time
    async with asyncio.timeout(TIMEOUT_S):
        while not line.has_time:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (line.longest_run_s, line.longest_turn_s) == (0.0007, pytest.approx(0.0012))
