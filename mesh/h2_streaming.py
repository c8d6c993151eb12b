"""Streaming calls of the HTTP/2 front end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from mesh.errors import Code, DeadlineExceeded
from mesh.h2_calls import Running, inflated
from mesh.h2_shared import Shared
from mesh.http2.grpc import RequestHead
from mesh.http2.server import ServerConnection
from mesh.http2.streams import Stream
from mesh.rpc import Call
from mesh.rpc import Stream as StreamHandler

_UNSENT_BYTES: Final = 1 << 20
"""A stream's handler waits while more than this waits to be sent."""


class Incoming:
    """The messages of a streaming call, as its handler reads them."""

    def __init__(self, head: RequestHead, most_bytes: int, on_taken: Callable[[], None]) -> None:
        self._head = head
        self._most_bytes = most_bytes
        self._on_taken = on_taken
        self._messages: deque[tuple[bytes, bool]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self.size = 0
        """Bytes of messages that were not taken."""

    def put(self, message: bytes, *, compressed: bool) -> None:
        self._messages.append((message, compressed))
        self.size += len(message)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Incoming:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message, compressed = self._messages.popleft()
        self.size -= len(message)
        self._on_taken()
        return await inflated(message, self._head, self._most_bytes) if compressed else message


class Conductor(Protocol):
    """The connection that a call came on."""

    connection: ServerConnection
    server: Shared[Any]

    def deadline(self, stream: Stream) -> float: ...

    def fail(self, stream: Stream, error: Exception, call: Call | None) -> None: ...

    def wake(self) -> None: ...


async def conduct_stream(inbound: Conductor, stream: Stream, handler: StreamHandler, incoming: Incoming) -> None:
    """All of a streaming call."""
    connection = inbound.connection
    call = Call(stream.head.path, stream.head.metadata, inbound.deadline(stream), keys=stream.head.keys)
    room = asyncio.Event()
    stream.on_room = room.set
    try:
        async for response in handler(call, incoming):
            if not stream.started:
                connection.start(stream, inbound.server.head(call))
            connection.send_message(stream, response)
            inbound.wake()
            if connection.streams.get(stream.id) is not stream:
                return  # the client does not take what it is sent
            while stream.queued > _UNSENT_BYTES:
                room.clear()
                await room.wait()
        if not stream.started:
            connection.start(stream, inbound.server.head(call))
        connection.status(stream, Code.OK, "")
    except asyncio.CancelledError:
        if stream.owner is not None:  # not by us
            inbound.fail(stream, DeadlineExceeded("the call was cancelled"), call)
    except Exception as error:
        inbound.fail(stream, error, call)
    owner = stream.owner
    stream.owner = None
    if isinstance(owner, Running) and owner.timer is not None:
        owner.timer.cancel()
    inbound.wake()
