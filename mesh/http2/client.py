"""The client's role: unary calls to streams, frames to outcomes (gRPC over HTTP/2, "Requests", "Responses")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mesh.http2 import frames
from mesh.http2.connection import Connection
from mesh.http2.exchange import Exchange
from mesh.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    HEAD,
    HEADERS,
    MAX_STREAM_ID,
    MESSAGE_HEAD,
    PREFIX,
    ErrorCode,
)
from mesh.http2.grpc import ResponseHead, response_head
from mesh.http2.hpack import Decoder
from mesh.http2.limits import Limits
from mesh.http2.streams import CLOSED, ERRORS, LOCAL, OPEN, TRANSITIONS, Fault, Move, Stream

CANCELLED: Final = 1
UNKNOWN: Final = 2
PERMISSION_DENIED: Final = 7
RESOURCE_EXHAUSTED: Final = 8
INTERNAL: Final = 13
UNAVAILABLE: Final = 14

_LAST: Final = END_HEADERS | END_STREAM
_BY_RESET: Final = {
    ErrorCode.REFUSED_STREAM: UNAVAILABLE,
    ErrorCode.CANCEL: CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: PERMISSION_DENIED,
}
"""gRPC's status for a stream that was reset; INTERNAL for other codes."""
_BY_HTTP: Final = {"400": 13, "401": 16, "403": 7, "404": 12, "429": 14, "502": 14, "503": 14, "504": 14}
"""grpc/doc/http-grpc-status-mapping.md, for answers without grpc-status; UNKNOWN for other statuses."""

UNHEARD: Final = "the connection was lost before the first answer; TLS or another certificate may be expected"


