"""The HTTP/2 client of pods: against our server, and against peers that leave, refuse, stall and lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mesh import h2_peers
from mesh.errors import DeadlineExceeded, InvalidRequest, MeshError, NoRoom, PodUnavailable, Unimplemented
from mesh.h2_client import H2Client
from mesh.h2_server import H2Server
from mesh.http2 import frames
from mesh.http2.frames import ErrorCode
from mesh.http2.hpack_encoder import literal
from mesh.http2.server import RESPONSE
from tests.mesh.frontends import MAX_MESSAGE, TIMEOUT_S, Handled, serving
from tests.mesh.http2.wire import data, headers, prefixed

OK = literal([(b"grpc-status", b"0")])
ANSWER = [headers(1, literal(RESPONSE)), data(1, prefixed(b"answer")), headers(1, OK, 5)]


@pytest.fixture
async def client() -> AsyncIterator[H2Client]:
    made = H2Client()
    yield made
    await made.close()


def soon(seconds: float = TIMEOUT_S) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_calls(client: H2Client, frontend: str) -> None:
    async with serving(frontend, Handled()) as (_, address):
        for size in (0, 1, 16_379, 16_380, 700_000, MAX_MESSAGE):
            response, _ = await client.call(address, "/test/echo", bytes(size), (), soon())
            assert response == bytes(size)
        metadata: list[tuple[str, str | bytes]] = [("x-a", "1"), ("x-a", "2"), ("x-b-bin", b"\0\xff")]
        for _ in range(5):
            response, head = await client.call(address, "/test/metadata", b"", metadata, soon())
            assert response == repr(("/test/metadata", sorted(metadata), ["1", "2"], True)).encode()
            assert head["x-reply"] == "yes"
        for message, kind in ((b"\0", InvalidRequest), (b"\2", NoRoom), (b"\3", PodUnavailable)):
            with pytest.raises(kind):
                await client.call(address, "/test/fail", message, (), soon())
        with pytest.raises(Unimplemented):
            await client.call(address, "/test/none", b"", (), soon())
        count = 3_000 if frontend == "h2" else 500  # grpcio's server cancels calls once a thousand wait
        many = [client.call(address, "/test/later", b"%d" % n, (), soon()) for n in range(count)]
        answers = [answer for answer, _ in await asyncio.gather(*many)]
        assert answers == [str(n)[::-1].encode() for n in range(count)]


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_deadlines_and_cancellation_reach_the_handler(client: H2Client, frontend: str) -> None:
    handled = Handled()
    async with serving(frontend, handled) as (_, address):
        with pytest.raises(DeadlineExceeded):
            await client.call(address, "/test/sleep", b"", (), soon(0.05))
        calls = [asyncio.create_task(client.call(address, "/test/sleep", b"", (), soon())) for _ in range(10)]
        while handled.running < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while handled.running:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert (await client.call(address, "/test/echo", b"x", (), soon()))[0] == b"x"


async def test_a_peer_that_is_not_there(client: H2Client) -> None:
    with pytest.raises(PodUnavailable):
        await client.call("", "/test/echo", b"", (), soon())
    async with serving("h2", Handled()) as (_, address):
        pass
    for _ in range(3):
        with pytest.raises(PodUnavailable):
            await client.call(address, "/test/echo", b"", (), soon())


async def test_a_peer_that_comes_back(client: H2Client) -> None:
    handled = Handled()
    server = H2Server(max_message_bytes=1 << 20, default_timeout_s=10.0)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start(handled.handlers())
    await client.call(address, "/test/echo", b"", (), soon())
    await server.stop(0)
    with pytest.raises(PodUnavailable):
        await client.call(address, "/test/echo", b"", (), soon())
    server = H2Server(max_message_bytes=1 << 20, default_timeout_s=10.0)
    server.listen(address)
    await server.start(handled.handlers())
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await client.call(address, "/test/echo", b"", (), soon())
                break
            except PodUnavailable:
                await asyncio.sleep(0.02)
    await server.stop(0)


async def test_forgetting_a_peer_lets_its_calls_end(client: H2Client) -> None:
    async with serving("h2", Handled()) as (_, address):
        calls = [asyncio.create_task(client.call(address, "/test/later", b"ab", (), soon())) for _ in range(10)]
        await asyncio.sleep(0)
        await client.forget(address)
        assert [answer for answer, _ in await asyncio.gather(*calls)] == [b"ba"] * 10


@pytest.mark.parametrize("forgotten", [False, True])
async def test_a_peer_that_hangs_is_given_up(
    client: H2Client, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """A stopped process: the kernel accepts and acknowledges for it, and nothing else comes. Its lease may end, and the
    peer be forgotten, while calls wait for it."""
    limits = replace(h2_peers.LIMITS, handshake_s=1.0, keepalive_s=0.1, keepalive_timeout_s=0.1)
    monkeypatch.setattr(h2_peers, "LIMITS", limits)
    called = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        call = asyncio.create_task(client.call(f"{host}:{port}", "/test/echo", b"", (), soon()))
        await called.wait()
        if forgotten:
            await client.forget(f"{host}:{port}")
        with pytest.raises(PodUnavailable):
            await call


async def test_unix_sockets(client: H2Client, tmp_path: Path) -> None:
    server = H2Server(max_message_bytes=1 << 20, default_timeout_s=10.0)
    address = f"unix:{tmp_path}/pod.sock"
    server.listen(address)
    await server.start(Handled().handlers())
    assert (await client.call(address, "/test/echo", b"x", (), soon()))[0] == b"x"
    await server.stop(0)
    assert not (tmp_path / "pod.sock").exists()


@asynccontextmanager
async def peer(*scripts: list[bytes]) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that answers each connection's first HEADERS with bytes; each connection has the next script."""
    seen: list[int] = []

    writers: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        script = scripts[min(len(seen), len(scripts) - 1)]
        seen.append(0)
        await reader.readexactly(len(frames.PREFACE))
        writer.write(frames.settings({}) + frames.SETTINGS_ACK)
        try:
            while True:
                high, low, kind, _, _ = frames.HEAD.unpack(await reader.readexactly(9))
                await reader.readexactly(high << 8 | low)
                if kind == frames.HEADERS:
                    seen[-1] += 1
                    writer.writelines(script)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@pytest.mark.parametrize(
    "unprocessed",
    [
        [frames.goaway(0, ErrorCode.NO_ERROR)],
        [frames.rst_stream(1, ErrorCode.REFUSED_STREAM), frames.goaway(0, ErrorCode.NO_ERROR)],
    ],
)
async def test_calls_that_were_never_processed_are_made_again(client: H2Client, unprocessed: list[bytes]) -> None:
    """RFC 9113, sections 6.8 and 8.7."""
    async with peer(unprocessed, ANSWER) as (address, seen):
        assert (await client.call(address, "/x", b"", (), soon()))[0] == b"answer"
        assert seen == [1, 1]


