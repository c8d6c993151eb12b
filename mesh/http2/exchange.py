"""One unary call of a client, and what came of it."""

from __future__ import annotations

from math import inf
from typing import Final

from mesh.http2.grpc import Pair, ResponseHead
from mesh.http2.streams import Stream

DEADLINE_EXCEEDED: Final = 4


class Exchange:
    """One unary call and how it ended."""

    __slots__ = ("deadline", "head", "message", "status", "text", "trailers", "unprocessed")

    def __init__(self, deadline: float = inf) -> None:
        self.deadline = deadline
        self.status: int
        self.text: str
        self.head: ResponseHead | None = None
        self.trailers: tuple[Pair, ...] = ()
        self.message: bytes | None = None
        self.unprocessed = False
        """The peer has not seen the call, so it can be made again (§8.7)."""

    @property
    def headers(self) -> tuple[Pair, ...]:
        return () if self.head is None else self.head.metadata

    def opening(self, stream: Stream, piece: bytes) -> None:
        """The first piece of a response of which `stream.need` more bytes are to come; see `Assembly`."""

    def end(self, status: int, text: str) -> None:
        """The rest is known. Called once."""
        self.status, self.text = status, text

    def late(self) -> None:
        """The deadline has passed, and the stream was reset."""
        self.end(DEADLINE_EXCEEDED, "the deadline passed before the peer answered")
