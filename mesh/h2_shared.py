"""What the connections of one HTTP/2 server share: settings, tasks, and header blocks made once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

from mesh.h2_calls import Spare
from mesh.http2.grpc import fields_of
from mesh.http2.hpack_encoder import literal
from mesh.http2.limits import Limits
from mesh.http2.server import RESPONSE
from mesh.rpc import Call, Handlers, Quick, Relay, Stream, Unary

P = TypeVar("P")
"""A connection's protocol."""

_PLAIN_HEAD: Final = literal(RESPONSE)
_KEPT_HEADS: Final = 1_024


TAKEN: Final = object()
"""Owner of streams whose call a `Quick` has taken."""


class Method:
    """A unary method: who serves it, and who is asked first."""

    __slots__ = ("handler", "is_elsewhere", "quick", "relay")

    def __init__(self, handler: Unary, quick: Quick | None, relay: Relay | None) -> None:
        self.handler = handler
        self.quick = quick
        self.relay = relay
        self.is_elsewhere = False
        """The last call was passed on: ask the relay first."""


class Shared(Generic[P]):
    """What the connections of one server share."""

    def __init__(self, limits: Limits, default_timeout_s: float) -> None:
        self.limits = limits
        self.default_timeout_s = default_timeout_s
        self.methods: dict[str, Method] = {}
        self.streams: Mapping[str, Stream] = {}
        self.connections: set[P] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._spares: list[Spare[bytes]] = []
        self._heads: dict[tuple[tuple[str, str], ...], bytes] = {}

    def serve(self, handlers: Handlers) -> None:
        """What new connections are for."""
        self.methods = {
            path: Method(unary, handlers.quick.get(path), handlers.relays.get(path))
            for path, unary in handlers.unary.items()
        }
        self.streams = handlers.streams

    def spare(self, loop: asyncio.AbstractEventLoop) -> Spare[bytes]:
        """A task for a handler's first step; given back with `keep` if it was not needed longer."""
        return self._spares.pop() if self._spares else Spare(loop)

    def keep(self, spare: Spare[bytes]) -> None:
        self._spares.append(spare)

    def watch(self, task: asyncio.Task[None]) -> None:
        """Wait for the task before `stop` returns."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def head(self, call: Call, *, encoding: str = "") -> bytes:
        """The block of a response's headers."""
        if not call.reply_metadata and not encoding:
            return _PLAIN_HEAD
        headers = tuple(call.reply_metadata.items())
        if encoding:
            return literal([*RESPONSE, *fields_of(list(headers)), (b"grpc-encoding", encoding.encode())])
        return self.block(headers)

    def block(self, headers: tuple[tuple[str, str], ...]) -> bytes:
        """The block of a response's headers that carry these."""
        block = self._heads.get(headers)
        if block is None:
            if len(self._heads) >= _KEPT_HEADS:
                self._heads.clear()
            block = self._heads[headers] = literal([*RESPONSE, *fields_of(list(headers))])
        return block

    def close(self) -> None:
        """No more calls will come."""
        for spare in self._spares:
            spare.cancel()
        self._spares.clear()
