"""A hand-held client for tests: frames as bytes, and what a connection answers as tuples."""

from __future__ import annotations

from mesh.http2 import frames
from mesh.http2.frames import FRAME_BYTES, HEAD, ErrorCode
from mesh.http2.grpc import RequestHead
from mesh.http2.hpack import Field
from mesh.http2.hpack_encoder import literal
from mesh.http2.limits import Limits
from mesh.http2.server import RESPONSE, ServerConnection
from mesh.http2.streams import Stream

REQUEST: list[Field] = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/echo"),
    (b":authority", b"test"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]
BLOCK = literal(REQUEST)
HELLO = frames.PREFACE + frames.settings({}) + frames.SETTINGS_ACK
ENDED = frames.END_STREAM


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Echo:
    """Answers unary calls with their message; /hold is never answered."""

    def __init__(self) -> None:
        self.connection: ServerConnection
        self.begun: list[str] = []
        self.aborts = 0

    def begin(self, stream: Stream, head: RequestHead) -> None:
        self.begun.append(head.path)

    def whole(self, stream: Stream, head: RequestHead, message: bytes) -> None:
        self.begin(stream, head)
        self.message(stream, message, compressed=False, ended=True)

    def opening(self, stream: Stream, piece: bytes) -> None:
        """Nothing is to be done before all of it is there."""

    def message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        stream.owner = message
        if ended:
            self.end(stream)

    def end(self, stream: Stream) -> None:
        if stream.head.path == "/hold":
            return
        if stream.owner is None:
            self.connection.status(stream, 12, "no message")
        else:
            self.connection.reply(stream, literal(RESPONSE), stream.owner)

    def aborted(self, stream: Stream) -> None:
        self.aborts += 1


class Server:
    """A server connection and what it said."""

    def __init__(self, limits: Limits | None = None, hello: bytes = HELLO) -> None:
        self.clock = Clock()
        self.calls = Echo()
        self.connection = self.calls.connection = ServerConnection(limits or Limits(), self.clock, self.calls)
        self.hello = self.connection.take()
        if hello:
            self.send(hello)

    def send(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """The frames of the answer: kind, flags, stream, payload."""
        self.connection.receive(data)
        return self.said()

    def said(self) -> list[tuple[int, int, int, bytes]]:
        return parse(bytes(self.connection.take()))

    def ended(self) -> ErrorCode | None:
        return self.connection.fault

    def is_empty(self) -> bool:
        """Nothing of any stream is left."""
        connection = self.connection
        return not (connection.streams or connection.buffered or connection.unsent or connection.sending)


def parse(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    at = 0
    while at < len(data):
        high, low, kind, flags, stream_id = HEAD.unpack_from(data, at)
        size = high << 8 | low
        assert size <= FRAME_BYTES
        at += 9 + size
        assert at <= len(data)
        found.append((kind, flags, stream_id, data[at - size : at]))
    return found


def headers(stream_id: int, block: bytes = BLOCK, flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream_id, block)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frames.frame(frames.DATA, flags, stream_id, payload)


def prefixed(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


def request(stream_id: int, message: bytes = b"hello", block: bytes = BLOCK) -> bytes:
    return headers(stream_id, block) + data(stream_id, prefixed(message), ENDED)


def path(name: str) -> bytes:
    return literal([(key, name.encode() if key == b":path" else value) for key, value in REQUEST])


def answers(said: list[tuple[int, int, int, bytes]], stream_id: int) -> bytes:
    """The data of a stream, and that it ended."""
    mine = [entry for entry in said if entry[2] == stream_id]
    assert mine[-1][0] == frames.HEADERS
    assert mine[-1][1] & ENDED
    return b"".join(payload for kind, _, _, payload in mine if kind == frames.DATA)


def resets(said: list[tuple[int, int, int, bytes]]) -> list[tuple[int, ErrorCode]]:
    return [(entry[2], ErrorCode(frames.word(entry[3]))) for entry in said if entry[0] == frames.RST_STREAM]


def goaways(said: list[tuple[int, int, int, bytes]]) -> list[ErrorCode]:
    return [ErrorCode(frames.word(entry[3], 4)) for entry in said if entry[0] == frames.GOAWAY]
