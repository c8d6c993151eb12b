"""Hostile clients: bounded memory and work, and the right code in the end (issue 3, "Correct and safe")."""

from __future__ import annotations

import tracemalloc

import pytest

from mesh.http2 import frames
from mesh.http2.frames import ErrorCode
from mesh.http2.hpack_encoder import integer, literal
from mesh.http2.limits import Limits
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
    path,
    prefixed,
    request,
    resets,
)

CALM = ErrorCode.ENHANCE_YOUR_CALM


def flood(server: Server, wire: bytes, times: int = 5_000) -> ErrorCode | None:
    """Send again and again until the connection ends."""
    for _ in range(times):
        server.send(wire)
        if server.ended() is not None:
            break
    assert server.is_empty() or server.ended() is None
    return server.ended()


@pytest.mark.parametrize(
    "wire",
    {
        "ping": frames.frame(frames.PING, 0, 0, bytes(8)),
        "ping ack": frames.frame(frames.PING, frames.ACK, 0, bytes(8)),
        "settings": frames.settings({}),
        "settings ack": frames.SETTINGS_ACK,
        "many settings": frames.settings({}) + frames.frame(frames.SETTINGS, 0, 0, b"\0\x99\0\0\0\1" * 2_000),
        "window update": frames.window_update(0, 1),
        "unknown": frames.frame(0x99, 0, 0, b""),
        "priority": frames.frame(frames.PRIORITY, 0, 1, bytes(5)),
        "goaway": frames.frame(frames.GOAWAY, 0, 0, bytes(8)),
    }.values(),
)
def test_floods_of_control_frames(wire: bytes) -> None:
    """CVE-2019-9512, CVE-2019-9515 and their kin."""
    assert flood(Server(), wire) is CALM


def test_pings_between_requests_are_no_flood() -> None:
    """gRPC's bandwidth probes: a ping for every answer."""
    server = Server()
    for n in range(3_000):
        server.send(frames.frame(frames.PING, 0, 0, bytes(8)) + request(1 + 2 * n))
    assert server.ended() is None


def test_a_quiet_client_may_ping_for_ever() -> None:
    server = Server()
    for _ in range(5_000):
        server.clock.now += 1.0
        server.send(frames.frame(frames.PING, 0, 0, bytes(8)))
    assert server.ended() is None


def test_rapid_reset() -> None:
    """CVE-2023-44487"""
    server = Server()
    for n in range(5_000):
        server.send(headers(1 + 2 * n, path("/hold")) + frames.rst_stream(1 + 2 * n, ErrorCode.CANCEL))
        if server.ended() is not None:
            break
    assert server.ended() is CALM
    assert n < 1_500
    assert server.calls.aborts == len(server.calls.begun)


def test_resets_made_by_us_count_too() -> None:
    """CVE-2025-8671, "MadeYouReset": broken requests that the server itself resets."""
    server = Server()
    for n in range(5_000):
        server.send(headers(1 + 2 * n, path("/hold")) + frames.window_update(1 + 2 * n, 0))
        if server.ended() is not None:
            break
    assert server.ended() is CALM


def test_continuation_flood() -> None:
    """CVE-2024-27316: neither many small nor some large ones."""
    for size in (0, 1, 16_384):
        server = Server()
        server.send(frames.frame(frames.HEADERS, 0, 1, BLOCK[:5]))
        assert flood(server, frames.frame(frames.CONTINUATION, 0, 1, bytes(size)), 20) is CALM


def test_empty_data_flood() -> None:
    """CVE-2019-9518; also empty but for padding."""
    for wire in (data(1, b""), data(1, bytes((255,)) + bytes(255), frames.PADDED)):
        server = Server()
        server.send(headers(1))
        assert flood(server, wire) is CALM


def test_hpack_bomb() -> None:
    """CVE-2016-6581: one large entry, referred to thousands of times."""
    server = Server()
    entry = b"\x40\x01a" + integer(3_900, 7, 0) + b"z" * 3_900
    server.send(headers(1, BLOCK + entry))
    tracemalloc.start()
    for n in range(1, 50):
        said = server.send(headers(1 + 2 * n, BLOCK + b"\xbe" * 16_000, frames.END_HEADERS | ENDED))
        assert b"grpc-status\x018" in said[0][3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_hpack_table_abuse() -> None:
    """Table size updates in every block, and fields that never stay."""
    server = Server()
    for n in range(2_000):
        fresh = b"\x40\x04" + b"%04d" % n + integer(2_000, 7, 0) + bytes((0x61,)) * 2_000
        server.send(headers(1 + 2 * n, b"\x20\x3f\xe1\x1f" + BLOCK + fresh) + data(1 + 2 * n, prefixed(b""), ENDED))
    assert server.ended() is None
    assert server.connection.decoder._size <= 4_096


def test_header_list_too_large() -> None:
    server = Server()
    block = literal([*REQUEST, *((b"x-%d" % n, b"y" * 50) for n in range(200))])
    assert len(block) < 16_384
    said = server.send(headers(1, block, frames.END_HEADERS | ENDED))
    assert b"grpc-status\x018" in said[0][3]
    assert server.is_empty()


def test_window_update_overflow() -> None:
    """RFC 9113, section 6.9.1: gRPC's C core lets it pass."""
    server = Server()
    server.send(headers(1))
    assert resets(server.send(frames.window_update(1, frames.MAX_WINDOW))) == [(1, ErrorCode.FLOW_CONTROL_ERROR)]
    assert goaways(server.send(frames.window_update(0, frames.MAX_WINDOW))) == [ErrorCode.FLOW_CONTROL_ERROR]


def test_settings_overflow_of_streams() -> None:
    server = Server()
    server.send(headers(1) + frames.window_update(1, frames.MAX_WINDOW - 65_535))
    said = server.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536}))
    assert goaways(said) == [ErrorCode.FLOW_CONTROL_ERROR]


