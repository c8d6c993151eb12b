"""What concerns a connection as a whole: settings, pings, GOAWAY, resets, windows, time (RFC 9113 §6.3 to §6.10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mesh.http2 import frames
from mesh.http2.frames import ACK, DEFAULT_WINDOW, FRAME_BYTES, MAX_STREAM_ID, PING, ConnectionFault, ErrorCode
from mesh.http2.hpack import Decoder
from mesh.http2.hpack_encoder import Encoder
from mesh.http2.limits import Limits
from mesh.http2.outbound import Outbound
from mesh.http2.streams import ERRORS, TRANSITIONS, Fault, Move, State, Stream

_KEEPALIVE: Final = b"densmesh"


class Control(Outbound):
    """Frames other than DATA, HEADERS and CONTINUATION."""

    def __init__(self, limits: Limits, clock: Callable[[], float], decoder: Decoder[Any]) -> None:
        super().__init__(limits, clock)
        self.decoder = decoder
        self.encoder = Encoder(limits.table_bytes)
        self.received_at = self._opened_at = clock()
        self.last_id = 0
        """The highest stream the peer opened; on the client, that we opened."""
        self.draining = False
        """GOAWAY was sent or received: no new streams."""
        self.settled = False
        """The peer's SETTINGS came (§3.4)."""
        self._acknowledged = False
        self.peer_max_streams = 1 << 31
        self._tail = b""
        """A frame that is not complete yet."""
        self._block: bytearray | None = None
        self._block_stream = self._block_flags = self._continuations = 0
        self._pinged_at = 0.0

    def __repr__(self) -> str:
        fault = "" if self.fault is None else f" {self.fault.name}"
        return f"<{type(self).__name__} {len(self.streams)} streams, last {self.last_id}{fault}>"

    def hello(self) -> None:
        """Our SETTINGS (§3.4) and the connection's window, which no setting can give (§6.9.2)."""
        limits = self.limits
        values = {
            frames.HEADER_TABLE_SIZE: limits.table_bytes,
            frames.INITIAL_WINDOW_SIZE: limits.stream_window,
            frames.MAX_FRAME_SIZE: FRAME_BYTES,
            frames.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        }
        self.out.append(frames.settings(values | self._role_settings()))
        if limits.connection_window > DEFAULT_WINDOW:
            self.out.append(frames.window_update(0, limits.connection_window - DEFAULT_WINDOW))

    def fail(self, code: ErrorCode, text: str) -> None:
        """End the connection with GOAWAY; every stream is aborted."""
        if self.fault is None:
            self.out.append(frames.goaway(self._goaway_id(), code, text))
            self.lost(code)

    def lost(self, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """The transport is gone, or nothing more is to be said on it: every stream is aborted."""
        if self.fault is not None:
            return
        self.fault = code
        self._tail = b""
        self._block = None
        for stream in list(self.streams.values()):
            stream.state = State.CLOSED
            self._forget(stream)
            self._aborted(stream, code, unprocessed=False)

    def tick(self) -> None:
        """Let time pass: give up peers that stall, and ping those that are silent. To be called every second or so."""
        if self.fault is not None:
            return
        now, limits = self.clock(), self.limits
        if not (self.settled and self._acknowledged) and now - self._opened_at > limits.handshake_s:
            self.fail(ErrorCode.SETTINGS_TIMEOUT, "no SETTINGS, or no answer to ours")
            return
        silent_s = now - self.received_at
        if (self._tail or self._block is not None) and silent_s > limits.partial_s:
            self.fail(ErrorCode.ENHANCE_YOUR_CALM, "a frame or header block stays incomplete")
            return
        for stream in list(self._waiting.values()):
            if now - stream.since > limits.stall_s:
                self._give_up(stream, ErrorCode.CANCEL)
        if silent_s > limits.keepalive_s and (self.streams or self._keeps_alive()):
            if not self._pinged_at:
                self._pinged_at = now
                self.out.append(frames.frame(PING, 0, 0, _KEEPALIVE))
            elif now - self._pinged_at > limits.keepalive_timeout_s:
                self.fail(ErrorCode.NO_ERROR, "no answer to a ping")
        else:
            self._pinged_at = 0.0

    # Frames

    def _on_priority(self, payload: bytes, flags: int, stream_id: int) -> None:
        """§6.3: deprecated and ignored, but not without rules."""
        if stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        self._spend("priorities")
        stream = self.streams.get(stream_id)
        if len(payload) != 5 and stream is not None:
            self._broken(stream, ErrorCode.FRAME_SIZE_ERROR)

    def _on_rst_stream(self, payload: bytes, flags: int, stream_id: int) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"RST_STREAM of {len(payload)} bytes")
        self._spend("resets")  # CVE-2023-44487
        stream = self.streams.get(stream_id)
        if stream is None:
            self._absent(stream_id, Move.RECV_RST)
            return
        stream.state = State.CLOSED
        self._forget(stream)
        code = frames.word(payload)
        self._aborted(stream, code, unprocessed=code == ErrorCode.REFUSED_STREAM)

    def _on_settings(self, payload: bytes, flags: int, stream_id: int) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS on stream {stream_id}")
        if flags & ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK with a payload")
            if self._acknowledged:
                self._spend("acknowledgements")
            self._acknowledged = True
            return
        if len(payload) % 6:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        self._spend("settings", 1 + len(payload) / 64 + len(self.streams) / 64)
        for key, value in frames.parse_settings(payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                self._initial_window(value)
            elif key == frames.HEADER_TABLE_SIZE:
                self.encoder.resize(value)
            elif key == frames.MAX_CONCURRENT_STREAMS:
                self.peer_max_streams = value
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
            elif key == frames.MAX_FRAME_SIZE and not FRAME_BYTES <= value < 1 << 24:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
        self.settled = True
        self.out.append(frames.SETTINGS_ACK)
        self.pump()

    def _on_push_promise(self, payload: bytes, flags: int, stream_id: int) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE: push is off")  # §8.4

    def _on_ping(self, payload: bytes, flags: int, stream_id: int) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"PING on stream {stream_id}")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        self._spend("pings")
        if not flags & ACK:
            self.out.append(frames.frame(PING, ACK, 0, payload))
        elif payload != _KEEPALIVE:
            self._pong(payload)

    def _on_goaway(self, payload: bytes, flags: int, stream_id: int) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"GOAWAY on stream {stream_id}")
        if len(payload) < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        self._spend("farewells")
        self._going_away(frames.word(payload) & MAX_STREAM_ID)

    def _on_window_update(self, payload: bytes, flags: int, stream_id: int) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        self._spend("window updates")
        if stream_id and stream_id not in self.streams:
            self._absent(stream_id, Move.RECV_WINDOW)
            return
        self._window_update(stream_id, frames.word(payload) & frames.MAX_WINDOW)

    # Faults

    def _spend(self, what: str, cost: float = 1) -> None:
        if not self.budget.spend(cost):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"too many {what}")

    def _absent(self, stream_id: int, move: Move) -> None:
        """A frame on a stream that is idle or closed."""
        if stream_id in self._reset:
            if move is not Move.RECV_DATA:
                self._spend("late frames")
            return
        after = TRANSITIONS[State.IDLE if self._is_idle(stream_id) else State.CLOSED][move]
        if isinstance(after, Fault):
            raise ConnectionFault(ERRORS[after], f"{move.name} on stream {stream_id}, which is not open")

    def _broken(self, stream: Stream, code: ErrorCode) -> None:
        self._spend("broken streams")
        self._give_up(stream, code)

    def _give_up(self, stream: Stream, code: ErrorCode) -> None:
        self.reset(stream, code)
        self._aborted(stream, code, unprocessed=False)

    # Hooks of the roles

    def _role_settings(self) -> dict[int, int]:
        raise NotImplementedError

    def _is_idle(self, stream_id: int) -> bool:
        """Whether nobody has opened the stream yet (§5.1.1)."""
        raise NotImplementedError

    def _goaway_id(self) -> int:
        """The last stream of the peer that was or may be processed (§6.8)."""
        raise NotImplementedError

    def _keeps_alive(self) -> bool:
        """Whether a connection without streams is pinged."""
        raise NotImplementedError

    def _aborted(self, stream: Stream, code: int, *, unprocessed: bool) -> None:
        """The stream is gone before its time: by the peer, or by us for what the peer did."""
        raise NotImplementedError

    def _pong(self, payload: bytes) -> None:
        """The peer has answered a ping of ours other than the keepalive."""
        raise NotImplementedError

    def _going_away(self, last_id: int) -> None:
        """The peer takes no new streams, and none of ours above `last_id`."""
        raise NotImplementedError
