"""Calls that go through a pod in pieces. Authority: `mesh.h2_relay`; RFC 9113 §5.2 (flow control), §8.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from mesh.errors import Code, MeshError
from mesh.h2_client import H2Client
from mesh.h2_server import H2Server
from mesh.http2 import frames
from mesh.http2.connection import Connection
from mesh.http2.frames import DATA, HEADERS, RST_STREAM, ErrorCode
from mesh.http2.hpack import Decoder
from mesh.http2.hpack_encoder import literal
from mesh.http2.server import RESPONSE
from mesh.rpc import Call, Handlers, Head, Metadata, Onward, Told
from mesh.wire import PartialPeek
from tests.mesh.frontends import TIMEOUT_S, Handled, serving
from tests.mesh.http2.wire import BLOCK, data, headers, prefixed
from tests.mesh.pods import until

MAX_MESSAGE = 12 << 20
BOUND = (256 << 10) + (4 << 20) + (64 << 10)
"""What may wait for one side: the limit, what the other side's window lets come after it, and a frame or two."""
BODY = bytes(range(256)) * 8_192  # 2 MiB
NAMED = b"\x0a\x01m"


class ToPeer:
    """A relay to one address (`mesh.rpc.Relay`)."""

    def __init__(self, address: str, *, reads_along: bool = False) -> None:
        self.address = address
        self.client = H2Client()
        self.reads_along = reads_along
        self.told = Told((("x-told", "yes"),))
        self.under_way = 0
        self.outcomes: list[tuple[Code | None, bool]] = []

    def onward(self, head: Head, message: bytes) -> Onward | None:
        peer = self.client.ready(self.address)
        if peer is None:
            return None
        self.under_way += 1
        return "m", "holder", peer, self.told

    def onward_begun(self, head: Head, piece: bytes) -> tuple[Onward, PartialPeek | None] | None:
        peek = PartialPeek(1) if self.reads_along else None
        if peek is not None and not (peek.feed(piece) and peek.found == "m"):
            return None
        onward = self.onward(head, b"")
        return None if onward is None else (onward, peek)

    def passed(self, head: Head) -> Metadata:
        return head.metadata

    def ended(self, pod_id: str, code: Code | None, elapsed_s: float, *, reached: bool) -> None:
        self.under_way -= 1
        self.outcomes.append((code, reached))


class Forwarder:
    """A server that passes /test/echo and /echo on, and what its handler saw of what came back to it."""

    def __init__(self, relay: ToPeer) -> None:
        self.relay = relay
        self.server = H2Server(max_message_bytes=MAX_MESSAGE, default_timeout_s=100.0)
        self.address = f"127.0.0.1:{self.server.listen('127.0.0.1:0')}"
        self.handled: list[tuple[MeshError | None, bytes]] = []

    async def start(self) -> None:
        paths = ("/test/echo", "/test/sleep", "/test/fail", "/echo")
        handlers = Handlers(dict.fromkeys(paths, self.handle), relays=dict.fromkeys(paths, self.relay))
        await self.server.start(handlers)
        await self.relay.client.call(self.relay.address, "/echo", b"", (), soon())  # opens the connection

    async def handle(self, call: Call, message: bytes) -> bytes:
        """What another pod would answer."""
        self.handled.append((call.begun[2] if call.begun is not None else None, message))
        return message

    @property
    def inbound(self) -> Connection:
        """The one client's connection."""
        (protocol,) = self.server._shared.connections
        return protocol.connection

    @property
    def outbound(self) -> Connection:
        peer = self.relay.client.ready(self.relay.address)
        assert peer is not None
        assert peer.link is not None
        return peer.link.connection

    def is_empty(self) -> bool:
        """Nothing of any call is left."""
        books = [self.outbound, *(protocol.connection for protocol in self.server._shared.connections)]
        return not self.relay.under_way and not any(c.streams or c.buffered or c.unsent for c in books)


