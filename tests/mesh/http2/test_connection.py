"""What a server connection does with frames: RFC 9113 by section, gRPC over HTTP/2 by its document."""

from __future__ import annotations

import random

import pytest

from mesh.http2 import frames
from mesh.http2.frames import ErrorCode
from mesh.http2.hpack_encoder import literal
from mesh.http2.limits import Limits
from mesh.http2.streams import TRANSITIONS, Fault, IllegalMove, Move, State, Stream
from tests.mesh.http2.wire import (
    BLOCK,
    ENDED,
    HELLO,
    REQUEST,
    Server,
    answers,
    data,
    goaways,
    headers,
    parse,
    path,
    prefixed,
    request,
    resets,
)

P, S, C = ErrorCode.PROTOCOL_ERROR, ErrorCode.FRAME_SIZE_ERROR, ErrorCode.STREAM_CLOSED
FLOW = ErrorCode.FLOW_CONTROL_ERROR


def test_the_table_knows_every_move() -> None:
    assert len(TRANSITIONS) == len(State)
    assert all(len(row) == len(Move) for row in TRANSITIONS)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("move", [move for move in Move if move.name.startswith("SEND")])
def test_illegal_moves_of_ours_are_bugs(state: State, move: Move) -> None:
    """RFC 9113, section 5.1: after END_STREAM nothing but resets is sent, after RST_STREAM nothing at all."""
    stream = Stream(1, None, 0, 0.0)
    stream.state = state
    legal = {
        State.IDLE: {Move.SEND_HEADERS},
        State.OPEN: {Move.SEND_HEADERS, Move.SEND_DATA, Move.SEND_END, Move.SEND_RST},
        State.LOCAL: {Move.SEND_RST},
        State.REMOTE: {Move.SEND_HEADERS, Move.SEND_DATA, Move.SEND_END, Move.SEND_RST},
        State.CLOSED: set(),
    }
    if move in legal[state]:
        stream.move(move)
    else:
        with pytest.raises(IllegalMove):
            stream.move(move)


def test_only_closing_moves_close() -> None:
    for state in (State.OPEN, State.LOCAL, State.REMOTE):
        for move in Move:
            after = TRANSITIONS[state][move]
            ends = move in (Move.RECV_RST, Move.SEND_RST) or (state, move) in (
                (State.LOCAL, Move.RECV_END),
                (State.REMOTE, Move.SEND_END),
            )
            if not isinstance(after, Fault):
                assert (after is State.CLOSED) == ends


def test_a_request_is_answered() -> None:
    server = Server()
    assert answers(server.send(request(1)), 1) == prefixed(b"hello")
    assert server.is_empty()


def test_requests_in_any_pieces() -> None:
    rng = random.Random(3)
    wire = HELLO + b"".join(request(1 + 2 * n, b"%d" % n * n * 20) for n in range(40))
    for _ in range(40):
        server = Server(hello=b"")
        said, at = [], 0
        while at < len(wire):
            size = rng.choice((1, 2, 8, 9, 10, 100, 5_000))
            said += server.send(wire[at : at + size])
            at += size
        for n in range(40):
            assert answers(said, 1 + 2 * n) == prefixed(b"%d" % n * n * 20)
        assert server.is_empty()
        assert server.ended() is None


def test_a_message_in_many_frames_and_many_messages_in_one() -> None:
    server = Server()
    server.send(headers(1))
    message = bytes(range(256)) * 200
    wire = prefixed(message)
    for at in range(0, len(wire), 777):
        said = server.send(data(1, wire[at : at + 777], ENDED if at + 777 >= len(wire) else 0))
    assert answers(said, 1) == wire
    assert server.is_empty()


def test_padding_and_priority_are_taken_off() -> None:
    """RFC 9113, sections 6.1 and 6.2."""
    server = Server()
    padded = bytes((4,)) + b"\0\0\0\0\1" + BLOCK + b"\0" * 4
    flags = frames.END_HEADERS | frames.PADDED | frames.WITH_PRIORITY
    server.send(headers(1, padded, flags))
    said = server.send(data(1, bytes((9,)) + prefixed(b"hi") + b"\0" * 9, ENDED | frames.PADDED))
    assert answers(said, 1) == prefixed(b"hi")


