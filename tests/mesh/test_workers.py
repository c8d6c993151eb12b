"""Threads that run models."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mesh.in_line import Pace
from mesh.workers import Workers
from placement.records import Priority

TIMEOUT_S = 30.0


async def test_results_and_errors_cross_over() -> None:
    workers = Workers(2, asyncio.get_running_loop())

    def fail() -> int:
        raise KeyError("x")

    jobs = [workers.submit(lambda n=n: n, Pace()) for n in range(1_000)]  # type: ignore[misc]
    assert await asyncio.gather(*(job.future for job in jobs)) == list(range(1_000))
    with pytest.raises(KeyError):
        await workers.submit(fail, Pace()).future
    workers.close()


async def test_work_is_withdrawn_or_awaited() -> None:
    """A thread cannot be stopped; what it has not begun is never done."""
    workers = Workers(1, asyncio.get_running_loop())
    begun, gate, ended = threading.Event(), threading.Event(), asyncio.Event()

    def block() -> None:
        begun.set()
        assert gate.wait(TIMEOUT_S)

    running = workers.submit(block, Pace())
    done: list[int] = []
    waiting = workers.submit(lambda: done.append(1), Pace())
    assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
    assert workers.is_queueing
    assert not running.withdraw()
    assert waiting.withdraw()
    assert not waiting.withdraw()
    running.future.cancel()
    running.on_end(ended.set)
    assert not running.ended
    gate.set()
    async with asyncio.timeout(TIMEOUT_S):
        await ended.wait()
    assert running.ended
    workers.close()
    assert done == []


async def test_work_goes_by_class() -> None:
    """High before normal before low, each in order of arrival; one turn in eight is the last class's."""
    workers = Workers(1, asyncio.get_running_loop())
    gate, order = threading.Event(), list[str]()
    blocked = workers.submit(gate.wait, Pace())
    asked = [Priority.LOW] * 2 + [Priority.NORMAL] * 3 + [Priority.HIGH] * 4
    jobs = [workers.submit(lambda p=p: order.append(p.value), Pace(), p) for p in asked]  # type: ignore[misc]
    gate.set()
    await asyncio.gather(blocked.future, *(job.future for job in jobs))
    assert order == ["high"] * 4 + ["normal"] * 2 + ["low", "normal", "low"]
    workers.close()
