"""What a server's connection tells whoever serves its calls."""

from __future__ import annotations

from typing import Protocol

from mesh.http2.grpc import RequestHead
from mesh.http2.streams import Stream


class Calls(Protocol):
    """Who serves the calls of a connection."""

    def begin(self, stream: Stream, head: RequestHead) -> None:
        """A request's headers came. It may be answered at once."""

    def whole(self, stream: Stream, head: RequestHead, message: bytes) -> None:
        """All of a call with one message, which is not compressed, came at once: in place of `begin` and `message`."""

    def opening(self, stream: Stream, piece: bytes) -> None:
        """The first piece of a message of which `stream.need` more bytes are to come; see `Assembly`."""

    def message(self, stream: Stream, message: bytes, *, compressed: bool, ended: bool) -> None:
        """The client's next message; `ended`: and its last."""

    def end(self, stream: Stream) -> None:
        """The client sends no more; its last message, if there was one, came before."""

    def aborted(self, stream: Stream) -> None:
        """Nobody waits for the answer any more."""
