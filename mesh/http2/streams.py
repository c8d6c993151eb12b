"""The life of a stream (RFC 9113 §5.1) as one table. Server push does not exist here, so neither does `reserved`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, Protocol

from mesh.http2.frames import ErrorCode


class State(IntEnum):
    IDLE = 0
    OPEN = 1
    LOCAL = 2
    """half-closed (local): we have ended, the peer may go on."""
    REMOTE = 3
    """half-closed (remote): the peer has ended."""
    CLOSED = 4


class Move(IntEnum):
    """What can happen to a stream. END comes after the HEADERS or DATA that carried the flag."""

    RECV_HEADERS = 0
    RECV_DATA = 1
    RECV_END = 2
    RECV_RST = 3
    RECV_WINDOW = 4
    SEND_HEADERS = 5
    SEND_DATA = 6
    SEND_END = 7
    SEND_RST = 8


class Fault(IntEnum):
    """An illegal move, and what follows from it; told from a State by being negative."""

    CONNECTION_PROTOCOL = -1
    CONNECTION_CLOSED = -2
    STREAM_CLOSED = -3
    OURS = -4
    """We would break the rules: a bug."""


IDLE, OPEN, LOCAL, REMOTE, CLOSED = State  # `State.OPEN` is a slow look-up (0.2 us in CPython 3.11)
_PROTOCOL, _CLOSED, _STREAM, _OURS = Fault

TRANSITIONS: Final[tuple[tuple[State | Fault, ...], ...]] = (
    # RECV_HEADERS, RECV_DATA, RECV_END,  RECV_RST,  RECV_WINDOW, SEND_HEADERS, SEND_DATA, SEND_END, SEND_RST
    (OPEN, _PROTOCOL, _PROTOCOL, _PROTOCOL, _PROTOCOL, OPEN, _OURS, _OURS, _OURS),  # IDLE
    (OPEN, OPEN, REMOTE, CLOSED, OPEN, OPEN, OPEN, LOCAL, CLOSED),  # OPEN
    (LOCAL, LOCAL, CLOSED, CLOSED, LOCAL, _OURS, _OURS, _OURS, CLOSED),  # LOCAL
    (_STREAM, _STREAM, _STREAM, CLOSED, REMOTE, REMOTE, REMOTE, CLOSED, CLOSED),  # REMOTE
    (_CLOSED, _CLOSED, _CLOSED, CLOSED, CLOSED, _OURS, _OURS, _OURS, _OURS),  # CLOSED
)
"""`TRANSITIONS[state][move]`. What we reset may still receive frames that were under way (§5.1, `closed`): those are
ignored before the table is asked."""

ERRORS: Final = {
    Fault.CONNECTION_PROTOCOL: ErrorCode.PROTOCOL_ERROR,
    Fault.CONNECTION_CLOSED: ErrorCode.STREAM_CLOSED,
    Fault.STREAM_CLOSED: ErrorCode.STREAM_CLOSED,
}


class IllegalMove(Exception):
    """We were about to break the table: a bug, never the peer's doing."""


class Sink(Protocol):
    """Takes the pieces of a message, the first excepted, as they come."""

    keeps: bool
    """The pieces are also kept, for `Assembly.gathered`."""

    def feed(self, piece: bytes | memoryview) -> None:
        """The next piece, a view only if it is not kept; `stream.need` more bytes are to come."""


class Stream:
    """One stream that is open in at least one direction. Idle and closed streams take no memory."""

    __slots__ = (
        "chunks",
        "credit",
        "end_with_data",
        "flag",
        "head",
        "held",
        "id",
        "left",
        "need",
        "on_room",
        "owner",
        "prefix",
        "queue",
        "queued",
        "recv_left",
        "since",
        "sink",
        "size",
        "started",
        "state",
        "trailers",
    )

    def __init__(self, stream_id: int, head: Any, recv_left: int, now: float) -> None:
        self.id = stream_id
        self.head = head
        """What the role made of the headers."""
        self.state = State.OPEN
        self.recv_left = recv_left
        """Bytes the peer may still send (§5.2)."""
        self.left = -1
        """Bytes that content-length still promises; -1: it promised nothing."""
        self.held = False
        """Credit is held back until the messages that came were taken."""
        self.credit = 0
        """Our window for sending is the peer's initial window plus this, which is often negative."""
        # The message that is being received: prefix and flag, bytes still to come (-1: the prefix is not complete).
        self.prefix = b""
        self.flag = 0
        self.need = -1
        self.size = 0
        self.chunks: list[bytes | bytearray] | None = None
        self.sink: Sink | None = None
        """Where its pieces go; None: it is put together."""
        self.started = False
        """Headers were sent (server), or came (client)."""
        # What waits to be sent.
        self.queue: deque[memoryview] | None = None
        self.queued = 0
        self.on_room: Callable[[], None] | None = None
        """Called when some of the queue has left."""
        self.trailers: bytes | None = None
        self.end_with_data = False
        self.since = now
        """When it was opened; later, when bytes last left it."""
        self.owner: Any = None
        """The call, as the role's user knows it."""

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.state.name} need={self.need} queued={self.queued}>"

    def move(self, move: Move) -> State:
        """Make a move of ours.

        Raises:
            IllegalMove
        """
        after = TRANSITIONS[self.state][move]
        if not isinstance(after, State):
            raise IllegalMove(f"{move.name} on {self!r}")
        self.state = after
        return after