class Peer:
    """The holder, by hand: what came on each stream, and a way to say anything."""

    def __init__(self, *, window: int) -> None:
        self.window = window
        self.bodies: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, ErrorCode] = {}
        self.writer: asyncio.StreamWriter

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        await reader.readexactly(len(frames.PREFACE))
        settings = frames.settings({frames.INITIAL_WINDOW_SIZE: self.window})
        writer.write(settings + frames.SETTINGS_ACK + frames.window_update(0, 1 << 30))
        try:
            while True:
                high, low, kind, flags, stream_id = frames.HEAD.unpack(await reader.readexactly(9))
                payload = await reader.readexactly(high << 8 | low)
                if kind == HEADERS:
                    self.bodies[stream_id] = bytearray()
                elif kind == DATA:
                    self.bodies[stream_id] += payload
                elif kind == RST_STREAM:
                    self.resets[stream_id] = ErrorCode(frames.word(payload))
                if kind == DATA and flags & frames.END_STREAM:
                    self.ended.add(stream_id)
                    if stream_id == 1:
                        self.answer(1, b"")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def say(self, *said: bytes) -> None:
        self.writer.write(b"".join(said))

    def answer(self, stream_id: int, message: bytes) -> None:
        body = prefixed(message)
        pieces = [data(stream_id, body[at : at + 16_384]) for at in range(0, len(body), 16_384)]
        self.say(headers(stream_id, literal(RESPONSE)), *pieces, self.status(stream_id, 0))

    def status(self, stream_id: int, code: int, reason: bytes = b"") -> bytes:
        fields = [(b"grpc-status", b"%d" % code), *([(b"densemesh-reason", reason)] if reason else [])]
        return headers(stream_id, literal(fields), frames.END_HEADERS | frames.END_STREAM)

    def refuse(self, stream_id: int, code: int, reason: bytes) -> None:
        fields = [*RESPONSE, (b"grpc-status", b"%d" % code), (b"densemesh-reason", reason)]
        self.say(headers(stream_id, literal(fields), frames.END_HEADERS | frames.END_STREAM))


class RawClient:
    """A client of frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *wire: bytes) -> None:
        self.writer.write(b"".join(wire))

    def send_body(self, body: bytes, start: int, stop: int) -> None:
        """Bytes of a message with its prefix, in full frames; those that end it carry END_STREAM."""
        whole = prefixed(body)
        for at in range(start, min(stop, len(whole)), 16_384):
            piece = whole[at : min(at + 16_384, stop)]
            self.send(data(1, piece, frames.END_STREAM if at + len(piece) >= len(whole) else 0))

    async def answer(self) -> tuple[bytes, int]:
        """The response's message, and its status."""
        body = b""
        decoder = Decoder(lambda fields: fields or [], table_bytes=4_096, list_bytes=1 << 20)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                high, low, kind, flags, stream_id = frames.HEAD.unpack(await self.reader.readexactly(9))
                payload = await self.reader.readexactly(high << 8 | low)
                if stream_id == 1 and kind == DATA:
                    body += payload
                    self.send(*(frames.window_update(n, len(payload)) for n in (0, 1) if payload))
                elif stream_id == 1 and kind == HEADERS and flags & frames.END_STREAM:
                    return body[5:], int(dict(decoder.decode(payload))[b"grpc-status"])


def soon(seconds: float = TIMEOUT_S) -> float:
    return asyncio.get_running_loop().time() + seconds


@asynccontextmanager
async def forwarding(to: str, **how: Any) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(ToPeer(to, **how))
    await forwarder.start()
    try:
        yield forwarder
    finally:
        await forwarder.server.stop(0)
        await forwarder.relay.client.close()


@asynccontextmanager
async def by_hand(window: int = 1 << 24, **how: Any) -> AsyncIterator[tuple[Peer, Forwarder]]:
    """A forwarder to a peer by hand."""
    peer = Peer(window=window)
    async with await asyncio.start_server(peer.talk, "127.0.0.1", 0) as server:
        async with forwarding(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", **how) as forwarder:
            yield peer, forwarder
        peer.writer.close()


@asynccontextmanager
async def raw_client(forwarder: Forwarder, window: int = 65_535) -> AsyncIterator[RawClient]:
    host, _, port = forwarder.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 26)
    client = RawClient(reader, writer)
    hello = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: window}) + frames.SETTINGS_ACK
    client.send(hello, frames.window_update(0, 1 << 30))
    try:
        yield client
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("holder", ["h2", "grpcio"])
async def test_bodies_of_all_sizes_arrive_as_they_were_sent(holder: str) -> None:
    handled = Handled()
    async with serving(holder, handled) as (_, address):
        relay = ToPeer(address)
        await relay.client.call(address, "/test/echo", b"", (), soon())
        forwarder = Forwarder(relay)
        handlers = Handlers({"/test/echo": forwarder.handle}, relays={"/test/echo": relay})
        await forwarder.server.start(handlers)
        client = H2Client()
        try:
            sizes = (0, 1, 16_378, 16_379, 16_380, 32_768, 700_000, 5 << 20, MAX_MESSAGE)
            bodies = [(BODY * 7)[size % 251 :][:size] for size in sizes]
            calls = [client.call(forwarder.address, "/test/echo", body, (), soon()) for body in bodies]
            for body, (response, answered) in zip(bodies, await asyncio.gather(*calls), strict=True):
                assert response == body
                assert answered["densemesh-pod"] == "holder"
            assert not forwarder.handled
            await until(forwarder.is_empty)
            assert relay.outcomes == [(Code.OK, True)] * len(sizes)
        finally:
            await client.close()
            await forwarder.server.stop(0)
            await relay.client.close()


