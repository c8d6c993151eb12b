"""Calls to other pods over `mesh.http2`, messages as raw bytes: one multiplexed connection for each peer."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Mapping
from random import Random
from typing import Final

from mesh.errors import DeadlineExceeded, MeshError, PodUnavailable, answer_of
from mesh.h2_protocol import TICK_S, H2Protocol
from mesh.http2.client import UNAVAILABLE, ClientConnection, Exchange
from mesh.http2.frames import ErrorCode
from mesh.http2.grpc import fields_of, timeout_field
from mesh.http2.hpack import Field
from mesh.http2.limits import Limits
from mesh.rpc import Metadata

log = logging.getLogger(__name__)

_LIMITS: Final = Limits(
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
_TRIES: Final = 3
"""Of a call that the peer never processed."""
_CONNECT_S: Final = 5.0
_BACKOFF_S: Final = (0.1, 2.0)
"""After the first failed connection, doubling up to the last; calls in between fail at once."""


class H2Client:
    """Implements `mesh.rpc.Client`."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, rng: Random | None = None) -> None:
        """`tls`: with the authority, and for mTLS our certificate, loaded; `rng` draws the backoff's jitter."""
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        self._tls = tls
        self._rng = rng or Random()
        self._peers: dict[str, _Peer] = {}
        self._forgotten: list[_Peer] = []
        """Peers whose last calls are under way: they may hang like any other."""
        self._ticking: asyncio.TimerHandle | None = None

    async def call(
        self, address: str, method: str, message: bytes, metadata: Metadata, deadline: float
    ) -> tuple[bytes, Mapping[str, str]]:
        if not address:
            raise PodUnavailable("the pod has no address")
        loop = asyncio.get_running_loop()
        if self._ticking is None:
            self._ticking = loop.call_later(TICK_S, self._tick)
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address, self._tls, self._rng)
        fields: list[Field] = [
            (b":method", b"POST"),
            (b":scheme", b"https" if self._tls else b"http"),
            (b":path", method.encode()),
            (b":authority", peer.authority),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *fields_of(list(metadata)),
        ]
        for left in range(_TRIES - 1, -1, -1):
            exchange = await peer.exchange(fields, message, deadline)
            if not (exchange.unprocessed and left):
                break
        if exchange.status == 0 and exchange.message is not None:
            return exchange.message, {key: value for key, value in exchange.headers if isinstance(value, str)}
        raise _as_mesh_error(exchange, address)

    async def forget(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.forget()
            self._forgotten.append(peer)

    async def close(self) -> None:
        for peer in (*self._peers.values(), *self._forgotten):
            peer.close()
        self._peers.clear()
        self._forgotten.clear()
        await asyncio.sleep(0)  # transports tell that they are closed in the next turn of the loop
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _tick(self) -> None:
        self._forgotten = [peer for peer in self._forgotten if not peer.ended]
        for peer in (*self._peers.values(), *self._forgotten):
            peer.tick()
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)


class _Link(H2Protocol[ClientConnection]):
    """One connection, and the calls that wait for a free stream on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.forgotten = False
        self.connection = ClientConnection(_LIMITS, loop.time, self._freed)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
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

    def _freed(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        self.close_if_idle()

    def close_if_idle(self) -> None:
        connection = self.connection
        if (connection.draining or self.forgotten) and not connection.streams and connection.fault is None:
            connection.fail(ErrorCode.NO_ERROR, "")
            self.wake()


class _Peer:
    """What leads to one address: the connection in use, and when another may be tried."""

    def __init__(self, address: str, tls: ssl.SSLContext | None, rng: Random) -> None:
        self.address = address
        self.authority = b"localhost" if address.startswith("unix:") else address.encode()
        self._tls = tls
        self._rng = rng
        self._link: _Link | None = None
        self._old: list[_Link] = []
        """Links that take no new calls, until their last has ended."""
        self._connecting: asyncio.Task[_Link] | None = None
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

        def finished(exchange: Exchange) -> None:
            if not answered.done():
                answered.set_result(None)

        exchange = Exchange(finished)
        link = self._link
        if link is None or not link.connection.open or link.connection.full:
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
            link = self._link
            if link is None or not link.connection.open:
                exchange.unprocessed = True
                exchange.status, exchange.text = UNAVAILABLE, "the connection was lost"
                return exchange
        connection = link.connection
        timeout_s = max(0.001, deadline - loop.time())
        stream = connection.request([*fields, (b"grpc-timeout", timeout_field(timeout_s))], message, exchange)
        link.wake()
        timer = loop.call_at(deadline, _expire, exchange)
        try:
            await answered
        except asyncio.CancelledError:
            connection.cancel(stream)
            link.wake()
            raise
        finally:
            timer.cancel()
        if connection.streams.get(stream.id) is stream:  # the deadline passed
            connection.cancel(stream)
            link.wake()
        return exchange

    async def _ready(self) -> None:
        """Return when a call can be made.

        Raises:
            PodUnavailable: the peer cannot be reached, or could not a moment ago.
        """
        while True:
            link = self._link
            if link is None or not link.connection.open:
                link = await self._connect()
            if not link.connection.full or not link.connection.open:
                return
            await link.free()

    async def _connect(self) -> _Link:
        loop = asyncio.get_running_loop()
        if self._connecting is None:
            if loop.time() < self._not_before:
                raise PodUnavailable(f"{self.address}: {self._why}")
            self._connecting = loop.create_task(self._open())
        try:
            return await asyncio.shield(self._connecting)
        except OSError as error:
            raise PodUnavailable(f"{self.address}: {error.strerror or error}") from None

    async def _open(self) -> _Link:
        """Open a connection; several calls may wait for it.

        Raises:
            OSError
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                link = await self._transport(loop)
        except OSError as error:  # TimeoutError is one
            first, last = _BACKOFF_S
            backoff_s = min(last, first * 2.0**self._failures)
            self._failures = min(self._failures + 1, 8)
            self._not_before = loop.time() + backoff_s * (0.8 + 0.4 * self._rng.uniform(0, 1))
            self._why = str(error.strerror or error or "no connection in time")
            raise OSError(self._why) from None
        finally:
            self._connecting = None
        self._failures = 0
        if self._link is not None:
            self._old.append(self._link)
        self._link = link
        log.debug("connected to %s", self.address)
        return link

    async def _transport(self, loop: asyncio.AbstractEventLoop) -> _Link:
        if self.address.startswith("unix:"):
            _, link = await loop.create_unix_connection(lambda: _Link(loop), self.address.removeprefix("unix:"))
            return link
        host, _, port = self.address.rpartition(":")
        host = host.strip("[]")
        if not (host and port.isdecimal() and int(port) < 1 << 16):
            raise OSError("expected host:port")
        _, link = await loop.create_connection(
            lambda: _Link(loop), host, int(port), ssl=self._tls, server_hostname=host if self._tls else None
        )
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

    def _links(self) -> list[_Link]:
        return self._old if self._link is None else [*self._old, self._link]


def _expire(exchange: Exchange) -> None:
    exchange.end(DeadlineExceeded.code, "the deadline passed before the peer answered")


def _as_mesh_error(exchange: Exchange, address: str) -> MeshError:
    """The peer's answer as an error of ours."""
    trailers = {key: value for key, value in exchange.trailers or exchange.headers if isinstance(value, str)}
    pushback = trailers.get("grpc-retry-pushback-ms", "")
    return answer_of(
        exchange.status,
        trailers.get("densemesh-reason", ""),
        exchange.text,
        address=address,
        retry_after_ms=int(pushback) if pushback.isdigit() else None,
    )
