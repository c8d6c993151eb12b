"""A fuzzer of both roles' connections: conversations that are right, then mutated, cut and mixed.

`python -m tests.mesh.http2.fuzz 1000000 7` plays a million inputs from seed 7. What it may find: an exception out of
`receive`, books that do not balance, frames that are none, anything sent after GOAWAY. Each finding prints the input,
which then goes into `corpus`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from random import Random
from typing import Final

from mesh.http2 import frames
from mesh.http2.client import ClientConnection
from mesh.http2.exchange import Exchange
from mesh.http2.hpack_encoder import Encoder, literal
from mesh.http2.limits import Limits
from mesh.http2.server import RESPONSE
from tests.mesh.http2.wire import BLOCK, REQUEST, Clock, Server, data, headers, parse, path, prefixed

LIMITS: Final = Limits(
    max_message_bytes=60_000,
    max_buffered_bytes=80_000,
    max_unsent_bytes=90_000,
    max_streams=8,
    stream_window=70_000,
    connection_window=100_000,
    free_frames=60,
)
STATUS: Final = literal([(b"grpc-status", b"0")])
BLOCKS: Final = [
    BLOCK,
    path("/hold"),
    literal([*REQUEST, (b"grpc-timeout", b"10S"), (b"x-bin", b"AAE")]),
    literal([*REQUEST, (b"content-length", b"10")]),
    literal(RESPONSE),
    literal([*RESPONSE, (b"grpc-status", b"5"), (b"grpc-message", b"a%20b")]),
    STATUS,
    b"\x40\x01a\x01b" + BLOCK,
    BLOCK + b"\xbe",
    b"\x20\x3f\xe1\x1f" + BLOCK,
]
ROLES: Final = ("server", "client")


def pieces(rng: Random, role: str) -> list[bytes]:
    """A conversation, mostly right."""
    encoder = Encoder(4_096)
    out = [frames.PREFACE] if role == "server" else []
    out += [frames.settings({frames.INITIAL_WINDOW_SIZE: rng.choice((0, 100, 65_535, 1 << 20))}), frames.SETTINGS_ACK]
    for n in range(rng.randrange(1, 8)):
        stream_id = 1 + 2 * n if rng.uniform(0, 1) < 0.9 else rng.randrange(20)
        body = prefixed(bytes(rng.choice((0, 1, 5, 300, 40_000, 70_000))), rng.choice((0, 0, 0, 1, 2)))
        cut = rng.randrange(1, 16_385)
        block = rng.choice(BLOCKS) if rng.uniform(0, 1) < 0.7 else encoder.encode(REQUEST)
        if rng.uniform(0, 1) < 0.2:
            at = rng.randrange(len(block) + 1)
            out += [headers(stream_id, block[:at], rng.choice((0, 1)))]
            out += [frames.frame(frames.CONTINUATION, 4, stream_id, block[at:])]
        else:
            out.append(headers(stream_id, block, 4 | rng.choice((0, 0, 0, 1))))
        last = rng.choice((0, 1, 1))
        parts = [body[at : at + cut] for at in range(0, len(body), cut)][:20]
        out += [data(stream_id, part, last if part is parts[-1] else 0) for part in parts]
        if role == "client":
            out.append(headers(stream_id, STATUS, 5))
        for _ in range(rng.randrange(4)):
            out.append(odd(rng, stream_id))
    return out


def odd(rng: Random, stream_id: int) -> bytes:
    """A frame that may or may not be in place."""
    stream_id = rng.choice((stream_id, stream_id, 0, rng.randrange(30)))
    return rng.choice(
        (
            frames.window_update(stream_id, rng.choice((0, 1, 50_000, frames.MAX_WINDOW))),
            frames.rst_stream(stream_id, rng.randrange(16)),
            frames.frame(frames.PING, rng.choice((0, 1)), 0, bytes(8)),
            frames.goaway(rng.randrange(20), rng.randrange(16)),
            frames.settings({rng.randrange(8): rng.choice((0, 1, 100, 16_384, 1 << 31))}),
            frames.frame(frames.PRIORITY, 0, stream_id, bytes(5)),
            frames.frame(rng.randrange(12), rng.randrange(256), stream_id, rng.randbytes(rng.randrange(20))),
            data(stream_id, bytes((rng.randrange(20),)) + rng.randbytes(10), frames.PADDED),
            headers(stream_id, rng.choice(BLOCKS), rng.randrange(64)),
        )
    )


def mutated(rng: Random, parts: list[bytes]) -> list[bytes]:
    """Some parts swapped, doubled, dropped or with bytes changed."""
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(6)
        if kind == 0:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif kind == 1:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 2 and len(parts) > 1:
            del parts[at]
        elif kind == 3 and parts[at]:
            part = bytearray(parts[at])
            for _ in range(rng.choice((1, 1, 3))):
                part[rng.randrange(min(len(part), 40))] = rng.randrange(256)
            parts[at] = bytes(part)
        elif kind == 4:
            parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)]
        else:
            parts.insert(at, odd(rng, rng.randrange(12)))
    return parts


class Noted(Exchange):
    """A call that notes how it ended."""

    def __init__(self, outcomes: list[int]) -> None:
        super().__init__()
        self._outcomes = outcomes

    def end(self, status: int, text: str) -> None:
        self._outcomes.append(status)


def play(role: str, wire: Sequence[bytes]) -> str:
    """Give a connection its input in these pieces; how it ended. Raises on whatever must not happen."""
    if role == "server":
        server = Server(LIMITS, hello=b"")
        connection, clock = server.connection, server.clock
        outcomes: list[int] = []
        calls = 0
    else:
        clock = Clock()
        client = ClientConnection(LIMITS, clock, lambda: None)
        connection = client  # type: ignore[assignment]
        calls = 7
        outcomes = []
        for n in range(calls):
            exchange = Noted(outcomes)
            client.call(client.encoder.encode(REQUEST), bytes(n * 3_000), exchange)
        said = bytes(connection.take())
        assert said.startswith(frames.PREFACE)
        parse(said[len(frames.PREFACE) :])
    for part in wire:
        ended = connection.fault is not None
        connection.receive(part)
        said = bytes(connection.take())
        parse(said)
        assert not (ended and said)
        check(connection)
    connection.writable = False
    clock.now += 61.0
    connection.tick()
    check(connection)
    end = connection.fault
    connection.lost()
    assert not connection.streams
    assert connection.buffered == connection.unsent == 0
    assert not connection.sending
    assert len(outcomes) == calls
    return "open" if end is None else end.name


def check(connection: object) -> None:
    """The books balance."""
    from mesh.http2.connection import Connection

    assert isinstance(connection, Connection)
    streams = connection.streams.values()
    assert connection.buffered == sum(stream.size for stream in streams) >= 0
    assert connection.unsent == sum(stream.queued for stream in streams) >= 0
    assert connection.unsent <= LIMITS.max_unsent_bytes
    assert connection.buffered <= LIMITS.max_buffered_bytes
    assert all(stream.queued == sum(map(len, stream.queue or ())) for stream in streams)


def one(seed: int) -> tuple[str, list[bytes]]:
    """The input of a seed: the role, and what it is given."""
    rng = Random(seed)
    role = ROLES[rng.randrange(2)]
    parts = mutated(rng, pieces(rng, role))
    wire = b"".join(parts)
    if rng.uniform(0, 1) < 0.5:
        return role, [wire]
    cuts = sorted(rng.randrange(len(wire) + 1) for _ in range(rng.randrange(1, 9)))
    return role, [wire[at:to] for at, to in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


def main(count: int, first: int) -> None:
    ends: dict[str, int] = {}
    for seed in range(first, first + count):
        role, wire = one(seed)
        try:
            end = f"{role} {play(role, wire)}"
        except BaseException:
            print(f"seed={seed} role={role} wire={[part.hex() for part in wire]}", flush=True)
            raise
        ends[end] = ends.get(end, 0) + 1
    print(f"{count} inputs from seed {first}: {dict(sorted(ends.items()))}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