def test_headers_in_continuations() -> None:
    """RFC 9113, section 6.10."""
    server = Server()
    parts = [BLOCK[:3], BLOCK[3:10], BLOCK[10:]]
    server.send(frames.frame(frames.HEADERS, 0, 1, parts[0]))
    server.send(frames.frame(frames.CONTINUATION, 0, 1, parts[1]))
    server.send(frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, parts[2]))
    assert answers(server.send(data(1, prefixed(b"x"), ENDED)), 1) == prefixed(b"x")


def test_trailers_end_a_request() -> None:
    server = Server()
    server.send(headers(1) + data(1, prefixed(b"x")))
    said = server.send(headers(1, literal([(b"x-check", b"1")]), frames.END_HEADERS | ENDED))
    assert answers(said, 1) == prefixed(b"x")


def test_answers_wait_for_windows() -> None:
    """RFC 9113, section 6.9: the stream's and the connection's, and neither is passed by a byte."""
    server = Server(hello=frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 10}) + frames.SETTINGS_ACK)
    message = bytes(100_000)
    wire = headers(1) + b"".join(
        data(1, prefixed(message)[at : at + 16_384], ENDED if at + 16_384 > len(message) else 0)
        for at in range(0, len(message) + 5, 16_384)
    )
    said = server.send(wire)
    got = b"".join(entry[3] for entry in said if entry[0] == frames.DATA)
    assert len(got) == 10
    said = server.send(frames.window_update(1, 90_000))
    got += b"".join(entry[3] for entry in said if entry[0] == frames.DATA)
    assert len(got) <= 65_535
    server.connection.pump()
    got += b"".join(entry[3] for entry in server.said() if entry[0] == frames.DATA)
    assert len(got) == 65_535
    said = server.send(frames.window_update(0, 1 << 20))
    got += b"".join(entry[3] for entry in said if entry[0] == frames.DATA)
    assert len(got) == 90_010
    said = server.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
    assert got + answers(said, 1) == prefixed(message)
    assert server.is_empty()


def test_a_window_made_negative_by_settings_recovers() -> None:
    """RFC 9113, section 6.9.2."""
    server = Server()
    server.send(headers(1, path("/hold")))
    stream = server.connection.streams[1]
    server.connection.start(stream, b"\x88")
    server.connection.send(stream, bytes(60_000))
    server.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1_000}))
    server.connection.send(stream, bytes(2_000))
    assert [entry for entry in server.said() if entry[0] == frames.DATA] == []
    assert [entry for entry in server.send(frames.window_update(1, 59_000)) if entry[0] == frames.DATA] == []
    (frame,) = server.send(frames.window_update(1, 2_000))
    assert len(frame[3]) == 2_000


def test_credit_is_given_back() -> None:
    """Whoever uploads without end is never out of credit, as long as it is taken."""
    server = Server(Limits(stream_window=100_000, connection_window=150_000))
    server.send(headers(1, path("/hold")))
    left = {0: 150_000, 1: 100_000}
    for _ in range(100):
        for entry in server.send(data(1, prefixed(bytes(10_000)))):
            assert entry[0] == frames.WINDOW_UPDATE
            left[entry[2]] += frames.word(entry[3])
        left = {stream: credit - 10_005 for stream, credit in left.items()}
        assert all(credit > 0 for credit in left.values())
    assert server.ended() is None


def test_ping_and_settings_are_acknowledged() -> None:
    server = Server()
    assert server.send(frames.frame(frames.PING, 0, 0, b"12345678")) == [(frames.PING, frames.ACK, 0, b"12345678")]
    assert server.send(frames.settings({})) == [(frames.SETTINGS, frames.ACK, 0, b"")]


