"""The calls of one client's connection: begun, driven, answered, given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, cast

from mesh.errors import Code, DeadlineExceeded, InternalError, MeshError
from mesh.h2_calls import Compressed, Running, unpacked
from mesh.h2_protocol import H2Protocol
from mesh.h2_relay import Passage, pass_on, pass_start
from mesh.h2_shared import TAKEN, Method, Shared
from mesh.h2_streaming import Incoming, conduct_stream
from mesh.http2.frames import ErrorCode
from mesh.http2.grpc import RequestHead
from mesh.http2.hpack import Field
from mesh.http2.server import ACCEPTED, ServerConnection
from mesh.http2.streams import State, Stream
from mesh.rpc import Begun, Call

log = logging.getLogger(__name__)

_LATE: Final = "the deadline passed before the request was served"


class _Waiting:
    """A unary call whose end has not come, and whose one message has, unless it was on its way elsewhere in vain."""

    __slots__ = ("begun", "compressed", "message", "method")

    def __init__(self, method: Method, message: bytes | None, *, compressed: bool, begun: Begun | None = None) -> None:
        self.method = method
        self.message = message
        self.compressed = compressed
        self.begun = begun


class ServerProtocol(H2Protocol[ServerConnection]):
    """One client's connection, and the calls on it (`mesh.http2.calls.Calls`)."""

    def __init__(self, server: Shared[ServerProtocol], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.server = server
        self._methods = server.methods
        self._streams = server.streams
        self.connection = ServerConnection(server.limits, loop.time, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.selected_alpn_protocol() != "h2":  # RFC 9113 §3.2
            cast(asyncio.Transport, transport).abort()
            return
        self.server.connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        super().connection_lost(error)

    def tick(self) -> None:
        super().tick()
        now = self.connection.clock()
        for stream in list(self.connection.streams.values()):
            if isinstance(stream.owner, Method | _Waiting) and now > self.deadline(stream):
                self.fail(stream, DeadlineExceeded("the deadline passed before the request was received"), None)
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
        method = self._methods.get(head.path)
        if method is not None:
            stream.owner = method
            return
        handler = self._streams.get(head.path)
        if handler is None:
            self.connection.status(stream, Code.UNIMPLEMENTED, "Method not found!")
            return
        limits = self.connection.limits
        incoming = Incoming(head, limits.max_message_bytes, lambda: self._taken(stream))
        task = self.loop.create_task(conduct_stream(self, stream, handler, incoming))
        self.server.watch(task)
        running = stream.owner = Running(task, incoming)
        if head.timeout_s is not None:
            running.timer = self.loop.call_at(self.deadline(stream), self.expire, stream)

    def whole(self, stream: Stream, head: RequestHead, message: bytes) -> None:
        method = self._methods.get(head.path)
        if method is not None:
            self._begun(stream, method, message, compressed=False)
            return
        self.begin(stream, head)
        if stream.owner is not None:
            self.message(stream, message, compressed=False, ended=True)

    def opening(self, stream: Stream, piece: bytes) -> None:
        method = stream.owner
        if type(method) is Method and method.relay is not None and not stream.flag:
            pass_start(self, stream, method.relay, piece, self.deadline(stream))

    def message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        owner = stream.owner
        if type(owner) is Method:
            if ended:
                self._begun(stream, owner, message, compressed=compressed)
            else:
                stream.owner = _Waiting(owner, message, compressed=compressed)
        elif type(owner) is _Waiting and owner.message is None:
            owner.message = message
            if ended:
                self.end(stream)
        elif type(owner) is _Waiting or type(owner) is Passage:
            self.aborted(stream)
            self.connection.status(stream, Code.UNIMPLEMENTED, "several messages in a unary call")
        elif owner.incoming is not None:
            owner.incoming.put(message, compressed=compressed)
            stream.held = owner.incoming.size >= self.connection.limits.stream_window
            if ended:
                owner.incoming.end()

    def end(self, stream: Stream) -> None:
        owner = stream.owner
        if type(owner) is Method:
            self.connection.status(stream, Code.UNIMPLEMENTED, "no message in a unary call")
        elif type(owner) is Passage:
            owner.finish()
        elif type(owner) is _Waiting:
            assert owner.message is not None
            if owner.begun is None:
                self._begun(stream, owner.method, owner.message, compressed=owner.compressed)
            else:
                self._run(stream, owner.method, owner.message, compressed=False, begun=owner.begun)
        elif owner.incoming is not None:
            owner.incoming.end()

    def aborted(self, stream: Stream) -> None:
        owner = stream.owner
        stream.owner = None
        if isinstance(owner, Running | Passage):
            owner.cancel()

    def deadline(self, stream: Stream) -> float:
        """Loop time at which the client gives up."""
        timeout_s = stream.head.timeout_s
        return stream.since + (self.server.default_timeout_s if timeout_s is None else timeout_s)

    def expire(self, stream: Stream) -> None:
        """The deadline of a call has passed."""
        if stream.id in self.connection.streams and stream.owner is not None:
            self.aborted(stream)
            self.fail(stream, DeadlineExceeded(_LATE), None)
            self.wake()

    # Unary

    def _begun(self, stream: Stream, method: Method, message: bytes, *, compressed: bool) -> None:
        """All of a unary call is there."""
        quick, relay = method.quick, method.relay
        if not compressed:
            deadline = self.deadline(stream)
            if relay is not None and method.is_elsewhere and pass_on(self, stream, relay, message, deadline):
                return
            if quick is not None:
                stream.owner = TAKEN
                if quick(self, stream, stream.head, message, deadline):
                    method.is_elsewhere = False
                    return
            if relay is not None and not method.is_elsewhere and pass_on(self, stream, relay, message, deadline):
                method.is_elsewhere = True
                return
        self._run(stream, method, message, compressed=compressed)

    def _run(
        self, stream: Stream, method: Method, message: bytes, *, compressed: bool, begun: Begun | None = None
    ) -> None:
        """Run the handler."""
        head: RequestHead = stream.head
        call = Call(head.path, head.metadata, self.deadline(stream), keys=head.keys, memo=head.memo, begun=begun)
        stream.owner = None
        if call.deadline <= self.loop.time():
            self.fail(stream, DeadlineExceeded(_LATE), None)
        elif compressed:
            most_bytes = self.connection.limits.max_message_bytes
            self._drive(stream, call, unpacked(method.handler, call, message, stream, most_bytes))
        else:
            self._drive(stream, call, cast(Coroutine[Any, Any, bytes], method.handler(call, message)))

    def _drive(self, stream: Stream, call: Call, work: Coroutine[Any, Any, bytes]) -> None:
        """Serve a unary call; most end right here."""
        server = self.server
        spare = server.spare(self.loop)
        try:
            yielded = spare.step(work)
        except StopIteration as done:
            server.keep(spare)
            self._reply(stream, call, done.value)
        except Exception as error:
            server.keep(spare)
            self.fail(stream, error, call)
        else:
            server.watch(spare.task)
            running = stream.owner = Running(spare)
            running.timer = self.loop.call_at(call.deadline, self.expire, stream)
            spare.take_over(work, yielded, lambda rest: self._conduct(stream, running, call, rest))

    async def _conduct(self, stream: Stream, running: Running, call: Call, work: Coroutine[Any, Any, bytes]) -> None:
        """The rest of a unary call that had to wait."""
        try:
            response = await work
        except asyncio.CancelledError:
            if stream.owner is running:  # not by us
                self.fail(stream, DeadlineExceeded("the call was cancelled"), call)
        except Exception as error:
            if stream.owner is running:
                self.fail(stream, error, call)
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
            connection.start(stream, self.server.head(call, encoding=stream.head.encoding))
            connection.send_message(stream, response, compressed=True)
            if stream.id in connection.streams:
                connection.status(stream, Code.OK, "")
        else:
            connection.reply(stream, self.server.head(call), response)
        stream.owner = None

    def fail(self, stream: Stream, error: Exception, call: Call | None) -> None:
        """End a call with the error's status."""
        stream.owner = None
        connection = self.connection
        if connection.streams.get(stream.id) is not stream:
            return
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded(_LATE)
        if call is not None and call.reply_metadata and not stream.started:
            connection.start(stream, self.server.head(call))
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

    # Calls that were taken (`mesh.rpc.Caller`)

    def settle(self, call: Stream, headers: tuple[tuple[str, str], ...], response: bytes) -> None:
        if call.owner is TAKEN:
            call.owner = None
            self.connection.reply(call, self.server.block(headers), response)

    def give_back(self, call: Stream, message: bytes) -> None:
        if call.owner is TAKEN:
            self._run(call, self._methods[call.head.path], message, compressed=False)
            self.wake()

    # Calls that are passed on (`mesh.h2_relay.Inbound`)

    def take_back(self, stream: Stream, message: bytes | None, begun: Begun | None) -> None:
        method = self._methods[stream.head.path]
        if message is not None and stream.state is State.REMOTE:
            self._run(stream, method, message, compressed=False, begun=begun)
        else:
            stream.owner = _Waiting(method, message, compressed=False, begun=begun)
        self.wake()

    def _taken(self, stream: Stream) -> None:
        """The handler took a message: there is room for others."""
        if stream.held and stream.state in (State.OPEN, State.LOCAL):
            stream.held = False
            self.connection.credit(stream)
            self.wake()
