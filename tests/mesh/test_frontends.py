"""Both front ends give the same answers: the same handlers behind each, the same requests to both."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh.http2.frames import END_STREAM
from mesh.http2.hpack_encoder import literal
from tests.mesh.frontends import MAX_MESSAGE, TIMEOUT_S, Handled, all_serving, raw_exchange, serving
from tests.mesh.http2.wire import REQUEST, data, headers, prefixed

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


async def outcome(channel: grpc.aio.Channel, name: str, message: bytes, **how: Any) -> tuple[Any, ...]:
    """All that a client can see of an answer."""
    call = channel.unary_unary(f"/test/{name}")(message, **{"timeout": TIMEOUT_S, **how})
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        trailers = sorted((key, str(value)) for key, value in error.trailing_metadata() or ())
        leading = sorted((key, str(value)) for key, value in error.initial_metadata() or ())
        return error.code().name, error.details(), leading, trailers
    leading = sorted((key, str(value)) for key, value in await call.initial_metadata())
    return "OK", response, leading


def generated(rng: random.Random) -> tuple[str, bytes, dict[str, Any]]:
    """A request: mostly good ones of all sizes."""
    name = rng.choice(["echo"] * 6 + ["metadata"] * 4 + ["later"] * 3 + ["fail"] * 4 + ["break", "unknown"])
    size = rng.choice((0, 1, 10, 291, 291, 5_000, 16_379, 16_380, 70_000))
    message = rng.randbytes(size // 2) + b"a" * (size - size // 2)
    if name == "fail":
        message = bytes((rng.randrange(256),)) * rng.choice((1, 2))
    how: dict[str, Any] = {}
    if rng.randrange(2):
        values = ["", "b", "a b", "x" * 200, "~!@#$%^&*()", "1,2"]
        metadata: list[tuple[str, str | bytes]] = [
            (rng.choice(("x-a", "x-b", "traceparent", "mm-model-id")), rng.choice(values))
            for _ in range(rng.randrange(5))
        ]
        metadata += [("x-c-bin", rng.randbytes(rng.randrange(20))) for _ in range(rng.randrange(3))]
        how["metadata"] = tuple(metadata)
    if rng.randrange(3) == 0:
        how["timeout"] = rng.choice((20.0, 100.0, 5_000.0))
    if rng.randrange(4) == 0:
        how["compression"] = rng.choice((grpc.Compression.Gzip, grpc.Compression.Deflate))
    return name, message, how


async def test_thousands_of_requests_are_answered_alike() -> None:
    rng = random.Random(11)
    async with all_serving() as addresses:
        channels = {name: grpc.aio.insecure_channel(address, options=OPTIONS) for name, address in addresses.items()}
        for batch in range(60):
            requests = [generated(rng) for _ in range(50)]
            answers = {
                frontend: await asyncio.gather(*(outcome(channel, n, m, **how) for n, m, how in requests))
                for frontend, channel in channels.items()
            }
            for request, ours, theirs in zip(requests, answers["h2"], answers["grpcio"], strict=True):
                assert ours == theirs, (batch, request)
        for channel in channels.values():
            await channel.close()


@pytest.mark.parametrize("size", [602_147, 32 << 20, MAX_MESSAGE, MAX_MESSAGE + 1])
async def test_large_messages_are_answered_alike(size: int) -> None:
    message = bytes(size)
    async with all_serving() as addresses:
        found = {}
        for frontend, address in addresses.items():
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                answer = await outcome(channel, "echo", message)
                found[frontend] = answer[0] if answer[0] != "OK" else (answer[1] == message)
        expected = True if size <= MAX_MESSAGE else "RESOURCE_EXHAUSTED"
        assert found == {"h2": expected, "grpcio": expected}


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_bomb_is_refused_alike(algorithm: grpc.Compression) -> None:
    """It inflates to more than a message may have."""
    async with all_serving() as addresses:
        for address in addresses.values():
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                answer = await outcome(channel, "echo", bytes(MAX_MESSAGE + 1), compression=algorithm)
                assert answer[0] == "RESOURCE_EXHAUSTED"


async def test_deadlines_pass_alike() -> None:
    async with all_serving() as addresses:
        for address in addresses.values():
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                assert (await outcome(channel, "sleep", b"", timeout=0.05))[0] == "DEADLINE_EXCEEDED"
                assert (await outcome(channel, "echo", b"fine"))[:2] == ("OK", b"fine")


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_cancelling_cancels_the_handler(frontend: str) -> None:
    handled = Handled()
    async with (
        serving(frontend, handled) as (_, address),
        grpc.aio.insecure_channel(address, options=OPTIONS) as channel,
    ):
        calls = [channel.unary_unary("/test/sleep")(b"") for _ in range(50)]
        while handled.running < 50:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while handled.cancelled < 50:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert handled.running == 0
        assert (await outcome(channel, "echo", b"on we go"))[1] == b"on we go"


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_streams(frontend: str) -> None:
    async with (
        serving(frontend, Handled()) as (_, address),
        grpc.aio.insecure_channel(address, options=OPTIONS) as channel,
    ):
        messages = [b"a", b"", b"b" * 100_000, b"c"]
        call = channel.stream_stream("/test/stream")(iter(messages), timeout=TIMEOUT_S)
        got = [message async for message in call]
        assert got == [b"1:a", b"2:", b"3:" + b"b" * 100_000, b"4:c", b"end"]
        many = [b"%d" % n for n in range(2_000)]
        call = channel.stream_stream("/test/stream")(iter(many), timeout=TIMEOUT_S)
        assert len([message async for message in call]) == 2_001
        call = channel.stream_stream("/test/fail-stream")(iter(many[:1]), timeout=TIMEOUT_S)
        assert await call.read() == b"0"
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_stopping_lets_calls_end() -> None:
    """Also those that were under way to the server when it said goodbye; grpcio's server cancels these."""
    handled = Handled()
    async with (
        serving("h2", handled) as (server, address),
        grpc.aio.insecure_channel(address, options=OPTIONS) as channel,
    ):
        ending = [channel.unary_unary("/test/later")(b"ab", timeout=TIMEOUT_S) for _ in range(20)]
        endless = channel.unary_unary("/test/sleep")(b"", timeout=TIMEOUT_S)
        while not handled.running:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        stopping = asyncio.create_task(server.stop(0.5))
        assert [await call for call in ending] == [b"ba"] * 20
        await stopping
        with pytest.raises(grpc.aio.AioRpcError):
            await endless
        assert handled.running == 0


