"""The load generator against both front ends, and against servers that hang, refuse and leave. Authority: what it says
of itself (`mesh.load_generator`), numpy's percentiles, and for open loops that no wait is left out of a latency."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from mesh.frontends import open_server
from mesh.load_generator import Latencies, Load, LoadError, LoadGenerator, Result, cpu_s, tree_cpu_s
from mesh.rpc import Call, Handlers, Unary
from tests.mesh.frontends import Handled, serving
from tests.mesh.test_h2_client import peer

METHOD = "/test/x"


@asynccontextmanager
async def serving_one(frontend: str, handler: Unary, port: int = 0) -> AsyncIterator[str]:
    """A server of one method, and its address."""
    server = open_server(frontend, max_message_bytes=1 << 20, default_timeout_s=100.0)
    address = f"127.0.0.1:{server.listen(f'127.0.0.1:{port}')}"
    await server.start(Handlers({METHOD: handler}))
    try:
        yield address
    finally:
        await server.stop(0)


async def run(load: Load) -> Result:
    return await LoadGenerator(load).run()


async def test_every_message_is_sent_in_turn_and_counted(frontend: str) -> None:
    seen: Counter[bytes] = Counter()
    running = most = 0
    together = asyncio.Event()

    async def handler(call: Call, message: bytes) -> bytes:
        nonlocal running, most
        assert ("x-tenant", "a") in call.metadata
        running += 1
        most = max(most, running)
        if most > 1:
            together.set()
        await together.wait()
        running -= 1
        seen[message] += 1
        return message * 2

    async with serving_one(frontend, handler) as address:
        load = Load(
            address,
            METHOD,
            [b"a", b"bb", b"ccc"],
            connections=3,
            streams=4,
            requests=300,
            metadata=[("x-tenant", "a")],
            server_pids=[os.getpid()],
        )
        result = await run(load)
    assert (result.requests, result.errors, result.words) == (300, {}, [])
    assert seen == {b"a": 100, b"bb": 100, b"ccc": 100}
    assert (result.sent_bytes, result.received_bytes) == (600, 1200)
    assert 1 < most <= 12
    assert 0 < result.p50_ms <= result.p90_ms <= result.p99_ms <= result.max_ms
    assert result.cpu_us == result.server_us[0] > 0


async def test_a_time_instead_of_a_number(frontend: str) -> None:
    """What is in flight when the time is over is waited for."""
    begun = ended = 0

    async def handler(call: Call, message: bytes) -> bytes:
        nonlocal begun, ended
        begun += 1
        await asyncio.sleep(0.01)
        ended += 1
        return b""

    async with serving_one(frontend, handler) as address:
        result = await run(Load(address, METHOD, [b"x"], 2, 2, seconds=0.1, warm_up_s=0.05))
    assert begun == ended >= result.requests > 0
    assert result.seconds >= 0.1
    assert result.errors == {}


async def test_failures_are_counted_by_status_and_told(frontend: str) -> None:
    async with serving(frontend, Handled()) as (_, address):
        result = await run(Load(address, "/test/fail", [b"\0", b"\1", b"\2", b"\2"], requests=40))
    assert result.requests == 0
    assert result.errors == {"INVALID_ARGUMENT": 10, "NOT_FOUND": 10, "RESOURCE_EXHAUSTED": 20}
    told = [words.partition(":")[::2] for words in result.words]
    assert told[0][0] == "INVALID_ARGUMENT"
    assert told[0][1] == " bad: ünïcode, 100 %,"
    assert len(told[1][1]) < 310  # of 6,000
    assert told[2:] == [("RESOURCE_EXHAUSTED", " no room")]


async def test_an_open_loop_counts_what_waits(frontend: str) -> None:
    """All 40 requests are due within 40 ms, and the one stream is held for 200: no latency is much below the rest."""
    asked = 0

    async def handler(call: Call, message: bytes) -> bytes:
        nonlocal asked
        asked += 1
        if asked == 1:
            await asyncio.sleep(0.2)
        return b""

    async with serving_one(frontend, handler) as address:
        result = await run(Load(address, METHOD, [b"x"], requests=40, rate=1000.0))
    assert result.requests == 40
    assert result.p50_ms > 150


async def test_an_open_loop_sends_no_more_than_is_due(frontend: str) -> None:
    async with serving(frontend, Handled()) as (_, address):
        result = await run(Load(address, "/test/echo", [b"x"], 2, 2, seconds=0.3, warm_up_s=0.0, rate=100.0))
    assert 0 < result.requests <= 100 * result.seconds + 1


async def test_a_server_that_hangs_meets_the_timeout() -> None:
    async with peer([]) as (address, seen):
        result = await run(Load(address, METHOD, [b"x"], 1, 3, seconds=0.1, warm_up_s=0.0, timeout_s=0.2))
    assert result.requests == 0
    assert result.errors == {"DEADLINE_EXCEEDED": 3}
    assert result.words == ["DEADLINE_EXCEEDED: the deadline passed before the peer answered"]
    assert seen == [3]


async def test_a_server_that_leaves_and_comes_back(frontend: str) -> None:
    """Lost requests are errors, and the load goes on with the next server on that port."""
    again = asyncio.Event()

    async def first(call: Call, message: bytes) -> bytes:
        leave.set()
        await asyncio.sleep(30)
        return b""

    async def second(call: Call, message: bytes) -> bytes:
        again.set()
        return b""

    leave = asyncio.Event()
    async with serving_one(frontend, first) as address:
        generator = LoadGenerator(Load(address, METHOD, [b"x"], 1, 2, seconds=60.0, warm_up_s=0.0))
        running = asyncio.create_task(generator.run())
        await leave.wait()
    async with serving_one(frontend, second, int(address.rpartition(":")[2])):
        await again.wait()
        while not generator.answered:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        generator.stop()
        result = await running
    assert result.requests > 0
    assert sum(result.errors.values()) >= 2


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "host:name", "unix:/nowhere"])
async def test_no_server_is_one_sentence(address: str) -> None:
    with pytest.raises(LoadError, match=f"^{address}: "):
        await run(Load(address, METHOD, [b"x"]))


async def test_a_server_of_another_protocol() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()
        closed.set()

    closed = asyncio.Event()
    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LoadError, match="speaks no HTTP/2"):
            await run(Load(f"127.0.0.1:{port}", METHOD, [b"x"]))
        await closed.wait()


def test_percentiles_are_numpys_within_one_percent() -> None:
    latencies, drawn = Latencies(), np.random.default_rng(1).lognormal(-7, 2, 10_001)
    for latency_s in drawn:
        latencies.add(float(latency_s))
    for percent in (1, 50, 90, 99, 99.9):
        expected = np.percentile(drawn, percent, method="inverted_cdf")
        assert latencies.percentile_s(percent) == pytest.approx(expected, rel=0.011)
    assert latencies.longest_s == drawn.max()
    assert np.isnan(Latencies().percentile_s(50))


def test_cpu_time_of_a_process_and_its_descendants() -> None:
    with subprocess.Popen(["sh", "-c", "(while :; do :; done) & wait"], process_group=0) as process:
        try:
            while tree_cpu_s(process.pid) < 0.05:
                assert process.poll() is None
            assert cpu_s(process.pid) < 0.05
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="Invalid argument"):
        tree_cpu_s(process.pid)


async def test_a_server_process_that_ends_leaves_no_cpu_figure(frontend: str) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")

    async def handler(call: Call, message: bytes) -> bytes:
        if process.returncode is None:
            process.kill()
        await process.wait()
        return b""

    async with serving_one(frontend, handler) as address:
        result = await run(Load(address, METHOD, [b"x"], requests=2, server_pids=[process.pid]))
    assert result.requests == 2
    assert np.isnan(result.cpu_us)
