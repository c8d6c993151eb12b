"""The sending half of a connection: frames that wait to be written, and the peer's windows (RFC 9113 §5.2, §6.9)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from mesh.http2 import frames
from mesh.http2.frames import (
    DATA,
    DEFAULT_WINDOW,
    END_STREAM,
    FRAME_BYTES,
    HEAD,
    MAX_WINDOW,
    ConnectionFault,
    ErrorCode,
)
from mesh.http2.limits import Budget, Limits
from mesh.http2.streams import OPEN, REMOTE, Move, State, Stream

_TURN_BYTES: Final = 1 << 20
"""What leaves between two looks at whether the transport still takes bytes."""
_ROUND_BYTES: Final = 64 << 10
"""What one stream sends before the next one that waits has its turn."""
_BULKY_BYTES: Final = 32 << 10
_REMEMBERED: Final = 1_024
"""Streams that we reset and whose late frames we let pass."""


class Outbound:
    """Owned by one thread; whoever calls it writes `take()` to the transport."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.clock = clock
        self.streams: dict[int, Stream] = {}
        self.out: list[bytes | memoryview] = []
        """Frames to write, in order."""
        self.writable = True
        """Whether the transport takes more; while not, data waits here and is bounded."""
        self.budget = Budget(limits.free_frames, limits.free_frames_per_s, clock)
        self.fault: ErrorCode | None = None
        """Set once the connection has ended; nothing is received or sent after it."""
        self.unsent = 0
        """Bytes of data that wait."""
        self._window = DEFAULT_WINDOW
        self._initial = DEFAULT_WINDOW
        self.buffered = 0
        """Bytes of incomplete messages."""
        self._reset: dict[int, None] = {}
        self._turn = 0
        self._waiting: dict[int, Stream] = {}
        """Streams with something to send, in the order of their turns."""

    def take(self) -> bytes | memoryview:
        """All that is to be written now."""
        out = self.out
        self.out = []
        self._turn = 0
        return out[0] if len(out) == 1 else b"".join(out)

    @property
    def is_bulky(self) -> bool:
        """Whether joining what is to be written would cost more than writing its parts."""
        return self._turn >= _BULKY_BYTES

    def take_parts(self) -> list[bytes | memoryview]:
        """`take`, not joined."""
        out, self.out, self._turn = self.out, [], 0
        return out

    @property
    def sending(self) -> bool:
        """Whether another `pump` may have something to do."""
        return bool(self._waiting) and self.writable and self._window > 0

    # Data

    def send(self, stream: Stream, data: bytes | memoryview) -> None:
        """Send data of a stream as the windows allow. What the peer does not take in the end resets the stream."""
        if stream.state is not OPEN and stream.state is not REMOTE:
            stream.move(Move.SEND_DATA)
        size = len(data)
        if (
            size <= FRAME_BYTES
            and not stream.queue
            and self.writable
            and size <= self._window
            and size <= self._initial + stream.credit
            and self._turn < _TURN_BYTES
        ):  # what is usual goes out at once, as one frame
            self.out.append(HEAD.pack(size >> 8, size & 0xFF, DATA, 0, stream.id))
            self.out.append(data)
            self._window -= size
            stream.credit -= size
            self._turn += size
            self.budget.earn(4 + size / 4_096)  # the peer will answer with window updates
            return
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.append(memoryview(data))
        stream.queued += size
        self.unsent += size
        if self.unsent > self.limits.max_unsent_bytes:
            self.reset(stream, ErrorCode.ENHANCE_YOUR_CALM)
            return
        if stream.id not in self._waiting:
            stream.since = self.clock()
            self._waiting[stream.id] = stream
            self._drain(stream)

    def finish(self, stream: Stream, trailers: bytes | None) -> None:
        """End our direction: with these frames (trailers, END_STREAM set) or, if None, with the last data."""
        if stream.queue:
            stream.trailers, stream.end_with_data = trailers, trailers is None
            return
        if trailers is None:
            trailers = frames.frame(DATA, END_STREAM, stream.id)
        self.out.append(trailers)
        self._ended(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """RST_STREAM: the stream is gone at once (§5.4.2)."""
        if stream.state is not State.REMOTE:  # frames of it may be under way
            if len(self._reset) >= _REMEMBERED:
                del self._reset[next(iter(self._reset))]
            self._reset[stream.id] = None
        stream.move(Move.SEND_RST)
        self.out.append(frames.rst_stream(stream.id, code))
        self._forget(stream)

    def pump(self) -> None:
        """Send what may be sent now, by turns."""
        waiting = self._waiting
        for _ in range(len(waiting)):
            if self._window <= 0 or not self.writable or self._turn >= _TURN_BYTES:
                return
            stream = waiting.pop(next(iter(waiting)))
            waiting[stream.id] = stream  # last again, unless it ends now
            self._drain(stream)

    def _drain(self, stream: Stream) -> None:
        """Send what windows allow of one stream, at most _ROUND_BYTES; it waits for its next turn if some is left."""
        queue = stream.queue
        assert queue is not None
        room = min(_ROUND_BYTES, _TURN_BYTES - self._turn, self._window, self._initial + stream.credit)
        if room <= 0 or not self.writable:
            return
        out, stream_id, sent = self.out, stream.id, 0
        while queue and sent < room:
            view = queue[0]
            size = min(len(view), room - sent, FRAME_BYTES)
            whole = size == len(view)
            if whole:
                queue.popleft()
            flags = END_STREAM if whole and not queue and stream.end_with_data else 0
            out.append(HEAD.pack(size >> 8, size & 0xFF, DATA, flags, stream_id))
            if whole:
                out.append(view)
            else:
                out.append(view[:size])
                queue[0] = view[size:]
            sent += size
        self._window -= sent
        stream.credit -= sent
        stream.queued -= sent
        self.unsent -= sent
        self._turn += sent
        self.budget.earn(4 + sent / 4_096)  # the peer will answer with window updates
        stream.since = self.clock()
        if stream.on_room is not None:
            stream.on_room()
        if not queue:
            del self._waiting[stream_id]
            if stream.trailers is not None:
                out.append(stream.trailers)
                self._ended(stream)
            elif stream.end_with_data:
                self._ended(stream)

    def _ended(self, stream: Stream) -> None:
        """Our END_STREAM was sent."""
        if stream.move(Move.SEND_END) is State.CLOSED:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """The stream is closed: nothing of it stays."""
        del self.streams[stream.id]
        self._waiting.pop(stream.id, None)
        if stream.queued:
            self.unsent -= stream.queued
            stream.queued = 0
        if stream.queue is not None:
            stream.queue.clear()
        if stream.chunks is not None:
            self.buffered -= stream.size
            stream.chunks, stream.size = None, 0

    # The peer's windows

    def _window_update(self, stream_id: int, increment: int) -> None:
        """§6.9.1: a window may not pass 2^31-1; an increment of 0 is an error."""
        if stream_id == 0:
            if increment == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._window += increment
            if self._window > MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is too large")
        else:
            stream = self.streams[stream_id]
            if increment == 0:
                self._broken(stream, ErrorCode.PROTOCOL_ERROR)
                return
            stream.credit += increment
            if self._initial + stream.credit > MAX_WINDOW:
                self._broken(stream, ErrorCode.FLOW_CONTROL_ERROR)
                return
            if stream.id not in self._waiting:
                return
            self._drain(stream)
            return
        self.pump()

    def _initial_window(self, size: int) -> None:
        """§6.9.2: applies to all streams, also those whose window becomes negative by it."""
        if size > MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"initial window of {size}")
        if size > self._initial and any(size + stream.credit > MAX_WINDOW for stream in self.streams.values()):
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is too large")
        self._initial = size

    def _broken(self, stream: Stream, code: ErrorCode) -> None:
        """The peer broke a rule on one stream."""
        raise NotImplementedError