def test_more_data_than_the_window() -> None:
    server = Server(Limits(stream_window=65_535, max_message_bytes=1 << 20, connection_window=100_000))
    server.send(headers(1, path("/hold")))
    server.connection.streams[1].held = True
    server.send(data(1, prefixed(bytes(1 << 19))[:16_384]) + data(1, bytes(16_384)) * 2)
    assert resets(server.send(data(1, bytes(16_384)))) == [(1, ErrorCode.FLOW_CONTROL_ERROR)]
    assert server.is_empty()


def test_zero_window_stall() -> None:
    """A client that asks and does not take: bounded bytes, and after a while it is given up."""
    server = Server(
        Limits(max_unsent_bytes=1 << 20),
        hello=frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) + frames.SETTINGS_ACK,
    )
    said = []
    for n in range(200):
        said += server.send(request(1 + 2 * n, bytes(10_000)))
        assert server.connection.unsent <= 1 << 20
    assert {code for _, code in resets(said)} == {CALM}
    server.clock.now += 61
    server.connection.received_at = server.clock.now
    server.connection.tick()
    assert {code for _, code in resets(server.said())} == {ErrorCode.CANCEL}
    assert server.is_empty()


def test_slow_clients_are_given_up() -> None:
    """Slowloris: half a preface, half a frame, half a header block, no answer to our SETTINGS."""
    for wire in (
        frames.PREFACE[:10],
        frames.PREFACE,
        frames.PREFACE + frames.settings({}),
        HELLO + request(1)[:30],
        HELLO + headers(1, BLOCK, 0),
    ):
        server = Server(hello=wire)
        server.clock.now += 31
        server.connection.tick()
        assert server.ended() in (CALM, ErrorCode.SETTINGS_TIMEOUT)
        assert server.is_empty()


def test_silent_clients_with_calls_are_pinged_and_given_up() -> None:
    server = Server()
    server.send(headers(1, path("/hold")))
    server.clock.now += 61
    server.connection.tick()
    (ping,) = server.said()
    assert ping[0] == frames.PING
    server.clock.now += 21
    server.connection.tick()
    assert server.ended() is ErrorCode.NO_ERROR
    assert server.calls.aborts == 1


def test_idle_clients_stay() -> None:
    server = Server()
    server.clock.now += 86_400
    server.connection.tick()
    assert server.ended() is None


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nXX"])
def test_invalid_preface(wire: bytes) -> None:
    server = Server(hello=b"")
    assert goaways(server.send(wire)) == [ErrorCode.PROTOCOL_ERROR]


@pytest.mark.parametrize("first", [headers(1), frames.frame(frames.PING, 0, 0, bytes(8)), data(1, b"")])
def test_settings_come_first(first: bytes) -> None:
    """RFC 9113, section 3.4."""
    assert goaways(Server(hello=frames.PREFACE).send(first)) == [ErrorCode.PROTOCOL_ERROR]


def test_too_many_streams_are_refused() -> None:
    """RFC 9113, section 5.1.2: with the code that says that a retry is safe."""
    server = Server(Limits(max_streams=10))
    said = server.send(b"".join(headers(1 + 2 * n, path("/hold")) for n in range(15)))
    assert resets(said) == [(1 + 2 * n, ErrorCode.REFUSED_STREAM) for n in range(10, 15)]
    assert len(server.calls.begun) == 10


def test_refused_streams_are_counted() -> None:
    server = Server(Limits(max_streams=1))
    server.send(headers(1, path("/hold")))
    for n in range(1, 3_000):
        server.send(headers(1 + 2 * n, path("/hold")))
    assert server.ended() is CALM


def test_messages_that_never_end_are_bounded() -> None:
    """Promises of large messages on many streams, kept in part."""
    server = Server(Limits(max_message_bytes=1 << 20, max_buffered_bytes=1 << 21))
    for n in range(60):
        server.send(headers(1 + 2 * n) + data(1 + 2 * n, prefixed(bytes(1 << 20))[:16_384]))
        for _ in range(4):
            if 1 + 2 * n in server.connection.streams:
                server.send(data(1 + 2 * n, bytes(16_384)))
        assert server.connection.buffered <= 1 << 21
    assert len(server.connection.streams) < 60


def test_a_message_byte_by_byte_takes_no_more_than_its_size() -> None:
    server = Server()
    server.send(headers(1) + data(1, prefixed(bytes(60_000))[:5]))
    tracemalloc.start()
    for _ in range(600):
        server.send(data(1, b"x") * 100)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 200_000
    assert len(answers(server.send(data(1, b"", ENDED)), 1)) == 60_005


def test_a_flood_hurts_nobody_else() -> None:
    good, bad = Server(), Server()
    flood(bad, frames.frame(frames.PING, 0, 0, bytes(8)))
    assert bad.ended() is CALM
    assert answers(good.send(request(1)), 1) == prefixed(b"hello")
