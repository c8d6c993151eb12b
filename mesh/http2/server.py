"""The server's role: header blocks to calls, answers to frames (gRPC over HTTP/2, "Responses")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final

from mesh.errors import encoded, shown
from mesh.http2 import frames
from mesh.http2.calls import Calls
from mesh.http2.connection import Connection
from mesh.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    HEAD,
    HEADERS,
    MAX_STREAM_ID,
    MAX_WINDOW,
    MESSAGE_HEAD,
    PING,
    PREFACE,
    PREFIX,
    UPDATE,
    UPDATE_BYTES,
    WINDOW_UPDATE,
    ConnectionFault,
    ErrorCode,
)
from mesh.http2.grpc import Malformed, RequestHead
from mesh.http2.hpack import Field
from mesh.http2.hpack_encoder import literal
from mesh.http2.limits import Limits
from mesh.http2.request_heads import request_decoder
from mesh.http2.streams import CLOSED, ERRORS, LOCAL, REMOTE, TRANSITIONS, Fault, Move, Stream

RESPONSE: Final[tuple[Field, ...]] = ((b":status", b"200"), (b"content-type", b"application/grpc"))
ACCEPTED: Final[Field] = (b"grpc-accept-encoding", b"identity,deflate,gzip")

_DRAIN: Final = b"draining"
_OK: Final = literal(((b"grpc-status", b"0"),))
_OK_HEAD: Final = HEAD.pack(0, len(_OK), HEADERS, END_HEADERS | END_STREAM, 0)[:5]
_ID: Final = Struct(">L")


class ServerConnection(Connection):
    """One client's connection."""

    def __init__(self, limits: Limits, clock: Callable[[], float], calls: Calls) -> None:
        super().__init__(limits, clock, request_decoder(limits))
        self._calls = calls
        self._accepted_id = MAX_STREAM_ID
        """Streams above it are not served: GOAWAY said so."""
        self.hello()

    @property
    def drained(self) -> bool:
        """After `drain`: nothing is under way and nothing new will be."""
        return self._accepted_id < MAX_STREAM_ID and not self.streams

    # Answers

    def reply(self, stream: Stream, head: bytes, message: bytes) -> None:
        """Answer a unary call: headers (a block), one message, status OK."""
        size = len(message) + 5
        if (
            size <= FRAME_BYTES
            and size <= self._window
            and size <= self._initial + stream.credit
            and self.writable
            and stream.state is REMOTE
        ):
            stream_id = stream.id
            self._window -= size
            stream.state = CLOSED
            del self.streams[stream_id]
            id_bytes = _ID.pack(stream_id)
            self.out.append(
                b"".join(
                    (
                        HEAD.pack(0, len(head), HEADERS, END_HEADERS, stream_id),
                        head,
                        MESSAGE_HEAD.pack(size >> 8, size & 0xFF, DATA, 0, stream_id, 0, size - 5),
                        message,
                        _OK_HEAD,
                        id_bytes,
                        _OK,
                    )
                )
            )
            self.budget.earn(4)
            return
        self.start(stream, head)
        self.send_message(stream, message)
        if stream.id in self.streams:  # what the peer does not take was reset
            self.status(stream, 0, "")

    def start(self, stream: Stream, head: bytes) -> None:
        """Send the response's headers."""
        stream.move(Move.SEND_HEADERS)
        stream.started = True
        self.out.append(frames.header_frames(stream.id, head, end_stream=False))

    def send_message(self, stream: Stream, message: bytes, *, compressed: bool = False) -> None:
        """Send a message; `started` before."""
        prefix = (b"\1" if compressed else b"\0") + len(message).to_bytes(4, "big")
        if len(message) < FRAME_BYTES:
            self.send(stream, prefix + message)
        else:  # not copied for five bytes
            self.send(stream, prefix)
            if stream.id in self.streams:
                self.send(stream, message)

    def status(self, stream: Stream, code: int, text: str, fields: Sequence[Field] = ()) -> None:
        """End a call: in trailers, or where nothing was sent yet, in headers alone ("Trailers-Only")."""
        said = [(b"grpc-status", b"%d" % code)]
        if text:
            said.append((b"grpc-message", encoded(shown(text)).encode()))
        said += fields
        block = literal(said if stream.started else [*RESPONSE, *said])
        stream.started = True
        self._conclude(stream, block)

    def _conclude(self, stream: Stream, block: bytes) -> None:
        self.budget.earn(2)
        self.finish(stream, frames.header_frames(stream.id, block, end_stream=True))

    def _ended(self, stream: Stream) -> None:
        super()._ended(stream)
        if stream.state is LOCAL:
            self.reset(stream, ErrorCode.NO_ERROR)  # §8.1: the rest of the request is not wanted

    def drain(self) -> None:
        """Say goodbye: GOAWAY at once, and once the client has seen it (§6.8), which streams were taken."""
        if not self.draining and self.fault is None:
            self.draining = True
            self.out.append(frames.goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR, "shutting down"))
            self.out.append(frames.frame(PING, 0, 0, _DRAIN))

    # Hooks

    def _role_settings(self) -> dict[int, int]:
        return {frames.MAX_CONCURRENT_STREAMS: self.limits.max_streams}

    def _begin(self, data: bytes) -> int:
        if self.greeted:
            return 0
        if data[: len(PREFACE)] != PREFACE[: len(data)]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "not HTTP/2")
        if len(data) < len(PREFACE):
            return -1
        self.greeted = True
        return len(PREFACE)

    def _whole(self, data: bytes, start: int, stop: int, end: int, stream_id: int) -> int:
        if end - stop < PREFIX or self._recv_left < self._whole_left:
            return 0
        at, credit = stop, 0
        if data[stop + 3] == WINDOW_UPDATE:  # as gRPC's C core sends it before each message
            high, low, _, _, same_id, credit = UPDATE.unpack_from(data, stop)
            at = stop + UPDATE_BYTES
            if (
                low != 4
                or high
                or same_id != stream_id
                or not 0 < credit <= MAX_WINDOW - self._initial
                or end - at < PREFIX
            ):
                return 0
        high, low, kind, flags, same_id, compressed, size = MESSAGE_HEAD.unpack_from(data, at)
        after: int = at + PREFIX + size
        if (
            same_id != stream_id
            or flags != END_STREAM
            or kind != DATA
            or compressed
            or high << 8 | low != size + 5
            or size + 5 > self._whole_bytes
            or size > self.limits.max_message_bytes
            or after > end
            or stream_id <= self.last_id
            or stream_id > self._accepted_id
            or not stream_id & 1
            or not self.settled
            or len(self.streams) >= self.limits.max_streams
        ):
            return 0
        head: RequestHead = self.decoder.decode(data[start:stop])
        if head.fault is not None or head.content_length >= 0:
            self._open(head, stream_id, ended=False)
            return stop
        if credit:
            self._spend("window updates")
        self.last_id = stream_id
        stream = self.streams[stream_id] = Stream(stream_id, head, self.limits.stream_window, self.received_at)
        stream.state = REMOTE
        stream.credit = credit
        self._recv_left -= size + 5
        self._calls.whole(stream, head, data[after - size : after])
        return after

    def _headers(self, block: bytes, stream_id: int, *, ended: bool) -> None:
        head: RequestHead = self.decoder.decode(block)  # always, for the sake of the dynamic table
        if stream_id <= self.last_id:
            self._trailers(head, stream_id, ended=ended)
        else:
            self._open(head, stream_id, ended=ended)

    def _open(self, head: RequestHead, stream_id: int, *, ended: bool) -> None:
        """The headers of a new request."""
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client opened an even stream")  # §5.1.1
        self.last_id = stream_id
        stream = Stream(stream_id, head, self.limits.stream_window, self.received_at)
        if ended:
            stream.state = REMOTE
        if stream_id > self._accepted_id or len(self.streams) >= self.limits.max_streams:
            self._spend("refused streams")
            self.streams[stream_id] = stream
            self.reset(stream, ErrorCode.REFUSED_STREAM)  # §5.1.2, §8.7: not processed, may be tried again
            return
        self.streams[stream_id] = stream
        if head.fault is not None:
            self._faulty(stream, head)
            return
        if head.content_length >= 0:
            stream.left = head.content_length
            if ended and stream.left:
                self._broken(stream, ErrorCode.PROTOCOL_ERROR)
                return
        self._calls.begin(stream, head)
        if ended and stream.id in self.streams:
            self._calls.end(stream)

    def _faulty(self, stream: Stream, head: RequestHead) -> None:
        if isinstance(head.fault, Malformed):
            self._broken(stream, ErrorCode.PROTOCOL_ERROR)
            return
        assert head.fault is not None
        self._spend("requests that are none")
        http_status, code, text = head.fault
        if http_status == 200:
            self.status(stream, code, text, (ACCEPTED,) if code == 12 else ())
        else:
            told = encoded(shown(text)).encode()
            said = ((b":status", b"%d" % http_status), (b"grpc-status", b"%d" % code), (b"grpc-message", told))
            self._conclude(stream, literal(said))

    def _trailers(self, head: RequestHead, stream_id: int, *, ended: bool) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            self._absent(stream_id, Move.RECV_HEADERS)
            return
        after = TRANSITIONS[stream.state][Move.RECV_HEADERS]
        if isinstance(after, Fault):
            self._broken(stream, ERRORS[after])
        elif not ended:
            self._broken(stream, ErrorCode.PROTOCOL_ERROR)  # §8.1: trailers end the stream
        else:
            stream.state = REMOTE
            self._assemble(stream, b"", 0, 0, ended=True)

    def _message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        self._calls.message(stream, message, compressed=compressed, ended=ended)

    def _opening(self, stream: Stream, piece: bytes) -> None:
        self._calls.opening(stream, piece)

    def _end(self, stream: Stream) -> None:
        self._calls.end(stream)

    def _refused(self, stream: Stream, code: int, text: str) -> None:
        self._spend("refused messages")
        self._calls.aborted(stream)
        if stream.id in self.streams:
            self.status(stream, code, text)

    def _aborted(self, stream: Stream, code: int, *, unprocessed: bool) -> None:
        self._calls.aborted(stream)

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id > self.last_id or not stream_id & 1

    def _goaway_id(self) -> int:
        return min(self.last_id, self._accepted_id)

    def _keeps_alive(self) -> bool:
        return False

    def _pong(self, payload: bytes) -> None:
        if payload == _DRAIN and self.draining and self._accepted_id == MAX_STREAM_ID:
            self._accepted_id = self.last_id
            self.out.append(frames.goaway(self.last_id, ErrorCode.NO_ERROR))

    def _going_away(self, last_id: int) -> None:
        self.draining = True  # a client that leaves opens no more streams; its open ones are served
