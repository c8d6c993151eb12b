"""The calls of one client's connection: begun, driven, answered, given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, cast

from mesh.errors import Code, DeadlineExceeded, InternalError, MeshError
from mesh.h2_calls import Compressed, Incoming, Spare, unpacked
from mesh.h2_protocol import H2Protocol
from mesh.h2_relay import Passage, pass_on
from mesh.h2_shared import Shared
from mesh.http2.frames import ErrorCode
from mesh.http2.grpc import RequestHead
from mesh.http2.hpack import Field
from mesh.http2.server import ACCEPTED, ServerConnection
from mesh.http2.streams import State, Stream
from mesh.rpc import Call
from mesh.rpc import Stream as StreamHandler
from mesh.rpc import Unary as UnaryHandler

log = logging.getLogger(__name__)

_UNSENT_BYTES: Final = 1 << 20
"""A stream's handler waits while more than this waits to be sent."""
_LATE: Final = "the deadline passed before the request was served"


class _Waiting:
    """A unary call that has not begun: its one message, once it is there."""

    __slots__ = ("handler", "message")

    def __init__(self, handler: UnaryHandler) -> None:
        self.handler = handler
        self.message: tuple[bytes, bool] | None = None


class _Running:
    """A call whose handler waits for something."""

    __slots__ = ("incoming", "task", "timer")

    def __init__(self, task: asyncio.Task[None] | Spare[bytes], incoming: Incoming | None = None) -> None:
        self.task = task
        self.incoming = incoming
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.task.cancel()