def test_unknown_frames_settings_and_flags_are_ignored() -> None:
    """RFC 9113, sections 5.5 and 6.5.2."""
    server = Server()
    server.send(frames.frame(0x42, 0xFF, 1, b"whatever") + frames.settings({0x99: 7}))
    assert answers(server.send(headers(1, BLOCK, 0xC4) + data(1, prefixed(b"x"), 0xC1)), 1) == prefixed(b"x")


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (data(3, b"x"), P),  # 5.1: idle
        (data(0, b"x"), P),  # 6.1
        (data(2, b"x"), P),
        (headers(0), P),
        (headers(2), P),  # 5.1.1: even
        (frames.rst_stream(9, 0), P),  # 6.4: idle
        (frames.rst_stream(0, 0), P),
        (frames.frame(frames.RST_STREAM, 0, 1, b"abc"), S),
        (frames.window_update(9, 1), P),
        (frames.window_update(0, 0), P),  # 6.9
        (frames.frame(frames.WINDOW_UPDATE, 0, 0, b"abc"), S),
        (frames.window_update(0, (1 << 31) - 1), FLOW),  # 6.9.1
        (frames.frame(frames.PING, 0, 1, b"12345678"), P),
        (frames.frame(frames.PING, 0, 0, b"1234567"), S),
        (frames.frame(frames.SETTINGS, 0, 1, b""), P),
        (frames.frame(frames.SETTINGS, 0, 0, b"12345"), S),
        (frames.frame(frames.SETTINGS, frames.ACK, 0, b"123456"), S),
        (frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), FLOW),
        (frames.settings({frames.MAX_FRAME_SIZE: 16_383}), P),
        (frames.settings({frames.MAX_FRAME_SIZE: 1 << 24}), P),
        (frames.settings({frames.ENABLE_PUSH: 2}), P),
        (frames.frame(frames.PUSH_PROMISE, 4, 1, b"\0\0\0\2"), P),
        (frames.frame(frames.GOAWAY, 0, 1, bytes(8)), P),
        (frames.frame(frames.GOAWAY, 0, 0, bytes(7)), S),
        (frames.frame(frames.PRIORITY, 0, 0, bytes(5)), P),
        (frames.frame(frames.CONTINUATION, 4, 1, b""), P),  # 6.10: without HEADERS
        (headers(1, BLOCK, 0) + data(1, b""), P),  # 6.10: interleaved
        (headers(1, BLOCK, 0) + frames.frame(frames.CONTINUATION, 4, 3, b""), P),
        (headers(1, BLOCK, 0) + headers(1), P),
        (headers(1, BLOCK, 0) + frames.frame(0x42, 0, 1, b""), P),
        (headers(1, bytes((200,)) + BLOCK, 4 | frames.PADDED), P),  # 6.2: more padding than payload
        (headers(1) + data(1, b"\x01", frames.PADDED), P),
        (headers(1) + data(1, b"", frames.PADDED), S),
        (headers(1, b"abc", 4 | frames.WITH_PRIORITY), S),
        (headers(1, b"\x80"), ErrorCode.COMPRESSION_ERROR),
        (frames.HEAD.pack(256, 0, frames.DATA, 0, 1), S),  # 4.2: 65,536 bytes, before they come
        (request(1) + data(1, b"x"), C),  # 5.1: closed
        (request(1) + headers(1), C),
        (request(3) + headers(1), C),  # 5.1.1: skipped, so closed
    ],
)
def test_connection_errors(wire: bytes, code: ErrorCode) -> None:
    """RFC 9113, section 5.4.1: GOAWAY with the code, and nothing after it."""
    server = Server()
    said = server.send(wire)
    assert goaways(said) == [code], server.connection
    assert server.ended() is code
    assert server.send(request(201)) == []
    assert server.is_empty()


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (headers(1, BLOCK, 4 | ENDED) * 1 + data(1, b"x"), None),
        (headers(1, path("/hold"), 4) + data(1, prefixed(b""), ENDED) + data(1, b"x"), C),  # 5.1: half-closed (remote)
        (headers(1, path("/hold"), 4) + data(1, prefixed(b""), ENDED) + headers(1, BLOCK, 5), C),
        (headers(1) + headers(1), P),  # 8.1: trailers without END_STREAM
        (headers(1) + frames.window_update(1, 0), P),  # 6.9
        (headers(1) + frames.window_update(1, (1 << 31) - 1), FLOW),
        (headers(1) + frames.frame(frames.PRIORITY, 0, 1, b"abc"), S),  # 6.3
        (headers(1, literal([*REQUEST, (b"Upper", b"x")])), P),  # 8.2.1
        (headers(1, literal([*REQUEST, (b"x", b"a\nb")])), P),
        (headers(1, literal([*REQUEST, (b"x", b" a")])), P),
        (headers(1, literal([*REQUEST, (b"connection", b"close")])), P),  # 8.2.2
        (headers(1, literal([*REQUEST[:-2], (b"te", b"gzip")])), P),
        (headers(1, literal([*REQUEST, (b":path", b"/")])), P),  # 8.3: after other fields
        (headers(1, literal([REQUEST[0], *REQUEST])), P),  # 8.3.1: twice
        (headers(1, literal(REQUEST[1:])), P),  # missing
        (headers(1, literal([*REQUEST[:2], (b":path", b""), *REQUEST[3:]])), P),
        (headers(1, literal([*REQUEST[:3], (b":protocol", b"x"), *REQUEST[3:]])), P),
        (headers(1, literal([*REQUEST, (b"content-length", b"7")])) + data(1, prefixed(b"xyz")), P),  # 8.1.1
        (headers(1, literal([*REQUEST, (b"content-length", b"9")])) + data(1, prefixed(b"xyz"), ENDED), P),
        (headers(1, literal([*REQUEST, (b"content-length", b"-1")])), P),
    ],
)
def test_stream_errors(wire: bytes, code: ErrorCode | None) -> None:
    """RFC 9113, section 5.4.2: the stream is reset, the connection goes on."""
    server = Server()
    said = server.send(wire)
    if code is None:
        assert goaways(said) == [C]
        return
    assert resets(said) == [(1, code)]
    assert server.is_empty()
    assert answers(server.send(request(3)), 3) == prefixed(b"hello")