async def test_a_bounded_number_of_times(client: H2Client) -> None:
    async with peer([frames.goaway(0, ErrorCode.NO_ERROR)]) as (address, seen):
        with pytest.raises(PodUnavailable):
            await client.call(address, "/x", b"", (), soon())
        assert len(seen) == 3


@pytest.mark.parametrize(
    "answer",
    {
        "reset": [frames.rst_stream(1, ErrorCode.INTERNAL_ERROR)],
        "no trailers": [ANSWER[0], data(1, prefixed(b"x"), 1)],
        "two messages": [ANSWER[0], data(1, prefixed(b"x") * 2), ANSWER[2]],
        "half a message": [ANSWER[0], data(1, prefixed(b"xy")[:-1]), ANSWER[2]],
        "no message": [ANSWER[0], ANSWER[2]],
        "http 503": [headers(1, literal([(b":status", b"503")]), 5)],
        "not http": [headers(1, literal([(b"grpc-status", b"0")]), 5)],
        "compressed": [ANSWER[0], data(1, prefixed(b"x", 1)), ANSWER[2]],
        "garbage": [b"\xff" * 100],
        "window": [frames.window_update(1, 0)],
    }.values(),
)
async def test_answers_that_are_none(client: H2Client, answer: list[bytes]) -> None:
    async with peer(answer) as (address, _):
        with pytest.raises(MeshError) as raised:
            await client.call(address, "/x", b"", (), soon())
        assert not isinstance(raised.value, DeadlineExceeded)


async def test_interim_responses_are_skipped(client: H2Client) -> None:
    """RFC 9113, section 8.1."""
    async with peer([headers(1, literal([(b":status", b"103")])), *ANSWER]) as (address, _):
        assert (await client.call(address, "/x", b"", (), soon()))[0] == b"answer"
