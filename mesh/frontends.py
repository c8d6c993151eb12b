"""The front ends of `mesh.rpc` by name, and the client that goes with each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final, Protocol, cast

from mesh.rpc import Client, Handlers
from mesh.tls import Tls


class Server(Protocol):
    """Serves `Handlers`."""

    def listen(self, address: str) -> int:
        """Bind to `host:port` or `unix:path`; the port that was given.

        Raises:
            OSError: the address cannot be bound.
        """
        ...

    async def start(self, handlers: Handlers) -> None:
        """Begin to take calls."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s`, then cancel them. Safe to repeat."""
        ...


FRONTENDS: Final = {
    "h2": ("mesh.h2_server:H2Server", "mesh.h2_client:H2Client"),
    "grpcio": ("mesh.grpcio_server:GrpcioServer", "mesh.grpcio_client:GrpcioClient"),
}
"""The server and the client of each."""


def open_server(frontend: str, *, max_message_bytes: int, default_timeout_s: float, tls: Tls | None = None) -> Server:
    """`default_timeout_s`: the deadline of calls that come without one; `tls`: for all that is no Unix socket."""
    make = cast(Callable[..., Server], _load(FRONTENDS[frontend][0]))
    return make(max_message_bytes=max_message_bytes, default_timeout_s=default_timeout_s, tls=tls)


def open_client(frontend: str, *, tls: Tls | None = None) -> Client:
    return cast(Callable[..., Client], _load(FRONTENDS[frontend][1]))(tls=tls)


def _load(where: str) -> object:
    module, _, name = where.partition(":")
    return cast(object, getattr(import_module(module), name))
