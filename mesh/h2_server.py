"""The HTTP/2 front end of `mesh.rpc`, on `mesh.http2`: what serves requests where throughput matters."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, Final

from mesh import uds
from mesh.h2_protocol import TICK_S
from mesh.h2_serving import ServerProtocol
from mesh.h2_shared import Shared
from mesh.http2.limits import Limits
from mesh.rpc import Handlers
from mesh.tls import Tls

_FAREWELL_S: Final = 0.5
"""For clients to take the last bytes."""


class H2Server:
    """Serves `Handlers` on one or more addresses: `listen`, `start`, `stop`."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        default_timeout_s: float,
        limits: Limits | None = None,
        tls: Tls | None = None,
    ) -> None:
        """`tls`: for all that is no Unix socket."""
        limits = limits or Limits(
            max_message_bytes=max_message_bytes,
            max_buffered_bytes=2 * max_message_bytes,
            max_unsent_bytes=max(4 * max_message_bytes, 64 << 20),
        )
        self._shared: Shared[ServerProtocol] = Shared(limits, default_timeout_s)
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._paths: list[Path] = []
        self._listeners: list[asyncio.Server] = []
        self._ticking: asyncio.TimerHandle | None = None

    def listen(self, address: str) -> int:
        """Bind to `host:port` or `unix:path`; the port that was given, 0 for a path.

        Raises:
            OSError: the address cannot be bound.
        """
        if address.startswith("unix:"):
            path = uds.free(address)
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sockets.append(unix)
            unix.bind(os.fspath(path))
            self._paths.append(path)
            return 0
        host, _, port_text = address.rpartition(":")
        host, port = host.strip("[]"), int(port_text)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in dict.fromkeys(found):
            tcp = socket.socket(family, kind, protocol)
            self._sockets.append(tcp)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            tcp.bind((where[0], port, *where[2:]))
            port = tcp.getsockname()[1]  # for the other addresses of the same name
        return port

    async def start(self, handlers: Handlers) -> None:
        """Begin to take calls."""
        self._shared.serve(handlers)
        loop = asyncio.get_running_loop()
        for bound in self._sockets:
            bound.setblocking(False)
            secured: dict[str, Any] = {}
            if self._tls is not None and bound.family != socket.AF_UNIX:
                secured = {"ssl": self._tls.accepting, "ssl_handshake_timeout": self._shared.limits.handshake_s}
            listener = await loop.create_server(
                lambda: ServerProtocol(self._shared, loop), sock=bound, backlog=1024, **secured
            )
            self._listeners.append(listener)
        self._ticking = loop.call_later(TICK_S, self._tick)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s`, then cancel them. Safe to repeat."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for bound in self._sockets:
            bound.close()
        self._sockets.clear()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths.clear()
        for protocol in list(self._shared.connections):
            protocol.drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self._busy() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for protocol in list(self._shared.connections):
            protocol.close()
        if self._shared.tasks:
            await asyncio.wait(self._shared.tasks)
        deadline = loop.time() + _FAREWELL_S
        while self._shared.connections and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for protocol in list(self._shared.connections):
            protocol.abort()
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        self._shared.close()

    def _busy(self) -> bool:
        return any(protocol.connection.streams for protocol in self._shared.connections)

    def _tick(self) -> None:
        for protocol in list(self._shared.connections):
            protocol.tick()
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)
