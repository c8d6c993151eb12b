"""Handlers that are driven by hand behave as they would in a task of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from mesh.h2_calls import Spare

TIMEOUT_S = 30.0


async def outcome(work: Callable[[], Coroutine[Any, Any, str]], *, settled: bool, cancel: bool = False) -> str:
    """What becomes of a handler; `settled`: the spare task has had its first turn before."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[str] = loop.create_future()
    spare: Spare[str] = Spare(loop)
    if settled:
        await asyncio.sleep(0)

    async def conduct(rest: Awaitable[str]) -> None:
        try:
            ended.set_result(await rest)
        except BaseException as error:
            ended.set_result(repr(error))

    def drive() -> None:
        coroutine = work()
        try:
            yielded = spare.step(coroutine)
        except StopIteration as done:
            ended.set_result(f"at once: {done.value}")
            spare.cancel()
        else:
            spare.take_over(coroutine, yielded, conduct)
            if cancel:
                spare.cancel()

    loop.call_soon(drive)
    async with asyncio.timeout(TIMEOUT_S):
        return await ended


async def at_once() -> str:
    async with asyncio.timeout(1):  # noqa: ASYNC100
        return "done"


async def later() -> str:
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(0.001))
    return "done"


async def out_of_time(seconds: float) -> str:
    try:
        async with asyncio.timeout(seconds):
            await asyncio.sleep(TIMEOUT_S)
    except TimeoutError:
        await asyncio.sleep(0.001)
        return "timed out"
    return "not timed out"


async def own_cancel() -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(TIMEOUT_S)
    return "not cancelled"


async def cleans_up() -> str:
    try:
        await asyncio.sleep(TIMEOUT_S)
    except asyncio.CancelledError:
        await asyncio.sleep(0.001)
        return "cleaned up"
    return "not cancelled"


@pytest.mark.parametrize("settled", [False, True])
async def test_handlers(settled: bool) -> None:
    assert await outcome(at_once, settled=settled) == "at once: done"
    assert await outcome(later, settled=settled) == "done"
    assert await outcome(lambda: out_of_time(0), settled=settled) == "timed out"
    assert await outcome(lambda: out_of_time(-1), settled=settled) == "timed out"
    assert await outcome(lambda: out_of_time(0.01), settled=settled) == "timed out"
    assert await outcome(own_cancel, settled=settled) == "CancelledError()"
    assert await outcome(cleans_up, settled=settled, cancel=True) == "cleaned up"
