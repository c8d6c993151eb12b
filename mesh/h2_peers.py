"""What leads to other pods: one multiplexed connection in use for each, and when another may be tried."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from math import inf
from random import Random
from typing import Final, TypeVar

from mesh.errors import DeadlineExceeded, PodUnavailable
from mesh.h2_protocol import H2Protocol
from mesh.http2.client import UNAVAILABLE, UNHEARD, ClientConnection
from mesh.http2.exchange import Exchange
from mesh.http2.frames import ErrorCode
from mesh.http2.grpc import timeout_field
from mesh.http2.hpack import Field
from mesh.http2.hpack_encoder import literal
from mesh.http2.limits import Limits
from mesh.http2.streams import Stream
from mesh.tls import Tls, reason

log = logging.getLogger(__name__)

LIMITS: Final = Limits(
    max_message_bytes=(1 << 31) - 1,
    max_buffered_bytes=1 << 33,
    max_unsent_bytes=1 << 33,
    max_streams=1 << 20,
    handshake_s=5.0,
    keepalive_s=2.0,
    keepalive_timeout_s=3.0,
)
"""Peers are pods: what they may send is limited by what their clients may. One that hangs is to be noticed while the
requests that wait for it can still go elsewhere."""
_CONNECT_S: Final = 5.0
_BACKOFF_S: Final = (0.1, 2.0)
"""After the first failed connection, doubling up to the last; calls in between fail at once."""
_STEP_S: Final = 0.005
"""Between two looks at the deadlines of one connection's calls."""


