"""The front ends of `mesh.rpc` by name, and the client that goes with each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final, Protocol, cast

from mesh.rpc import Client, Handlers


class Server(Protocol):
    """Serves `Handlers`."""

    def listen(self, address: str) -> int:
        """Bind; the port that was given.

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


def open_server(frontend: str, *, max_message_bytes: int, default_timeout_s: float) -> Server:
    """`default_timeout_s`: the deadline of calls that come without one."""
    make = cast(Callable[..., Server], _load(FRONTENDS[frontend][0]))
    return make(max_message_bytes=max_message_bytes, default_timeout_s=default_timeout_s)


def open_client(frontend: str) -> Client:
    return cast(Callable[[], Client], _load(FRONTENDS[frontend][1]))()


def _load(where: str) -> object:
    module, _, name = where.partition(":")
    return cast(object, getattr(import_module(module), name))