def test_frames_under_way_to_a_stream_that_we_reset_pass() -> None:
    """RFC 9113, section 5.1, closed."""
    server = Server()
    server.send(headers(1) + frames.window_update(1, 0))
    assert server.send(data(1, b"late") + frames.window_update(1, 5) + headers(1, BLOCK, 5)) == []
    assert server.ended() is None


def test_a_reset_frees_everything() -> None:
    server = Server()
    server.send(headers(1) + data(1, prefixed(bytes(50_000))[:10_000]))
    assert server.connection.buffered
    server.send(frames.rst_stream(1, ErrorCode.CANCEL))
    assert server.is_empty()
    assert server.calls.aborts == 1


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (headers(1, path("/echo"), 4 | ENDED), b"12"),
        (headers(1) + data(1, b"", ENDED), b"12"),
        (headers(1) + data(1, prefixed(b"abc")[:-1], ENDED), b"13"),  # the message is longer than the stream
        (headers(1) + data(1, b"\0\0", ENDED), b"13"),
        (headers(1) + data(1, prefixed(b"abc", 7), ENDED), b"13"),  # flag 7
        (headers(1) + data(1, b"\0\x7f\xff\xff\xff"), b"8"),  # 2 GiB, says the prefix
        (headers(1, literal([*REQUEST, (b"grpc-timeout", b"1x")])), b"13"),
        (headers(1, literal([*REQUEST, (b"x-bin", b"!")])), b"13"),
        (headers(1, literal([*REQUEST, (b"grpc-encoding", b"snappy")])), b"12"),
        (
            headers(1, literal([*REQUEST, (b"x", b"y" * 17_000)])[:16_384], 0)
            + frames.frame(frames.CONTINUATION, 4, 1, literal([*REQUEST, (b"x", b"y" * 17_000)])[16_384:]),
            b"8",
        ),
    ],
)
def test_grpc_errors(wire: bytes, status: bytes) -> None:
    """gRPC over HTTP/2: a status in the trailers, and the rest of the request is refused without blame."""
    server = Server()
    said = server.send(wire)
    answer = next(entry for entry in said if entry[0] == frames.HEADERS)
    assert b"grpc-status" + bytes((len(status),)) + status in answer[3]
    assert answer[1] & ENDED
    assert resets(said) in ([], [(1, ErrorCode.NO_ERROR)])
    assert server.is_empty()
    assert answers(server.send(request(3)), 3) == prefixed(b"hello")