async def test_a_slow_writers_bytes_go_on_as_they_come() -> None:
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        whole, cuts = len(BODY) + 5, (0, 20_000, 20_001, 20_010, 300_000, 1_000_000, len(BODY) + 5)
        client.send(headers(1, BLOCK))
        for start, stop in pairwise(cuts):
            client.send_body(BODY, start, stop)
            least = stop - 1_024  # small pieces wait for others
            await until(partial(lambda least: len(peer.bodies.get(3, b"")) >= least, least))
        await until(lambda: 3 in peer.ended)
        assert bytes(peer.bodies[3]) == prefixed(BODY)
        assert forwarder.inbound.buffered == whole - 5  # kept until the answer begins
        peer.answer(3, b"done")
        assert await client.answer() == (b"done", 0)
        assert forwarder.is_empty()


async def test_a_slow_reader_holds_the_holder_back() -> None:
    """Of the response no more waits here than the bound, however much the client asks for and does not read."""
    body = BODY * 6
    async with by_hand() as (peer, forwarder), raw_client(forwarder, window=16_384) as client:
        client.send(headers(1, BLOCK), data(1, prefixed(b"x"), frames.END_STREAM))
        await until(lambda: 3 in peer.ended)
        whole = prefixed(body)
        peer.say(headers(3, literal(RESPONSE)))
        sent = 0
        (upstream,) = forwarder.outbound.streams.values()
        while sent < 4 << 20:  # the window that was given
            peer.say(data(3, whole[sent : sent + 16_384]))
            sent += 16_384
        await until(lambda: upstream.recv_left == 0)
        assert upstream.held
        assert forwarder.inbound.unsent <= BOUND
        assert forwarder.outbound.buffered == 0
        reading = asyncio.create_task(client.answer())
        while sent < len(whole):
            await until(lambda: upstream.recv_left >= 16_384)
            assert forwarder.inbound.unsent <= BOUND
            peer.say(data(3, whole[sent : sent + 16_384]))
            sent += 16_384
            await asyncio.sleep(0)
        peer.say(peer.status(3, 0))
        assert await reading == (body, 0)
        assert forwarder.is_empty()


async def test_a_slow_holder_holds_the_client_back() -> None:
    body = BODY * 5
    async with by_hand(window=65_535) as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(body, 0, 4 << 20)  # the window that was given
        await until(lambda: 1 in forwarder.inbound.streams)
        stream = forwarder.inbound.streams[1]
        await until(lambda: stream.recv_left == 0)
        assert stream.held
        assert forwarder.outbound.unsent <= BOUND
        sent = 4 << 20
        while 3 not in peer.ended:
            peer.say(frames.window_update(3, 1 << 18))
            await until(lambda: not forwarder.outbound.sending or forwarder.outbound.streams[3].credit <= -1)
            if sent < len(body) + 5 and stream.recv_left:
                room = min(stream.recv_left, len(body) + 5 - sent)
                client.send_body(body, sent, sent + room)
                sent += room
            assert forwarder.outbound.unsent <= BOUND
            await asyncio.sleep(0)
        assert bytes(peer.bodies[3]) == prefixed(body)
        peer.answer(3, b"done")
        assert await client.answer() == (b"done", 0)
        assert forwarder.is_empty()


async def test_cancelling_in_the_middle_of_a_body_reaches_the_holder() -> None:
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(BODY, 0, 100_000)
        await until(lambda: len(peer.bodies.get(3, b"")) > 90_000)
        client.send(frames.rst_stream(1, ErrorCode.CANCEL))
        await until(lambda: 3 in peer.resets)
        assert peer.resets[3] is ErrorCode.CANCEL
        assert forwarder.is_empty()
        assert forwarder.relay.outcomes == [(Code.CANCELLED, True)]