def head(*more: tuple[bytes, bytes], **changed: bytes) -> bytes:
    names = {b":method": "method", b":path": "path", b"content-type": "content_type", b"te": "te"}
    fields = [
        (key, changed.get(names.get(key, ""), b"/test/echo" if key == b":path" else value)) for key, value in REQUEST
    ]
    return literal([*fields, *more])


BODY = data(1, prefixed(b"abc"), END_STREAM)
OK = "status OK " + prefixed(b"abc").hex()
BROKEN: dict[str, tuple[bytes, str, str | None]] = {
    "compressed without encoding": (headers(1, head()) + data(1, prefixed(b"x", 1), 1), "status INTERNAL", None),
    "not gzip": (
        headers(1, head((b"grpc-encoding", b"gzip"))) + data(1, prefixed(b"x", 1), 1),
        "status INTERNAL",
        None,
    ),
    "timeout of no unit": (headers(1, head((b"grpc-timeout", b"1x"))) + BODY, "status INTERNAL", None),
    "huge timeout": (headers(1, head((b"grpc-timeout", b"99999999H"))) + BODY, OK, None),
    "content type with suffix": (headers(1, head(content_type=b"application/grpc+proto")) + BODY, OK, None),
    "-bin that is not base64": (headers(1, head((b"x-bin", b"!!!"))) + BODY, "status INTERNAL", None),
    "a message of 2 GiB": (headers(1, head()) + data(1, b"\0\x7f\xff\xff\xff"), "status RESOURCE_EXHAUSTED", None),
    "unknown method": (headers(1, head(path=b"/no/such")) + BODY, "status UNIMPLEMENTED", None),
    # Where the documents decide otherwise than grpcio does:
    "unknown encoding": (  # compression.md: UNIMPLEMENTED, with what is accepted
        headers(1, head((b"grpc-encoding", b"snappy"))) + BODY,
        "status UNIMPLEMENTED",
        "status INTERNAL",
    ),
    "timeout of nine digits": (
        headers(1, head((b"grpc-timeout", b"123456789S"))) + BODY,
        "status INTERNAL",
        OK,
    ),
    "flag 2": (
        headers(1, head()) + data(1, prefixed(b"", 2), 1),
        "status INTERNAL",
        "status OK 0000000000",
    ),
    "two messages": (
        headers(1, head()) + data(1, prefixed(b"abc") * 2, 1),
        "status UNIMPLEMENTED",
        OK,
    ),
    "GET": (headers(1, head(method=b"GET")) + BODY, "http 405", "reset INTERNAL_ERROR"),
    "text": (headers(1, head(content_type=b"text/plain")) + BODY, "http 415", OK),
    "upper case": (headers(1, head((b"X-Y", b"a"))) + BODY, "reset PROTOCOL_ERROR", "status INTERNAL"),
    "te": (headers(1, head(te=b"gzip")) + BODY, "reset PROTOCOL_ERROR", "status INTERNAL"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_requests(name: str) -> None:
    """gRPC over HTTP/2, "Requests"; None: grpcio gives the same answer."""
    wire, ours, theirs = BROKEN[name]
    async with all_serving() as addresses:
        assert await raw_exchange(addresses["h2"], wire) == ours
        assert await raw_exchange(addresses["grpcio"], wire) == (theirs or ours)


@pytest.mark.parametrize(
    "wire",
    [
        headers(1, head(), 5),
        headers(1, head()) + data(1, b"", 1),
        headers(1, head()) + data(1, prefixed(b"abc")[:-1], 1),
        headers(1, head()) + data(1, b"\0\0", 1),
    ],
)
async def test_requests_that_grpcio_never_answers_are_answered(wire: bytes) -> None:
    """A unary request without a complete message."""
    async with serving("h2", Handled()) as (_, address):
        assert await raw_exchange(address, wire) in ("status UNIMPLEMENTED", "status INTERNAL")


async def test_a_deadline_that_has_passed() -> None:
    """Always, whatever the handler would have done; with grpcio it is a race."""
    async with serving("h2", Handled()) as (_, address):
        wire = headers(1, head((b"grpc-timeout", b"0n"))) + BODY
        assert await raw_exchange(address, wire) == "status DEADLINE_EXCEEDED"