class Link(H2Protocol[ClientConnection]):
    """One connection, and the calls that wait for a free stream on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits = LIMITS) -> None:
        super().__init__(loop)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.forgotten = False
        self.connection = ClientConnection(limits, loop.time, self._freed)
        self._due = inf
        """No call's deadline is earlier; then `_timer` looks at all of them. A timer for each would cost more."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._timer is not None:
            self._timer.cancel()
        while self._waiters:
            self._freed()

    def pause_writing(self) -> None:
        """A client goes on reading, or two that wait for each other would do so for ever."""
        self.connection.writable = False
        self._paused_at = self.loop.time()

    async def free(self) -> None:
        """Return when there may be a free stream, or the connection takes no more calls."""
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def call(self, block: bytes, message: bytes, exchange: Exchange) -> Stream:
        """Make a call; `connection.ready` before. It ends by `exchange.deadline`."""
        stream = self.connection.call(block, message, exchange)
        if exchange.deadline < self._due:
            self._look_at(exchange.deadline)
        if not self._scheduled:
            self.wake()
        return stream

    def begin(self, block: bytes, exchange: Exchange, size: int, start: bytes) -> Stream:
        """The same for a call whose message follows in pieces: see `ClientConnection.begin`."""
        stream = self.connection.begin(block, exchange, size, start)
        if exchange.deadline < self._due:
            self._look_at(exchange.deadline)
        self.wake()
        return stream

    def cancel(self, stream: Stream) -> None:
        """Nobody waits for the answer any more."""
        self.connection.cancel(stream)
        self.wake()

    def _look_at(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due, self._timer = due, self.loop.call_at(due, self._look)

    def _look(self) -> None:
        """End the calls whose deadline has passed."""
        self._due, self._timer = inf, None
        now = self.loop.time() + 0.001  # the clock's resolution
        streams = list(self.connection.streams.values())
        for stream in streams:
            if stream.owner.deadline <= now and self.connection.streams.get(stream.id) is stream:
                self.cancel(stream)
                stream.owner.late()
        due = min([stream.owner.deadline for stream in self.connection.streams.values()], default=inf)
        if due < self._due:
            self._look_at(max(due, now + _STEP_S))

    def _freed(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        if self.connection.draining or self.forgotten:
            self.close_if_idle()

    def close_if_idle(self) -> None:
        connection = self.connection
        if (connection.draining or self.forgotten) and not connection.streams and connection.fault is None:
            connection.fail(ErrorCode.NO_ERROR, "")
            self.wake()


class _Awaited(Exchange):
    """A call that somebody waits for."""

    __slots__ = ("_answered",)

    def __init__(self, deadline: float, answered: asyncio.Future[None]) -> None:
        super().__init__(deadline)
        self._answered = answered

    def end(self, status: int, text: str) -> None:
        super().end(status, text)
        if not self._answered.done():
            self._answered.set_result(None)


class Peer:
    """What leads to one address: the connection in use, and when another may be tried."""

    def __init__(self, address: str, tls: Tls | None, rng: Random) -> None:
        self.address = address
        self._tls = None if address.startswith("unix:") else tls
        self.fields: list[Field] = [
            (b":method", b"POST"),
            (b":scheme", b"https" if self._tls else b"http"),
            (b":authority", b"localhost" if address.startswith("unix:") else address.encode()),
        ]
        """The first header fields of every call, and their block."""
        self.block = literal(self.fields)
        self._rng = rng
        self.link: Link | None = None
        """The last one opened."""
        self._old: list[Link] = []
        """Links that take no new calls, until their last has ended."""
        self._connecting: asyncio.Task[Link] | None = None
        self._failures = 0
        self._not_before = 0.0
        self._why = ""

    async def exchange(self, fields: list[Field], message: bytes, deadline: float) -> Exchange:
        """Make a call.

        Raises:
            DeadlineExceeded, PodUnavailable
        """
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        exchange = _Awaited(deadline, answered)
        link = self.link
        if link is None or not link.connection.ready:
            waiting = loop.create_task(self._ready())
            try:
                done, _ = await asyncio.wait({waiting}, timeout=max(0.0, deadline - loop.time()))
            except asyncio.CancelledError:
                waiting.cancel()
                raise
            if not done:
                waiting.cancel()
                raise DeadlineExceeded(f"{self.address}: no connection before the deadline")
            waiting.result()
            link = self.link
            if link is None or not link.connection.open:
                exchange.unprocessed = True
                exchange.status, exchange.text = UNAVAILABLE, UNHEARD
                return exchange
        timeout = b"grpc-timeout", timeout_field(max(0.001, deadline - loop.time()))
        stream = link.call(link.connection.encoder.encode([*fields, timeout]), message, exchange)
        try:
            await answered
        except asyncio.CancelledError:
            link.cancel(stream)
            raise
        return exchange

    async def _ready(self) -> None:
        """Return when a call can be made.

        Raises:
            PodUnavailable: the peer cannot be reached, or could not a moment ago.
        """
        while True:
            link = self.link
            if link is None or not link.connection.open:
                link = await self._connect()
            if link.connection.ready or not link.connection.open:
                return
            await link.free()

    async def _connect(self) -> Link:
        loop = asyncio.get_running_loop()
        if self._connecting is None:
            if loop.time() < self._not_before:
                raise PodUnavailable(f"{self.address}: {self._why}")
            self._connecting = loop.create_task(self._open())
        try:
            return await asyncio.shield(self._connecting)
        except OSError as error:
            raise PodUnavailable(f"{self.address}: {error.strerror or error}") from None

    async def _open(self) -> Link:
        """Open a connection; several calls may wait for it.

        Raises:
            OSError
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                link = await connect(self.address, self._tls, lambda: Link(loop))
        except OSError as error:  # TimeoutError is one
            first, last = _BACKOFF_S
            backoff_s = min(last, first * 2.0**self._failures)
            self._failures = min(self._failures + 1, 8)
            self._not_before = loop.time() + backoff_s * (0.8 + 0.4 * self._rng.uniform(0, 1))
            self._why = reason(error) or "no connection in time"
            raise OSError(self._why) from None
        finally:
            self._connecting = None
        self._failures = 0
        if self.link is not None:
            self._old.append(self.link)
        self.link = link
        log.debug("connected to %s", self.address)
        return link

    def tick(self) -> None:
        self._old = [link for link in self._old if link.transport is not None]
        for link in self._links():
            link.tick()
            link.close_if_idle()

    @property
    def ended(self) -> bool:
        """Whether nothing leads there any more, nor will."""
        return self._connecting is None and all(link.transport is None for link in self._links())

    def forget(self) -> None:
        """Close once the calls under way have ended."""
        for link in self._links():
            link.forgotten = True
            link.close_if_idle()

    def close(self) -> None:
        """Close now."""
        if self._connecting is not None:
            self._connecting.cancel()
        for link in self._links():
            link.connection.fail(ErrorCode.NO_ERROR, "")
            link.flush()

    def abort(self) -> None:
        """Close without a word."""
        for link in self._links():
            link.abort()

    def _links(self) -> list[Link]:
        return self._old if self.link is None else [*self._old, self.link]


L = TypeVar("L", bound=Link)


async def connect(address: str, tls: Tls | None, make: Callable[[], L]) -> L:
    """Open a connection to host:port, or unix:PATH without TLS.

    Raises:
        OSError: `mesh.tls.reason` says why.
    """
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        return (await loop.create_unix_connection(make, address.removeprefix("unix:")))[1]
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise OSError("expected host:port")
    if tls is None:
        return (await loop.create_connection(make, host, int(port)))[1]
    name = tls.files.name or host
    transport, link = await loop.create_connection(make, host, int(port), ssl=tls.calling, server_hostname=name)
    if transport.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":  # RFC 9113 §3.2
        transport.abort()
        raise OSError("it does not speak HTTP/2 over TLS")
    return link
