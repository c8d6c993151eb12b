"""A call that lies in one read is answered as the same call in many: RFC 9113 §5.2, §6.9."""

from __future__ import annotations

import pytest

from mesh.http2 import frames
from mesh.http2.limits import Limits
from tests.mesh.http2.wire import ENDED, Server, answers, data, headers, path, prefixed

MESSAGE = b"hello"
BODY = data(1, prefixed(MESSAGE), ENDED)
ROOM = frames.MAX_WINDOW - 65_535
BETWEEN = {
    "nothing": b"",
    "its own window": frames.window_update(1, 100),
    "the largest increment": frames.window_update(1, ROOM),
    "too large an increment": frames.window_update(1, ROOM + 1),
    "the reserved bit": frames.frame(frames.WINDOW_UPDATE, 0, 1, b"\x80\0\0\1"),
    "an unknown flag": frames.frame(frames.WINDOW_UPDATE, 0x55, 1, b"\0\0\0\1"),
    "an increment of 0": frames.window_update(1, 0),
    "the connection's window": frames.window_update(0, 5),
    "an idle stream's window": frames.window_update(3, 5),
    "three bytes": frames.frame(frames.WINDOW_UPDATE, 0, 1, b"\0\0\1"),
    "five bytes": frames.frame(frames.WINDOW_UPDATE, 0, 1, b"\0\0\0\1\0"),
    "260 bytes": frames.frame(frames.WINDOW_UPDATE, 0, 1, bytes(260)),
    "two": frames.window_update(1, 5) * 2,
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", ["/echo", "/hold"])
def test_what_comes_before_the_message(between: str, name: str) -> None:
    block = path(name)
    whole, apart = Server(), Server()
    said = whole.send(headers(1, block) + BETWEEN[between] + BODY)
    assert said == [frame for part in (headers(1, block), BETWEEN[between], BODY) for frame in apart.send(part)]
    assert whole.ended() == apart.ended()
    credits = [
        [(stream.id, stream.credit, stream.state) for stream in server.connection.streams.values()]
        for server in (whole, apart)
    ]
    assert credits[0] == credits[1]
    assert whole.connection.budget.left == apart.connection.budget.left


@pytest.mark.parametrize("end", range(1, 24))
def test_a_read_that_ends_early(end: int) -> None:
    server = Server()
    head = headers(1)
    wire = head + frames.window_update(1, 9) + BODY
    server.send(wire[: len(head) + end])
    assert answers(server.send(wire[len(head) + end :]), 1) == prefixed(MESSAGE)


def test_the_window_that_comes_with_a_call_is_used() -> None:
    server = Server()
    server.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 2}))
    said = server.send(headers(1) + frames.window_update(1, 4) + BODY)
    assert b"".join(payload for kind, _, _, payload in said if kind == frames.DATA) == prefixed(MESSAGE)[:6]
    assert answers(server.send(frames.window_update(1, 4)), 1) == prefixed(MESSAGE)[6:]


def test_windows_that_come_with_calls_are_paid_for() -> None:
    """Calls that are never answered earn nothing, so a flood of updates still ends."""
    server = Server(Limits(free_frames=10))
    for stream_id in range(1, 41, 2):
        server.send(
            headers(stream_id, path("/hold"))
            + frames.window_update(stream_id, 9)
            + data(stream_id, prefixed(b""), ENDED)
        )
    assert server.ended() is frames.ErrorCode.ENHANCE_YOUR_CALM
