"""Messages out of DATA frames, whose borders mean nothing to them (gRPC over HTTP/2, "Length-Prefixed-Message")."""

from __future__ import annotations

from typing import Final

from mesh.http2 import frames
from mesh.http2.control import Control
from mesh.http2.streams import LOCAL, OPEN, Stream

_SMALL: Final = 1_024
"""Pieces smaller than this are gathered, or a message sent byte by byte would take forty times its size."""


class Assembly(Control):
    """A message that comes in several frames is put together in the end, or goes where the role says, piece by piece
    (`Stream.sink`)."""

    def release(self, stream: Stream) -> None:
        """What held the peer's credit back is over."""
        if stream.held:
            stream.held = False
            if stream.recv_left < self.limits.stream_window >> 1:
                self.credit(stream)

    def credit(self, stream: Stream) -> None:
        """Let the peer send a full window on the stream again."""
        if stream.state in (OPEN, LOCAL) and stream.recv_left < self.limits.stream_window:
            self.out.append(frames.window_update(stream.id, self.limits.stream_window - stream.recv_left))
            stream.recv_left = self.limits.stream_window

    def gathered(self, stream: Stream) -> bytes:
        """The pieces of a message so far, which are not kept any longer."""
        message = b"".join(stream.chunks or ())
        self.drop(stream)
        return message

    def drop(self, stream: Stream) -> None:
        """Keep no pieces."""
        self.buffered -= stream.size
        stream.chunks, stream.size = None, 0

    def _assemble(self, stream: Stream, data: bytes, at: int, stop: int, *, ended: bool) -> None:
        """Take payload; `ended`: with END_STREAM."""
        while at < stop:
            if stream.need < 0:
                if stream.chunks is not None:  # kept of a message that a sink has had
                    self._message(stream, b"", compressed=False, ended=False)
                    return
                take = min(5 - len(stream.prefix), stop - at)
                stream.prefix += data[at : at + take]
                at += take
                if len(stream.prefix) < 5:
                    break
                stream.flag, stream.need = stream.prefix[0], int.from_bytes(stream.prefix[1:], "big")
                stream.prefix = b""
                if stream.flag > 1:
                    self._refused(stream, 13, f"compressed flag {stream.flag}, expected 0 or 1")
                    return
                if stream.need > self.limits.max_message_bytes:
                    self._refused(stream, 8, f"a message of {stream.need} bytes, {self._most_bytes()}")
                    return
            take = min(stream.need, stop - at)
            message = data[at : at + take]
            at += take
            if take < stream.need or stream.chunks is not None or stream.sink is not None:
                self._piece(stream, message)
                if stream.id not in self.streams:
                    return
                if stream.need:
                    break
                if stream.sink is not None:
                    stream.need, stream.sink = -1, None
                    continue
                message = self.gathered(stream)
            stream.need = -1
            self._message(stream, message, compressed=bool(stream.flag), ended=ended and at == stop)
            if self.fault is not None or stream.id not in self.streams:
                return
            if ended and at == stop:
                return
        if ended:
            if stream.need >= 0 or stream.prefix:
                self._refused(stream, 13, "the stream ended inside a message")
            else:
                self._end(stream)

    def _piece(self, stream: Stream, piece: bytes) -> None:
        """A part of a message."""
        sink, is_first = stream.sink, stream.chunks is None
        stream.need -= len(piece)
        if sink is None or sink.keeps:
            self._keep(stream, piece)
            if self.buffered > self.limits.max_buffered_bytes:
                self._refused(stream, 8, "too many bytes of incomplete messages on this connection")
                return
        if sink is not None:
            sink.feed(piece)
        elif is_first:
            self._opening(stream, piece)

    def _keep(self, stream: Stream, piece: bytes) -> None:
        stream.size += len(piece)
        self.buffered += len(piece)
        if stream.chunks is None:
            stream.chunks = []
        last = stream.chunks[-1] if stream.chunks else None
        if len(piece) >= _SMALL:
            stream.chunks.append(piece)
        elif isinstance(last, bytearray):
            last += piece
        else:
            stream.chunks.append(bytearray(piece))

    def _most_bytes(self) -> str:
        return f"at most {self.limits.max_message_bytes} are accepted"

    # Hooks of the roles

    def _opening(self, stream: Stream, piece: bytes) -> None:
        """The first piece of a message of which `stream.need` more bytes are to come: a sink may take it."""
        raise NotImplementedError

    def _message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        """A complete message; `ended`: the peer's last one."""
        raise NotImplementedError

    def _end(self, stream: Stream) -> None:
        """The peer has ended its direction after its last message, or without one."""
        raise NotImplementedError

    def _refused(self, stream: Stream, code: int, text: str) -> None:
        """What the peer sends cannot be taken; `code` is gRPC's."""
        raise NotImplementedError