@pytest.mark.parametrize("answering", [False, True])
async def test_a_deadline_in_the_middle_of_a_body(answering: bool) -> None:
    block = literal([*((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/echo"), (b"te", b"trailers"))])
    block += literal([(b"content-type", b"application/grpc"), (b"grpc-timeout", b"100m")])
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, block))
        client.send_body(BODY, 0, len(BODY) + 5 if answering else 100_000)
        if answering:
            await until(lambda: 3 in peer.ended)
            peer.say(headers(3, literal(RESPONSE)), data(3, prefixed(BODY)[:16_384]))
        assert (await client.answer())[1] == Code.DEADLINE_EXCEEDED
        await until(lambda: peer.resets.get(3) is ErrorCode.CANCEL)
        await until(forwarder.is_empty)


@pytest.mark.parametrize("sent", [100_000, len(BODY) + 5])
@pytest.mark.parametrize("how", ["dies", "refuses", "is busy"])
async def test_a_holder_that_fails_before_it_answers(how: str, sent: int) -> None:
    """The request goes elsewhere, whole, and with what is known of the first try."""
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(BODY, 0, sent)
        await until(lambda: len(peer.bodies.get(3, b"")) > min(sent, len(BODY)) - 16_384)
        if how == "dies":
            peer.writer.transport.abort()
        elif how == "refuses":
            peer.refuse(3, Code.UNAVAILABLE, b"not-here")
        else:
            peer.say(frames.rst_stream(3, ErrorCode.REFUSED_STREAM))
        await until(lambda: not forwarder.relay.under_way)
        client.send_body(BODY, sent, len(BODY) + 5)
        assert await client.answer() == (BODY, 0)
        ((error, message),) = forwarder.handled
        assert message == BODY
        reason = {"dies": "unavailable", "refuses": "not-here", "is busy": None}[how]
        assert (error.reason if error is not None else None) == reason
        assert forwarder.relay.outcomes == [(None, how != "dies")]
        await until(lambda: not forwarder.inbound.streams)
        assert forwarder.inbound.buffered == forwarder.inbound.unsent == 0


async def test_a_holder_that_dies_while_it_answers() -> None:
    """What the client has seen cannot be taken back."""
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(BODY, 0, len(BODY) + 5)
        await until(lambda: 3 in peer.ended)
        peer.say(headers(3, literal(RESPONSE)), data(3, prefixed(BODY)[:16_384]))
        await until(lambda: forwarder.inbound.streams[1].started)
        assert forwarder.inbound.buffered == 0
        await peer.writer.drain()
        peer.writer.transport.abort()
        assert (await client.answer())[1] == Code.UNAVAILABLE
        assert not forwarder.handled
        assert forwarder.relay.outcomes == [(Code.UNAVAILABLE, False)]


async def test_an_error_in_the_middle_of_a_body_is_the_clients() -> None:
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(BODY, 0, 100_000)
        await until(lambda: len(peer.bodies.get(3, b"")) > 90_000)
        peer.refuse(3, Code.INVALID_ARGUMENT, b"")
        assert (await client.answer())[1] == Code.INVALID_ARGUMENT
        assert forwarder.is_empty()


async def test_a_message_over_the_limit_goes_nowhere() -> None:
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK), data(1, b"\0" + (MAX_MESSAGE + 1).to_bytes(4, "big") + bytes(1_000)))
        assert (await client.answer())[1] == Code.RESOURCE_EXHAUSTED
        assert set(peer.bodies) == {1}
        assert forwarder.is_empty()


async def test_two_messages_in_a_call_that_is_under_way() -> None:
    async with by_hand() as (peer, forwarder), raw_client(forwarder) as client:
        whole = prefixed(BODY[:50_000])
        client.send(headers(1, BLOCK), *(data(1, whole[at : at + 10_000]) for at in range(0, len(whole), 10_000)))
        await until(lambda: len(peer.bodies.get(3, b"")) == len(whole))
        client.send(data(1, prefixed(b"again"), frames.END_STREAM))
        assert (await client.answer())[1] == Code.UNIMPLEMENTED
        await until(lambda: 3 in peer.resets)
        assert forwarder.is_empty()


@pytest.mark.parametrize(
    "tail", [NAMED, b"\x0a\x01o", b"\x0b", b"\x08", b"\x2a\x7f"], ids=["again", "other", "group", "cut", "short"]
)
async def test_a_message_that_is_not_what_it_seemed_is_looked_at_whole(tail: bytes) -> None:
    """One that names its model twice, or is malformed behind what was sent on already."""
    tensor = BODY[:100_000]
    message = NAMED + b"\x3a" + b"\xa0\x8d\x06" + tensor + tail
    async with by_hand(reads_along=True) as (peer, forwarder), raw_client(forwarder) as client:
        client.send(headers(1, BLOCK))
        client.send_body(message, 0, len(message) + 5)
        await until(lambda: 3 in peer.resets)
        assert 3 not in peer.ended
        await until(lambda: 5 in peer.ended)  # as a whole it goes on again: this relay asks for no name then
        assert bytes(peer.bodies[5]) == prefixed(message)
        peer.answer(5, b"")
        assert await client.answer() == (b"", 0)