def test_what_is_not_grpc_gets_http() -> None:
    server = Server()
    get = literal([(b":method", b"GET"), *REQUEST[1:]])
    text = literal([*REQUEST[:-1], (b"content-type", b"text/plain")])
    assert b"405" in server.send(headers(1, get, 5))[0][3]
    assert b"415" in server.send(headers(3, text, 5))[0][3]


def test_draining_takes_what_was_under_way_and_refuses_the_rest() -> None:
    """RFC 9113, section 6.8: a first GOAWAY that refuses nothing, a second one once the client has seen the first."""
    server = Server()
    server.send(headers(1))
    server.connection.drain()
    said = server.said()
    assert goaways(said) == [ErrorCode.NO_ERROR]
    ping = next(entry for entry in said if entry[0] == frames.PING)
    server.send(headers(3))
    said = server.send(frames.frame(frames.PING, frames.ACK, 0, ping[3]))
    assert [frames.word(entry[3]) for entry in said if entry[0] == frames.GOAWAY] == [3]
    assert not server.connection.drained
    assert resets(server.send(headers(5))) == [(5, ErrorCode.REFUSED_STREAM)]
    said = server.send(data(1, prefixed(b"1"), ENDED) + data(3, prefixed(b"3"), ENDED))
    assert (answers(said, 1), answers(said, 3)) == (prefixed(b"1"), prefixed(b"3"))
    assert server.connection.drained


def test_a_call_that_ends_before_its_request_leaves_nothing() -> None:
    """RFC 9113, section 8.1: also if its answer had to wait for the window."""
    server = Server(hello=frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 10}) + frames.SETTINGS_ACK)
    server.send(headers(1, path("/hold")))
    stream = server.connection.streams[1]
    server.connection.start(stream, b"\x88")
    server.connection.send_message(stream, bytes(100))
    server.connection.status(stream, 0, "")
    assert not server.is_empty()
    said = server.send(frames.window_update(1, 1_000))
    assert resets(said) == [(1, ErrorCode.NO_ERROR)]
    assert server.is_empty()


def test_several_streams_share_a_connection_fairly() -> None:
    """None of the streams that wait for the connection's window is served before another has had its turn."""
    server = Server(hello=frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 30}) + frames.SETTINGS_ACK)
    body = bytes(300_000)
    for stream_id in (1, 3, 5):
        server.send(headers(stream_id))
        wire = prefixed(body)
        for at in range(0, len(wire), 16_384):
            server.send(data(stream_id, wire[at : at + 16_384], ENDED if at + 16_384 > len(wire) else 0))
    counts = {1: 0, 3: 0, 5: 0}
    for _ in range(6):
        for entry in server.send(frames.window_update(0, 65_536)):
            if entry[0] == frames.DATA:
                counts[entry[2]] += len(entry[3])
    assert max(counts.values()) - min(counts.values()) <= 2 * 65_536


def test_hello_is_settings_first() -> None:
    said = parse(bytes(Server(hello=b"").hello))
    assert said[0][0] == frames.SETTINGS
    assert (frames.MAX_CONCURRENT_STREAMS, 1_024) in frames.parse_settings(said[0][3])