class ServerProtocol(H2Protocol[ServerConnection]):
    """One client's connection, and the calls on it (`mesh.http2.server.Calls`)."""

    def __init__(self, server: Shared[ServerProtocol], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._server = server
        self._unary = server.handlers.unary
        self._streams = server.handlers.streams
        self.connection = ServerConnection(server.limits, loop.time, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() != "h2":  # RFC 9113 §3.2
            cast(asyncio.Transport, transport).abort()
            return
        self._server.connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        super().connection_lost(error)

    def tick(self) -> None:
        super().tick()
        now = self.connection.clock()
        for stream in list(self.connection.streams.values()):
            if isinstance(stream.owner, _Waiting) and now > self._deadline(stream):
                self._fail(stream, DeadlineExceeded("the deadline passed before the request was received"), None)
        self.flush()

    def drain(self) -> None:
        """Take no new calls."""
        self.connection.drain()
        self.flush()

    def close(self) -> None:
        """Cancel what runs and close."""
        self.connection.fail(ErrorCode.NO_ERROR, "shutting down")
        self.flush()

    # Calls

    def begin(self, stream: Stream, head: RequestHead) -> None:
        unary = self._unary.get(head.path)
        if unary is not None:
            stream.owner = _Waiting(unary)
            return
        handler = self._streams.get(head.path)
        if handler is None:
            self.connection.status(stream, Code.UNIMPLEMENTED, "Method not found!")
            return
        limits = self.connection.limits
        incoming = Incoming(head, limits.max_message_bytes, lambda: self._taken(stream))
        task = self.loop.create_task(self._conduct_stream(stream, handler, incoming))
        self._server.watch(task)
        running = stream.owner = _Running(task, incoming)
        if head.timeout_s is not None:
            running.timer = self.loop.call_at(self._deadline(stream), self.expire, stream)

    def message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        owner = stream.owner
        if type(owner) is _Waiting:
            if ended and owner.message is None:
                self._run(stream, owner.handler, message, compressed=compressed)
            elif owner.message is None:
                owner.message = message, compressed
            else:
                self.connection.status(stream, Code.UNIMPLEMENTED, "several messages in a unary call")
        elif owner.incoming is not None:
            owner.incoming.put(message, compressed=compressed)
            stream.held = owner.incoming.size >= self.connection.limits.stream_window
            if ended:
                owner.incoming.end()

    def end(self, stream: Stream) -> None:
        owner = stream.owner
        if type(owner) is _Waiting:
            if owner.message is None:
                self.connection.status(stream, Code.UNIMPLEMENTED, "no message in a unary call")
            else:
                message, compressed = owner.message
                self._run(stream, owner.handler, message, compressed=compressed)
        elif owner.incoming is not None:
            owner.incoming.end()

    def aborted(self, stream: Stream) -> None:
        owner = stream.owner
        stream.owner = None
        if isinstance(owner, _Running | Passage):
            owner.cancel()

    def _deadline(self, stream: Stream) -> float:
        timeout_s = stream.head.timeout_s
        return stream.since + (self._server.default_timeout_s if timeout_s is None else timeout_s)

    def expire(self, stream: Stream) -> None:
        """The deadline of a call has passed."""
        if stream.id in self.connection.streams and stream.owner is not None:
            self.aborted(stream)
            self._fail(stream, DeadlineExceeded(_LATE), None)
            self.wake()

    # Unary

    def _run(self, stream: Stream, handler: UnaryHandler, message: bytes, *, compressed: bool) -> None:
        """Pass a unary call on, or serve it here."""
        head: RequestHead = stream.head
        connection = self.connection
        call = Call(head.path, head.metadata, self._deadline(stream), keys=head.keys, memo=head.memo)
        if call.deadline <= connection.received_at:
            self._fail(stream, DeadlineExceeded(_LATE), None)
        elif compressed:
            work = unpacked(handler, call, message, stream, connection.limits.max_message_bytes)
            self._drive(stream, call, work)
        else:
            relay = self._server.handlers.relays.get(head.path)
            if relay is None or not pass_on(self, stream, handler, relay, call, message, connection.received_at):
                self._drive(stream, call, cast(Coroutine[Any, Any, bytes], handler(call, message)))

    def _drive(self, stream: Stream, call: Call, work: Coroutine[Any, Any, bytes]) -> None:
        """Serve a unary call; most end right here."""
        server = self._server
        spare = server.spare(self.loop)
        try:
            yielded = spare.step(work)
        except StopIteration as done:
            server.keep(spare)
            self._reply(stream, call, done.value)
        except Exception as error:
            server.keep(spare)
            self._fail(stream, error, call)
        else:
            server.watch(spare.task)
            running = stream.owner = _Running(spare)
            running.timer = self.loop.call_at(call.deadline, self.expire, stream)
            spare.take_over(work, yielded, lambda rest: self._conduct(stream, running, call, rest))

    async def _conduct(self, stream: Stream, running: _Running, call: Call, work: Coroutine[Any, Any, bytes]) -> None:
        """The rest of a unary call that had to wait."""
        try:
            response = await work
        except asyncio.CancelledError:
            if stream.owner is running:  # not by us
                self._fail(stream, DeadlineExceeded("the call was cancelled"), call)
        except Exception as error:
            if stream.owner is running:
                self._fail(stream, error, call)
        else:
            if stream.owner is running:
                self._reply(stream, call, response)
        if running.timer is not None:
            running.timer.cancel()
        self.wake()

    def _reply(self, stream: Stream, call: Call, response: bytes) -> None:
        connection = self.connection
        if connection.streams.get(stream.id) is not stream:
            return  # gone while the handler took its first step
        if type(response) is Compressed:
            connection.start(stream, self._server.head(call, encoding=stream.head.encoding))
            connection.send_message(stream, response, compressed=True)
            if stream.id in connection.streams:
                connection.status(stream, Code.OK, "")
        else:
            connection.reply(stream, self._server.head(call), response)
        stream.owner = None

    def _fail(self, stream: Stream, error: Exception, call: Call | None) -> None:
        """End a call with the error's status."""
        stream.owner = None
        connection = self.connection
        if connection.streams.get(stream.id) is not stream:
            return
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded(_LATE)
        if call is not None and call.reply_metadata and not stream.started:
            connection.start(stream, self._server.head(call))
        if not isinstance(error, MeshError):
            log.error("%s broke", stream.head.path, exc_info=error)
            error = InternalError()
        fields: list[Field] = []
        if error.reason:
            fields.append((b"densemesh-reason", error.reason.encode()))
        if error.retry_after_ms is not None:
            fields.append((b"grpc-retry-pushback-ms", b"%d" % error.retry_after_ms))
        if error.code is Code.UNIMPLEMENTED:
            fields.append(ACCEPTED)
        connection.status(stream, error.code, str(error), fields)

    # Calls that are passed on (`mesh.h2_relay.Inbound`)

    def answer(self, stream: Stream, headers: tuple[tuple[str, str], ...], response: bytes) -> None:
        stream.owner = None
        self.connection.reply(stream, self._server.block(headers), response)
        if not self._scheduled:
            self.wake()

    def refuse(self, stream: Stream, call: Call, error: MeshError) -> None:
        self._fail(stream, error, call)
        self.wake()

    def handle(self, stream: Stream, handler: UnaryHandler, call: Call, message: bytes) -> None:
        self._drive(stream, call, cast(Coroutine[Any, Any, bytes], handler(call, message)))
        self.wake()

    # Streaming

    async def _conduct_stream(self, stream: Stream, handler: StreamHandler, incoming: Incoming) -> None:
        """All of a streaming call."""
        connection = self.connection
        call = Call(stream.head.path, stream.head.metadata, self._deadline(stream), keys=stream.head.keys)
        room = asyncio.Event()
        stream.on_room = room.set
        try:
            async for response in handler(call, incoming):
                if not stream.started:
                    connection.start(stream, self._server.head(call))
                connection.send_message(stream, response)
                self.wake()
                if connection.streams.get(stream.id) is not stream:
                    return  # the client does not take what it is sent
                while stream.queued > _UNSENT_BYTES:
                    room.clear()
                    await room.wait()
            if not stream.started:
                connection.start(stream, self._server.head(call))
            connection.status(stream, Code.OK, "")
        except asyncio.CancelledError:
            if stream.owner is not None:  # not by us
                self._fail(stream, DeadlineExceeded("the call was cancelled"), call)
        except Exception as error:
            self._fail(stream, error, call)
        owner = stream.owner
        stream.owner = None
        if isinstance(owner, _Running) and owner.timer is not None:
            owner.timer.cancel()
        self.wake()

    def _taken(self, stream: Stream) -> None:
        """The handler took a message: there is room for others."""
        if stream.held and stream.state in (State.OPEN, State.LOCAL):
            stream.held = False
            self.connection.credit(stream)
            self.wake()
