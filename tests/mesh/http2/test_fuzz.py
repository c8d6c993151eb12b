"""The fuzzer's target on a few thousand inputs, on hypothesis' and on the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http2 import frames
from tests.mesh.http2 import fuzz
from tests.mesh.http2.wire import BLOCK, data, headers, prefixed

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.txt"))


@pytest.mark.parametrize("first", range(0, 4_000, 1_000))
def test_mutated_conversations(first: int) -> None:
    fuzz.main(1_000, first)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_corpus(file: Path) -> None:
    """Inputs that once found something, or that reach what others do not: a role, how it ends, and bytes in hex."""
    role, end, *wire = file.read_text().split()
    assert fuzz.play(role, [bytes.fromhex(part) for part in wire]) == end


ID = st.integers(0, 9)
FRAME = st.one_of(
    st.builds(headers, ID, st.sampled_from(fuzz.BLOCKS), st.sampled_from([0, 1, 4, 5])),
    st.builds(
        data, ID, st.sampled_from([b"", b"\0", prefixed(b"abc"), prefixed(bytes(9_000))]), st.sampled_from([0, 1])
    ),
    st.builds(frames.rst_stream, ID, st.integers(0, 15)),
    st.builds(frames.window_update, ID, st.sampled_from([0, 1, 1_000, frames.MAX_WINDOW])),
    st.builds(lambda key, value: frames.settings({key: value}), st.integers(0, 8), st.sampled_from([0, 1, 16_384])),
    st.builds(frames.frame, st.integers(0, 10), st.integers(0, 255), ID, st.binary(max_size=20)),
    st.just(frames.frame(frames.CONTINUATION, 4, 1, BLOCK)),
)


@given(st.sampled_from(fuzz.ROLES), st.lists(FRAME, max_size=30))
@settings(max_examples=500, deadline=None)
def test_any_frames(role: str, wire: list[bytes]) -> None:
    hello = [frames.PREFACE] if role == "server" else []
    fuzz.play(role, [*hello, frames.settings({}), frames.SETTINGS_ACK, *wire])


@given(st.sampled_from(fuzz.ROLES), st.lists(st.binary(max_size=100), max_size=10))
@settings(max_examples=500, deadline=None)
def test_any_bytes(role: str, wire: list[bytes]) -> None:
    fuzz.play(role, wire)
