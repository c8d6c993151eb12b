"""The receiving half of a connection, for both roles: bytes to frames to streams to gRPC messages.

`receive` never raises for what a peer sends: the connection ends with GOAWAY and the code of the rule that was broken,
and `fault` says so. A role implements the hooks at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mesh.http2 import frames
from mesh.http2.assembly import Assembly
from mesh.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    HEAD,
    HEADERS,
    MAX_STREAM_ID,
    PADDED,
    SETTINGS,
    WITH_PRIORITY,
    ConnectionFault,
    ErrorCode,
)
from mesh.http2.hpack import Decoder
from mesh.http2.limits import Limits
from mesh.http2.streams import CLOSED, TRANSITIONS, Move

_RECV_DATA: Final = Move.RECV_DATA
_RECV_END: Final = Move.RECV_END
_SHORT: Final = 1_024
"""Reads that are shorter are joined to what was left of the last one."""


class Connection(Assembly):
    """One connection of one role."""

    def __init__(self, limits: Limits, clock: Callable[[], float], decoder: Decoder[Any]) -> None:
        super().__init__(limits, clock, decoder)
        self._recv_left = limits.connection_window
        self.greeted = False
        """The peer's first bytes were what they must be."""
        self._half = limits.connection_window >> 1
        self._stream_half = limits.stream_window >> 1
        """Below half a window, the peer is given a full one again."""
        self._whole_bytes = min(FRAME_BYTES, limits.stream_window, self._half)
        """Of a DATA frame that `_whole` takes,"""
        self._whole_left = self._half + self._whole_bytes
        """while so much of the window is left that it need not be looked after."""

    def receive(self, data: bytes) -> None:
        """Take bytes from the transport; answers are in `out`."""
        if self.fault is not None:
            return
        self.received_at = self.clock()
        try:
            at = self._rest_of_frame(data) if self._tail else 0
            if at < len(data) and self.fault is None:
                self._frames(data, at)
        except ConnectionFault as fault:
            self.fail(fault.code, str(fault))

    # Frames

    def _rest_of_frame(self, data: bytes) -> int:
        """Take the frame that was incomplete: where the next one begins. Of large reads nothing else is copied."""
        tail = self._tail
        if len(data) < _SHORT or len(tail) < 9 or not self.greeted:
            self._tail = b""
            self._frames(tail + data, 0)
            return len(data)
        missing = 9 + int.from_bytes(tail[:3], "big") - len(tail)
        if missing > len(data):
            self._tail = tail + data
            return len(data)
        self._tail = b""
        self._frames(tail + data[:missing], 0)
        return missing

    def _frames(self, data: bytes, at: int) -> None:
        end = len(data)
        if not self.greeted:
            at = self._begin(data)
            if at < 0:
                self._tail = data
                return
        unpack, others = HEAD.unpack_from, _OTHERS
        while end - at >= 9:
            high, low, kind, flags, stream_id = unpack(data, at)
            size = high << 8 | low
            if size > FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")  # §4.2
            start = at + 9
            stop = start + size
            if stop > end:
                break
            at = stop
            stream_id &= MAX_STREAM_ID  # §4.1: the reserved bit is ignored
            if self._block is not None and (kind != CONTINUATION or stream_id != self._block_stream):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame inside a header block")  # §6.10
            if kind == DATA:
                self._on_data(data, start, stop, flags, stream_id)
            elif kind == HEADERS:
                after = self._whole(data, start, stop, end, stream_id) if flags == END_HEADERS else 0
                if after:
                    at = after
                else:
                    self._on_headers(data, start, stop, flags, stream_id)
            elif not self.settled and kind != SETTINGS:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")  # §3.4
            elif kind < len(others):
                others[kind](self, data[start:stop], flags, stream_id)
            else:
                self._spend("unknown frames")  # §5.5: ignored
            if self.fault is not None:
                return
        if at < end:
            self._tail = data[at:]

    def _on_data(self, data: bytes, start: int, stop: int, flags: int, stream_id: int) -> None:
        size = stop - start
        self._recv_left -= size
        if self._recv_left < self._half:
            if self._recv_left < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
            self.out.append(frames.window_update(0, self.limits.connection_window - self._recv_left))
            self._recv_left = self.limits.connection_window
        if flags & PADDED:
            start, stop = _unpadded(data, start, stop)
        if start == stop and not flags & END_STREAM:
            self._spend("empty data")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._absent(stream_id, Move.RECV_DATA)
            return
        after = TRANSITIONS[stream.state][_RECV_DATA]
        if after < 0:
            self._broken(stream, ErrorCode.STREAM_CLOSED)
            return
        stream.recv_left -= size
        if stream.recv_left < 0:
            self._broken(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if stream.left >= 0:  # §8.1.1: a content-length that lies makes the message malformed
            stream.left -= stop - start
            if stream.left < 0 or (stream.left and flags & END_STREAM):
                self._broken(stream, ErrorCode.PROTOCOL_ERROR)
                return
        if flags & END_STREAM:
            stream.state = TRANSITIONS[stream.state][_RECV_END]  # type: ignore[assignment]
            self._assemble(stream, data, start, stop, ended=True)
            if stream.state is CLOSED and stream_id in self.streams:
                self._forget(stream)
            return
        if 0 < stop - start < stream.need:  # in the middle of a message
            sink = stream.sink
            if sink is None or sink.keeps:
                self._piece(stream, data[start:stop])
            else:
                stream.need -= stop - start
                sink.feed(memoryview(data)[start:stop])
        else:
            self._assemble(stream, data, start, stop, ended=False)
        if stream.recv_left < self._stream_half and not stream.held:
            self.credit(stream)

    def _on_headers(self, data: bytes, start: int, stop: int, flags: int, stream_id: int) -> None:
        if not self.settled:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        if flags & PADDED:
            start, stop = _unpadded(data, start, stop)
        if flags & WITH_PRIORITY:  # RFC 9113 §5.3: deprecated, ignored
            if stop - start < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            start += 5
        if flags & END_HEADERS:
            self._headers(data[start:stop], stream_id, ended=bool(flags & END_STREAM))
        else:
            self._block = bytearray(data[start:stop])
            self._block_stream, self._block_flags, self._continuations = stream_id, flags, 0

    def _on_continuation(self, payload: bytes, flags: int, stream_id: int) -> None:
        if self._block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._continuations += 1
        self._block += payload
        if len(self._block) > self.limits.max_block_bytes or self._continuations > self.limits.max_continuations:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block without end")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._headers(block, stream_id, ended=bool(self._block_flags & END_STREAM))

    # Hooks of the roles

    def _begin(self, data: bytes) -> int:
        """Where frames begin in the peer's first data: after the preface, if the role expects one; -1: there must be
        more first."""
        self.greeted = True
        return 0

    def _whole(self, data: bytes, start: int, stop: int, end: int, stream_id: int) -> int:
        """HEADERS came, whose block is `data[start:stop]`. If all the peer has to say on the stream comes right behind
        them, as it usually does, take it in one go: where the next frame begins; 0: take the frames one by one."""
        raise NotImplementedError

    def _headers(self, block: bytes, stream_id: int, *, ended: bool) -> None:
        """A complete header block."""
        raise NotImplementedError


def _unpadded(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """§6.1: padding may fill the payload except for its own length, and no more."""
    if start == stop:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without padding length")
    pad = data[start]
    if pad >= stop - start:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return start + 1, stop - pad


_OTHERS: Final[tuple[Callable[[Connection, bytes, int, int], None], ...]] = (
    Connection._on_priority,
    Connection._on_priority,
    Connection._on_priority,
    Connection._on_rst_stream,
    Connection._on_settings,
    Connection._on_push_promise,
    Connection._on_ping,
    Connection._on_goaway,
    Connection._on_window_update,
    Connection._on_continuation,
)
"""By kind; DATA and HEADERS are told apart before, for speed."""
