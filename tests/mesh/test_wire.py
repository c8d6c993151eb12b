"""Peeking at a field must never disagree with protobuf: what is routed by must be what is run."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.errors import InvalidRequest
from mesh.wire import PartialPeek, peek_string, with_strings
from protos.inference_pb2 import ModelInferRequest, RepositoryModelLoadRequest


def varint(value: int, padding: int = 0) -> bytes:
    """Protobuf's base 128 varint, with that many superfluous bytes."""
    digits = [value & 127]
    while value := value >> 7:
        digits.append(value & 127)
    digits += [0] * padding
    return bytes([digit | 128 for digit in digits[:-1]] + [digits[-1]])


def delimited(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


texts = st.text(max_size=200)
names = st.builds(lambda text, padding: varint(10, padding) + delimited(1, text.encode())[1:], texts, st.integers(0, 4))
unknown = st.one_of(
    st.builds(delimited, st.integers(8, 1 << 28), st.binary(max_size=300)),
    st.builds(lambda number, value: varint(number << 3) + varint(value), st.integers(8, 99), st.integers(0, 2**64 - 1)),
    st.builds(
        lambda number, data: varint(number << 3 | 5) + data, st.integers(8, 99), st.binary(min_size=4, max_size=4)
    ),
    st.builds(
        lambda number, data: varint(number << 3 | 1) + data, st.integers(8, 99), st.binary(min_size=8, max_size=8)
    ),
    st.just(b"\x08\x05"),  # field 1 with another wire type: unknown to protobuf
)
known = st.one_of(
    st.builds(lambda text: delimited(2, text.encode()), texts),
    st.builds(lambda text: ModelInferRequest(inputs=[{"name": text}]).SerializeToString(), texts),
    st.builds(lambda data: delimited(7, data), st.binary(max_size=300)),
)


@given(st.lists(st.one_of(names, known, unknown), max_size=8).map(b"".join))
def test_fields_in_any_order_and_number_read_as_protobuf_reads_them(message: bytes) -> None:
    # Protocol Buffers, Encoding: "Last One Wins", "Field Order"
    assert (peek_string(message, 1) or "") == ModelInferRequest.FromString(message).model_name


@given(st.lists(st.one_of(names, known, unknown), max_size=8).map(b"".join), texts, texts)
def test_strings_put_in_are_all_that_protobuf_finds_changed(message: bytes, name: str, version: str) -> None:
    expected = ModelInferRequest.FromString(message)
    expected.model_name, expected.model_version = name, version
    found = ModelInferRequest.FromString(with_strings(message, {1: name, 2: version}))
    # A field of a known number and another wire type is unknown to protobuf: it goes too.
    expected.DiscardUnknownFields()
    found.DiscardUnknownFields()
    assert found == expected
    cut = message[:-1]
    with contextlib.suppress(InvalidRequest):
        assert len(with_strings(cut, {})) == len(cut)


@given(st.binary(max_size=64), st.integers(1, 7))
@example(b"\x80" * 64, 1)
def test_random_bytes_read_as_protobuf_reads_them_or_are_refused(message: bytes, number: int) -> None:
    try:
        found = peek_string(message, number)
    except InvalidRequest:
        return
    try:
        expected = ModelInferRequest.FromString(message).model_name
    except DecodeError:
        return  # protobuf looks into every field, peek only at one
    if number == 1:
        assert (found or "") == expected


def test_the_field_asked_for_is_read() -> None:
    message = RepositoryModelLoadRequest(repository_name="r", model_name="mädchen").SerializeToString()
    assert peek_string(message, 1) == "r"
    assert peek_string(message, 2) == "mädchen"
    assert peek_string(message, 3) is None
    assert peek_string(b"", 1) is None
    assert peek_string(b"\x0a\x00", 1) == ""
    assert peek_string(delimited(2000, b"far"), 2000) == "far"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\x0a", "it ends at byte 1 inside a tag, a length or a varint"),
        (b"\x0a\x80", "it ends at byte 2 inside"),
        (b"\x0a\x05abc", "it has 5 bytes, its last field needs 7"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "its last field needs"),
        (b"\x10", "inside a tag, a length or a varint"),
        (b"\x10" + b"\xff" * 10 + b"\x01", "longer than ten bytes"),
        (b"\x80" * 11, "longer than ten bytes"),
        (b"\x15\x00", "its last field needs 5"),
        (b"\x11\x00", "its last field needs 9"),
        (b"\x0b\x0c", "field 1 has wire type 3"),
        (b"\x0c", "field 1 has wire type 4"),
        (b"\x0f", "field 1 has wire type 7"),
        (b"\x02\x00", "field number 0"),
        (b"\x8a\x80\x80\x80\x10\x00", "field number 536870913"),
        (b"\x0a\x01\xff", "field 1 is not UTF-8"),
        (b"\x0a\x03\xed\xa0\x80", "field 1 is not UTF-8"),
    ],
)
def test_malformed_messages_are_refused_with_a_reason(message: bytes, sentence: str) -> None:
    # Protocol Buffers, Encoding: "Message Structure"; groups are proto2's
    with pytest.raises(InvalidRequest, match="malformed message: ") as caught:
        peek_string(message, 1)
    assert sentence in str(caught.value)


tensors = st.builds(delimited, st.just(7), st.binary(max_size=3_000))
shares = st.floats(0, 1)


@given(st.lists(st.one_of(names, unknown, tensors), max_size=6).map(b"".join), shares, st.lists(shares, max_size=5))
@example(delimited(1, b"m") + delimited(7, bytes(2_000)), 1.0, [0.01, 0.5])
def test_reading_along_agrees_with_looking_at_the_whole(message: bytes, kept: float, cuts: list[float]) -> None:
    """Whatever it says of a message in pieces is what `peek_string` says of the message."""
    message = message[: round(kept * len(message))]
    borders = [0, *sorted(round(cut * len(message)) for cut in cuts), len(message)]
    peek = PartialPeek(1)
    if all(peek.feed(message[at:to]) for at, to in pairwise(borders)) and peek.complete:
        assert peek.found == peek_string(message, 1)


def test_reading_along_finds_what_is_usual() -> None:
    message = delimited(1, b"model") + delimited(3, b"id") + delimited(7, bytes(100_000))
    peek = PartialPeek(1)
    for at in range(0, len(message), 16_379):
        assert peek.feed(message[at : at + 16_379])
        assert peek.complete is (at + 16_379 >= len(message))
    assert peek.found == "model"
