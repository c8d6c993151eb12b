"""Both front ends on one set of handlers, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import psutil

from mesh.errors import Code, InvalidRequest, MeshError, ModelNotFound, NoRoom, PodUnavailable
from mesh.frontends import FRONTENDS, Server, open_server
from mesh.http2 import frames
from mesh.http2.hpack import Decoder
from mesh.rpc import Call, Handlers
from mesh.tls import Tls

MAX_MESSAGE: Final = 33 << 20
TIMEOUT_S: Final = 30.0


class Handled:
    """Handlers of every temperament; they note what became of them."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.running = 0
        self.answered = 0

    def handlers(self) -> Handlers:
        unary = {
            "echo": self.echo,
            "metadata": self.metadata,
            "later": self.later,
            "fail": self.fail,
            "break": self.broken,
            "sleep": self.sleep,
        }
        streams = {"stream": self.stream, "fail-stream": self.fail_stream}
        return Handlers(
            {f"/test/{name}": handler for name, handler in unary.items()},
            {f"/test/{name}": handler for name, handler in streams.items()},
        )

    async def echo(self, call: Call, message: bytes) -> bytes:
        return message

    async def metadata(self, call: Call, message: bytes) -> bytes:
        """What the handler sees of the call, without what every client library adds of its own."""
        call.reply_metadata["x-reply"] = "yes"
        shown = [pair for pair in call.metadata if pair[0] != "user-agent"]
        left_s = call.deadline - asyncio.get_running_loop().time()
        return repr((call.method, sorted(shown), call.texts("x-a"), 0 < left_s <= 120)).encode()

    async def later(self, call: Call, message: bytes) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            self.answered += 1
            return message[::-1]

    async def fail(self, call: Call, message: bytes) -> bytes:
        """By the message's first byte; with reply metadata if there is a second one."""
        if len(message) > 1:
            call.reply_metadata["x-reply"] = "no"
        if message[0] & 64:
            await asyncio.sleep(0)
        errors: list[MeshError] = [
            InvalidRequest("bad: ünïcode, 100 %, \n\t"),
            ModelNotFound("no model " + "m" * 6_000),
            NoRoom("no room"),
            PodUnavailable(""),
        ]
        raise errors[message[0] & 3]

    async def broken(self, call: Call, message: bytes) -> bytes:
        raise ValueError("a bug")

    async def sleep(self, call: Call, message: bytes) -> bytes:
        self.running += 1
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return b""

    async def stream(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for message in messages:
            count += 1
            yield b"%d:" % count + message
        yield b"end"

    async def fail_stream(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message
            raise InvalidRequest("enough")


@asynccontextmanager
async def serving(
    frontend: str, handled: Handled, tls: Tls | None = None, address: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Server, str]]:
    """A server of that kind, and its address."""
    server = open_server(frontend, max_message_bytes=MAX_MESSAGE, default_timeout_s=100.0, tls=tls)
    port = server.listen(address)
    await server.start(handled.handlers())
    try:
        yield server, f"127.0.0.1:{port}" if port else address
    finally:
        await server.stop(0)


@asynccontextmanager
async def all_serving() -> AsyncIterator[dict[str, str]]:
    """Addresses by front end."""
    addresses = {}
    servers = []
    for frontend in FRONTENDS:
        context = serving(frontend, Handled())
        servers.append(context)
        _, addresses[frontend] = await context.__aenter__()
    try:
        yield addresses
    finally:
        for context in servers:
            await context.__aexit__(None, None, None)


async def disconnected(port: int) -> None:
    """Return when this process has no connection from or to that port."""
    ours = psutil.Process()

    def left() -> bool:
        connections = (c for c in ours.net_connections("tcp") if c.status != psutil.CONN_LISTEN)
        return any(port in (c.laddr.port, c.raddr.port if c.raddr else 0) for c in connections)

    async with asyncio.timeout(TIMEOUT_S):
        while left():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def raw_exchange(address: str, wire: bytes) -> str:
    """What a server makes of frames on stream 1: `status N [data]`, `http N`, `reset NAME`, `goaway NAME`, `closed`."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK + wire)
    decoder = Decoder(lambda fields: dict(fields or ()), table_bytes=4096, list_bytes=1 << 20)
    body, http = b"", b""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                high, low, kind, flags, stream_id = frames.HEAD.unpack(await reader.readexactly(9))
                payload = await reader.readexactly(high << 8 | low)
                if kind == frames.GOAWAY:
                    return f"goaway {frames.ErrorCode(frames.word(payload, 4)).name}"
                if stream_id != 1:
                    continue
                if kind == frames.RST_STREAM:
                    return f"reset {frames.ErrorCode(frames.word(payload)).name}"
                if kind == frames.DATA:
                    body += payload
                if kind == frames.HEADERS:
                    fields = decoder.decode(payload)
                    http = fields.get(b":status", http)
                    if flags & frames.END_STREAM:
                        if http != b"200":
                            return f"http {http.decode()}"
                        return f"status {Code(int(fields[b'grpc-status'])).name} {body.hex()}".strip()
    except asyncio.IncompleteReadError:
        return "closed"
    finally:
        writer.close()
