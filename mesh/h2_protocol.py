"""What both ends have in common on asyncio: a connection of `mesh.http2` on a transport."""

from __future__ import annotations

import asyncio
import socket
from typing import Final, Generic, TypeVar, cast

from mesh.http2.connection import Connection
from mesh.http2.frames import ErrorCode

C = TypeVar("C", bound=Connection)

_HIGH_WATER: Final = 1 << 20
"""Bytes in the transport's buffer above which nothing more is put into it."""
TICK_S: Final = 1.0
"""How often connections look at the time."""


class H2Protocol(asyncio.Protocol, Generic[C]):
    """Carries bytes between a transport and a connection: one write for all that one read, or one turn of the loop,
    gave rise to."""

    connection: C

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self._reading = False
        self._scheduled = False
        self._paused_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.flush()

    def data_received(self, data: bytes) -> None:
        self._reading = True
        self.connection.receive(data)
        self._reading = False
        if self.connection.out or self.connection.fault is not None:
            self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.connection.lost()

    def pause_writing(self) -> None:
        """The peer does not read. What it asks for would only pile up, so nothing is read from it either."""
        self.connection.writable = False
        self._paused_at = self.loop.time()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.connection.writable = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self.flush()

    def tick(self) -> None:
        """Once every TICK_S."""
        connection = self.connection
        if connection.fault is not None:  # since the last tick: the farewell was not taken
            self.abort()
            return
        if not connection.writable and self.loop.time() - self._paused_at > connection.limits.stall_s:
            connection.lost(ErrorCode.ENHANCE_YOUR_CALM)
            self.abort()
            return
        connection.tick()
        self.flush()

    def wake(self) -> None:
        """There is something to write: write it with whatever else comes up in this turn of the loop."""
        if not self._reading and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write all there is, as long as the transport takes it."""
        connection, transport = self.connection, self.transport
        if transport is None or transport.is_closing():
            connection.out.clear()
            return
        while True:
            if connection.is_bulky:  # not joined: the kernel takes the parts as they are
                transport.writelines(connection.take_parts())
            elif connection.out:
                transport.write(connection.take())
            if not connection.sending:
                break
            connection.pump()
            if not connection.out:
                break
        if connection.fault is not None:
            transport.close()

    def abort(self) -> None:
        """Cut the connection off."""
        if self.transport is not None:
            self.transport.abort()
