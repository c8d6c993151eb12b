"""Requests that wait for a thread, or for others, are run together. Authority: mesh.batcher; for delays and preferred
sizes Triton's docs/user_guide/batcher.md and MLServer's adaptive batching."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pytest

from loaders.base import InferError, Signature, Tensor, TensorSpec
from mesh.batch import MOST_ROWS
from mesh.batcher import Batcher
from mesh.errors import InvalidRequest, ModelFailed
from mesh.in_line import InLine, Pace
from mesh.resident import Resident
from mesh.settings import ModelSettings
from mesh.workers import Workers
from placement.cache import Copy
from placement.records import ModelRecord
from tests.mesh.pods import until

TIMEOUT_S: Final = 30.0
FAR_S: Final = 1e9
"""A delay or a deadline that no test waits for."""


class Model:
    """Doubles `x`, and tells how many rows there were; a run with 9900 in it waits for `gate`."""

    signature = Signature(
        (TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "FP32", (-1,))), "t"
    )
    size_bytes = 1
    waits = 0

    def __init__(self) -> None:
        self.runs: list[list[float]] = []
        """The first numbers of the rows of each run."""
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.spoilt = False

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        x = inputs["x"]
        self.runs.append([float(row[0]) for row in x if len(row)])
        if 9900 in x:
            self.begun.set()
            assert self.gate.wait(TIMEOUT_S)
        if 1300 in x:
            raise InferError("thirteen", bad_input=True)
        if self.spoilt and len(x) > 1:
            return dict.fromkeys(outputs, x[:1])
        return {name: 2 * x if name == "y" else x.sum(axis=1) for name in outputs}

    def unload(self) -> None: ...


class Bench:
    """A batcher, and a model on it."""

    def __init__(self, threads: int = 1, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.workers = Workers(threads, loop)
        self.in_line = InLine(loop)
        self.lost: list[Copy] = []
        self.short: list[Copy] = []
        self.batcher = Batcher(self.workers, self.in_line, self.pin, self.unpin, self.lost.append, self.short.append)
        self.copy = Copy(ModelRecord("m", "test", "", "", 0), since_ms=0, used_ms=0)
        self.model = Model()
        self.resident = Resident(self.model, ModelSettings(**settings))

    def pin(self, copy: Copy) -> None:
        copy.pins += 1

    def unpin(self, copy: Copy) -> None:
        copy.pins -= 1

    async def run(self, *values: float, outputs: Sequence[str] = ("y",), width: int = 1, left_s: float = FAR_S) -> Any:
        """What a request with these rows gets."""
        x = np.repeat(np.array(values, np.float32).reshape(-1, 1), width, axis=1)
        deadline = asyncio.get_running_loop().time() + left_s
        results = await self.batcher.run(self.copy, self.resident, {"x": x}, outputs, x.nbytes, deadline)
        return [results[name].tolist() for name in outputs]

    def start(self, *values: float, **how: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.run(*values, **how))

    async def known(self, **how: Any) -> None:
        """Return when requests of the kind may be run together."""
        kinds = len(self.resident.tried) + 1
        while len(self.resident.tried) < kinds or not all(self.resident.tried.values()):
            await asyncio.gather(self.run(1, **how), self.run(2, **how))
        self.model.runs.clear()

    async def held(self) -> asyncio.Task[Any]:
        """A request that keeps the thread busy until the gate opens."""
        task = self.start(9900, width=9)
        assert await asyncio.to_thread(self.model.begun.wait, TIMEOUT_S)
        self.model.runs.clear()
        return task


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Bench]]:
    monkeypatch.setattr(
        Pace, "measured", lambda pace, elapsed_s: setattr(pace, "typical_s", 0.001)
    )  # always in threads
    made: list[Bench] = []

    def bench(**settings: Any) -> Bench:
        made.append(Bench(**settings))
        return made[-1]

    async with asyncio.timeout(TIMEOUT_S):
        yield bench
        for each in made:
            each.model.gate.set()
            await until(lambda each=each: each.copy.pins == 0)  # type: ignore[misc]
            each.workers.close()


async def test_what_came_while_the_thread_was_busy_is_one_run(make: Callable[..., Bench]) -> None:
    bench = make()
    await bench.known()
    busy = await bench.held()
    waiting = [bench.start(1), bench.start(2, 3)]
    await asyncio.sleep(0)
    waiting += [bench.start(4), bench.start()]
    await asyncio.sleep(0.01)
    waiting.append(bench.start(5))
    await asyncio.sleep(0.01)
    bench.model.gate.set()
    assert list(await asyncio.gather(*waiting)) == [[[[2]]], [[[4], [6]]], [[[8]]], [[]], [[[10]]]]
    assert await busy == [[[19800] * 9]]
    assert sorted(bench.model.runs) == [[], [1, 2, 3, 4, 5]]


async def test_nobody_waits_for_others_while_a_thread_is_idle(make: Callable[..., Bench]) -> None:
    bench = make(threads=2)
    await bench.known()
    assert list(await asyncio.gather(*(bench.start(n) for n in range(5)))) == [[[[2 * n]]] for n in range(5)]
    assert sorted(bench.model.runs) == [[0, 2, 4], [1, 3]]


async def test_only_what_is_alike_is_run_together(make: Callable[..., Bench]) -> None:
    bench = make()
    await bench.known()
    await bench.known(width=2)
    await bench.known(outputs=("z", "y"))
    await bench.held()
    waiting = [bench.start(n, width=1 + n % 2, outputs=("z", "y") if n == 4 else ("y",)) for n in range(1, 6)]
    await asyncio.sleep(0.01)
    bench.model.gate.set()
    assert list(await asyncio.gather(*waiting)) == [[[[2, 2]]], [[[4]]], [[[6, 6]]], [[4], [[8]]], [[[10, 10]]]]
    assert sorted(bench.model.runs) == [[1, 3, 5], [2], [4]]


async def test_a_batch_has_at_most_max_batch_size_rows(make: Callable[..., Bench]) -> None:
    for settings, most in (({"max_batch_size": 4}, 4), ({}, MOST_ROWS)):
        bench = make(**settings)
        await bench.known()
        await bench.held()
        waiting = [bench.start(n) for n in range(most + 1)]
        await asyncio.sleep(0.01)
        bench.model.gate.set()
        assert list(await asyncio.gather(*waiting)) == [[[[2 * n]]] for n in range(most + 1)]
        assert [len(run) for run in bench.model.runs] == [most, 1]


async def test_a_request_that_fails_fails_alone(make: Callable[..., Bench]) -> None:
    bench = make()
    await bench.known()
    await bench.held()
    waiting = [bench.start(n) for n in (1, 1300, 2)]
    await asyncio.sleep(0.01)
    bench.model.gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert (answers[0], answers[2]) == ([[[2]]], [[[4]]])
    assert isinstance(answers[1], InvalidRequest)
    assert bench.model.runs == [[1, 1300, 2], [1], [1300], [2]]


async def test_a_model_that_gives_other_rows_after_all_is_not_batched_again(make: Callable[..., Bench]) -> None:
    bench = make()
    await bench.known()
    bench.model.spoilt = True
    await bench.held()
    waiting = [bench.start(1), bench.start(2)]
    await asyncio.sleep(0.01)
    bench.model.gate.set()
    assert list(await asyncio.gather(*waiting)) == [[[[2]]], [[[4]]]]
    assert bench.model.runs == [[1, 2], [1], [2]]
    assert not bench.resident.together


async def test_cancelled_requests_leave(make: Callable[..., Bench]) -> None:
    """The others go on; a batch of which nobody is left is never run, and holds no pin."""
    bench = make()
    await bench.known()
    busy = await bench.held()
    first, second, third = bench.start(1), bench.start(2), bench.start(3)
    alone = bench.start(4, width=2)
    never = bench.start(5, width=3)
    await asyncio.sleep(0)
    never.cancel()  # before it is sent to the threads
    await asyncio.sleep(0.01)
    second.cancel()
    alone.cancel()
    await asyncio.wait([second, alone, never])
    assert bench.copy.pins == 2  # the run under way, and the batch of two
    busy.cancel()
    await asyncio.wait([busy])
    assert bench.copy.pins == 2  # a thread cannot be stopped
    bench.model.gate.set()
    assert list(await asyncio.gather(first, third)) == [[[[2]]], [[[6]]]]
    assert bench.model.runs == [[1, 3]]
    await until(lambda: bench.copy.pins == 0)


async def test_a_model_that_exits(make: Callable[..., Bench]) -> None:
    """That ends neither the pod nor the wait of its requests."""
    bench = make()
    await bench.known()
    await bench.held()
    waiting = [bench.start(1), bench.start(2)]
    await asyncio.sleep(0.01)

    def broken(inputs: Any, outputs: Any) -> Any:
        raise SystemExit("no")

    bench.model.infer = broken  # type: ignore[method-assign]
    bench.model.gate.set()
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, ModelFailed)


async def test_enough_ends_the_wait(make: Callable[..., Bench]) -> None:
    bench = make(max_queue_delay_us=10_000_000, preferred_batch_sizes=(2, 4), max_batch_size=4)
    await bench.known()
    assert list(await asyncio.gather(bench.start(1), bench.start(2))) == [[[[2]]], [[[4]]]]
    assert bench.model.runs == [[1, 2]]
    waiting = [bench.start(n) for n in range(5)]
    await asyncio.wait(waiting[:4])
    assert bench.model.runs[1:] == [[0, 1, 2, 3]]
    assert not waiting[4].done()
    assert list(await asyncio.gather(bench.start(9), waiting[4])) == [[[[18]]], [[[8]]]]


async def test_nobody_waits_longer_than_the_delay_or_a_deadline(make: Callable[..., Bench]) -> None:
    bench = make(max_queue_delay_us=5_000)
    await bench.known()
    assert await bench.run(1) == [[[2]]]
    bench = make(max_queue_delay_us=10_000_000)
    await bench.known(left_s=5)
    patient = bench.start(1)
    await asyncio.sleep(0.01)
    assert not patient.done()
    assert await bench.run(2, left_s=5) == [[[4]]]  # and takes along who waits already
    assert await patient == [[[2]]]
    assert bench.model.runs == [[1, 2]]


async def test_who_waits_for_others_may_leave(make: Callable[..., Bench]) -> None:
    bench = make(max_queue_delay_us=10_000_000)
    await bench.known(left_s=5)
    leaving = bench.start(1)
    await asyncio.sleep(0.01)
    assert bench.copy.pins == 1
    leaving.cancel()
    await asyncio.wait([leaving])
    assert bench.copy.pins == 0
    assert bench.model.runs == []


async def test_a_delay_does_not_count_for_models_that_are_never_batched(make: Callable[..., Bench]) -> None:
    bench = make(max_queue_delay_us=10_000_000, one_by_one=True)
    assert list(await asyncio.gather(bench.start(1), bench.start(2))) == [[[[2]]], [[[4]]]]
    assert sorted(bench.model.runs) == [[1], [2]]