class ClientConnection(Connection):
    """One connection to a server."""

    def __init__(self, limits: Limits, clock: Callable[[], float], freed: Callable[[], None]) -> None:
        """`freed` is called when a stream has ended, and another may begin."""
        decoder = Decoder(response_head, table_bytes=limits.table_bytes, list_bytes=limits.max_header_bytes)
        super().__init__(limits, clock, decoder)
        self._freed = freed
        self.out.append(frames.PREFACE)
        self.hello()
        self._next_id = 1

    @property
    def open(self) -> bool:
        """Whether calls can be made on this connection, now or when others have ended."""
        return self.fault is None and not self.draining and self._next_id <= MAX_STREAM_ID

    @property
    def ready(self) -> bool:
        """Whether a call can be made now."""
        return (
            self.fault is None
            and not self.draining
            and len(self.streams) < self.peer_max_streams
            and len(self.streams) < self.limits.max_streams
            and self._next_id <= MAX_STREAM_ID
        )

    def begin(self, block: bytes, exchange: Exchange, size: int, start: bytes = b"") -> Stream:
        """Begin a unary call with the start of its message of `size` bytes; the rest follows by `send` and `finish`.
        Else as `call`."""
        stream = self._stream(exchange)
        if self.encoder.pending:
            block = self.encoder.updates() + block
        self.out.append(frames.header_frames(stream.id, block, end_stream=False))
        self.send(stream, b"\0" + size.to_bytes(4, "big") + start)
        return stream

    def _stream(self, exchange: Exchange) -> Stream:
        stream_id = self._next_id
        self._next_id = stream_id + 2
        stream = self.streams[stream_id] = Stream(stream_id, None, self.limits.stream_window, 0.0)
        stream.owner = exchange
        return stream

    def call(self, block: bytes, message: bytes, exchange: Exchange) -> Stream:
        """Make a unary call with a header block of `encoder` or of `literal`; `ready` before."""
        size = len(message) + 5
        if (
            size > FRAME_BYTES
            or size > self._window
            or size > self._initial
            or len(block) > FRAME_BYTES
            or not self.writable
        ):
            stream = self.begin(block, exchange, len(message))
            if stream.id in self.streams and message:
                self.send(stream, message)
            if stream.id in self.streams:
                self.finish(stream, None)
            return stream
        stream = self._stream(exchange)
        stream_id = stream.id
        if self.encoder.pending:
            block = self.encoder.updates() + block
        self._window -= size
        stream.credit -= size
        stream.state = LOCAL
        self.out.append(
            b"".join(
                (
                    HEAD.pack(len(block) >> 8, len(block) & 0xFF, HEADERS, END_HEADERS, stream_id),
                    block,
                    MESSAGE_HEAD.pack(size >> 8, size & 0xFF, DATA, END_STREAM, stream_id, 0, size - 5),
                    message,
                )
            )
        )
        return stream

    def cancel(self, stream: Stream) -> None:
        """Nobody waits for the answer any more."""
        if self.streams.get(stream.id) is stream:
            self.reset(stream, ErrorCode.CANCEL)
            self._freed()

    # Hooks

    def _role_settings(self) -> dict[int, int]:
        return {frames.ENABLE_PUSH: 0}

    def _whole(self, data: bytes, start: int, stop: int, end: int, stream_id: int) -> int:
        stream = self.streams.get(stream_id)
        if (
            stream is None
            or stream.started
            or stream.state is not LOCAL
            or end - stop < PREFIX
            or self._recv_left < self._whole_left
        ):
            return 0
        high, low, kind, flags, same_id, compressed, size = MESSAGE_HEAD.unpack_from(data, stop)
        at: int = stop + PREFIX + size
        if (
            same_id != stream_id
            or flags
            or kind != DATA
            or compressed
            or high << 8 | low != size + 5
            or size + 5 > self._whole_bytes
            or end - at < 9
        ):
            return 0
        high, low, kind, flags, same_id = HEAD.unpack_from(data, at)
        at += 9
        after: int = at + (high << 8 | low)
        if same_id != stream_id or flags != _LAST or kind != HEADERS or after > end or after - at > FRAME_BYTES:
            return 0
        head: ResponseHead = self.decoder.decode(data[start:stop])
        if head.fault is not None or head.http_status != "200":
            self._head(head, stream_id, ended=False)
            return stop
        trailers: ResponseHead = self.decoder.decode(data[at:after])
        exchange: Exchange = stream.owner
        exchange.head = head
        exchange.message = data[stop + PREFIX : at - 9]
        self._recv_left -= size + 5
        if trailers.fault is not None or trailers.status != 0:
            stream.started, stream.head = True, head
            self._head(trailers, stream_id, ended=True)
            return after
        exchange.trailers = trailers.metadata
        stream.state = CLOSED
        del self.streams[stream_id]  # there is nothing of it anywhere else
        stream.owner = None  # which may know the stream: not a cycle, or the collector has work with each
        self.budget.earn(4)
        self._freed()
        exchange.end(0, "")
        return after

    def _headers(self, block: bytes, stream_id: int, *, ended: bool) -> None:
        self._head(self.decoder.decode(block), stream_id, ended=ended)

    def _head(self, head: ResponseHead, stream_id: int, *, ended: bool) -> None:
        """The headers or the trailers of a response."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._absent(stream_id, Move.RECV_HEADERS)
            return
        after = TRANSITIONS[stream.state][Move.RECV_HEADERS]
        if isinstance(after, Fault):
            self._broken(stream, ERRORS[after])
            return
        exchange: Exchange = stream.owner
        if head.fault is not None or (stream.started and not ended) or not (stream.started or head.http_status):
            self._broken(stream, ErrorCode.PROTOCOL_ERROR)
            return
        if not stream.started and head.http_status.startswith("1") and not ended:
            return  # §8.1: an interim response
        if not stream.started:
            stream.started, stream.head = True, head
            exchange.head = head
        if ended:
            if head is not stream.head:
                exchange.trailers = head.metadata
            self._concluded(stream, head)

    def _message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        exchange: Exchange = stream.owner
        if compressed or exchange.message is not None:
            self._refused(stream, INTERNAL, "expected one message, not compressed")
            return
        exchange.message = message
        if ended:
            self._end(stream)

    def _opening(self, stream: Stream, piece: bytes) -> None:
        exchange: Exchange = stream.owner
        if stream.started and not stream.flag and exchange.message is None:
            exchange.opening(stream, piece)

    def _end(self, stream: Stream) -> None:
        self._refused(stream, INTERNAL, "the response has no trailers")

    def _concluded(self, stream: Stream, head: ResponseHead) -> None:
        """The response is complete."""
        exchange: Exchange = stream.owner
        status, text = head.status, head.message
        if status is None:
            http_status = stream.head.http_status
            status, text = _BY_HTTP.get(http_status, UNKNOWN), f"HTTP status {http_status} without grpc-status"
        elif stream.need >= 0 or stream.prefix or (status == 0 and exchange.message is None):
            status, text = INTERNAL, "the response ended without a complete message"
        self._close(stream)
        exchange.end(status, text)

    def _close(self, stream: Stream) -> None:
        """The peer has ended its direction; so do we."""
        if stream.state is OPEN:  # the rest of the request is not wanted
            self.reset(stream, ErrorCode.CANCEL)
        elif stream.id in self.streams:
            stream.state = CLOSED
            self._forget(stream)
        self.budget.earn(4)
        self._freed()

    def _refused(self, stream: Stream, code: int, text: str) -> None:
        if stream.state is CLOSED:
            self._forget(stream)
        else:
            self.reset(stream, ErrorCode.CANCEL)
        self._freed()
        stream.owner.end(code, text)

    def _aborted(self, stream: Stream, code: int, *, unprocessed: bool) -> None:
        exchange: Exchange = stream.owner
        exchange.unprocessed = unprocessed
        self._freed()
        if self.fault is not None:
            exchange.end(UNAVAILABLE, "the connection was lost" if self.settled else UNHEARD)
        else:
            name = ErrorCode(code).name if code in ErrorCode.__members__.values() else str(code)
            known = ErrorCode(code) if code in ErrorCode.__members__.values() else ErrorCode.INTERNAL_ERROR
            exchange.end(_BY_RESET.get(known, INTERNAL), f"the stream was reset: {name}")

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id >= self._next_id or not stream_id & 1

    def _goaway_id(self) -> int:
        return 0

    def _keeps_alive(self) -> bool:
        return True

    def _pong(self, payload: bytes) -> None:
        """Only the keepalive is ever sent."""

    def _going_away(self, last_id: int) -> None:
        """§6.8: streams above `last_id` were not and will not be processed."""
        self.draining = True
        for stream in [stream for stream in self.streams.values() if stream.id > last_id]:
            stream.state = CLOSED
            self._forget(stream)
            self._aborted(stream, ErrorCode.REFUSED_STREAM, unprocessed=True)
