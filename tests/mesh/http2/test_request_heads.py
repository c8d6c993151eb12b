"""Heads made from what requests share are those made of all their fields (gRPC over HTTP/2, RFC 9113 §8)."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http2.grpc import KEYS, RequestHead, request_head
from mesh.http2.hpack import Decoder, Field
from mesh.http2.request_heads import RequestHeads
from tests.mesh.http2.wire import REQUEST

NAMES = (b":path", b":method", b":other", b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding")
VALUES = (
    b"",
    b"/a",
    b"/b",
    b"POST",
    b"trailers",
    b"application/grpc",
    b"10S",
    b"999999m",
    b"7",
    b"gzip",
    b"AAE",
    b"a,b",
)
ANY: st.SearchStrategy[Field] = st.tuples(
    st.sampled_from((*NAMES, b"x-a", b"x-b", b"x-bin", b"Bad", b"connection", b"")),
    st.one_of(
        st.sampled_from((*VALUES, b" a", b"a\t", b"a\nb", b"\x7f", b"\xe9", b"1S ")),
        st.text("ab", max_size=3).map(str.encode),
    ),
)
FREQUENT: st.SearchStrategy[Field] = st.tuples(
    st.sampled_from((b"grpc-timeout", b"traceparent", b"x-request-id", b"x-bin", b"mm-model-id")),
    st.one_of(st.sampled_from((b"10S", b"AAE", b"m-1")), st.integers(0, 999).map(lambda n: b"%dm" % n)),
)
FIELDS = st.one_of(FREQUENT, FREQUENT, ANY)


@st.composite
def requests(draw: st.DrawFn) -> list[list[Field]]:
    """Of a client that sends much the same again and again, and sometimes anything."""
    beginning = [*REQUEST, *draw(st.lists(FREQUENT, max_size=2))]
    end = draw(st.lists(FREQUENT, max_size=2))
    sent: list[list[Field]] = []
    for _ in range(draw(st.integers(2, 8))):
        fields = [*beginning, *draw(st.lists(FIELDS, max_size=3)), *end]
        for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
            at = draw(st.integers(0, len(fields) - 1))
            kind = draw(st.integers(0, 3))
            if kind == 0:
                fields[at] = draw(ANY)
            elif kind == 1:
                fields.insert(at, draw(ANY))
            elif kind == 2:
                fields[at], fields[-1] = fields[-1], fields[at]
            elif len(fields) > 1:
                del fields[at]
        sent.append(fields)
    return sent


def shown(head: RequestHead) -> tuple[object, ...]:
    fault = head.fault if isinstance(head.fault, tuple) or head.fault is None else repr(head.fault)
    said = (head.path, head.metadata, head.keys, head.timeout_s, head.encoding, head.accepts, head.content_length)
    return (*said, fault, head.memo)


@given(requests())
@settings(max_examples=500, deadline=None)
def test_what_requests_share_does_not_change_what_they_mean(sent: list[list[Field]]) -> None:
    heads = RequestHeads()
    for fields in sent:
        assert shown(heads(fields)) == shown(request_head(fields))


@given(requests(), st.booleans(), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_through_a_dynamic_table(sent: list[list[Field]], huffman: bool, table_bytes: int) -> None:
    theirs = hpack.Encoder()
    theirs.header_table_size = table_bytes
    ours = Decoder(RequestHeads(), table_bytes=4_096, list_bytes=1 << 16)
    for fields in sent:
        assert shown(ours.decode(theirs.encode(fields, huffman=huffman))) == shown(request_head(fields))


def calls(count: int) -> list[list[Field]]:
    return [
        [*REQUEST, (b"grpc-timeout", b"%dm" % n), (b"user-agent", b"a"), (b"traceparent", b"%d" % n)]
        for n in range(count)
    ]


def test_only_what_changed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = RequestHeads()
    expected = [shown(request_head(fields)) for fields in calls(20)]
    assert [shown(heads(fields)) for fields in calls(3)] == expected[:3]
    monkeypatch.setattr("mesh.http2.request_heads.request_head", None)
    assert [shown(heads(fields)) for fields in calls(20)] == expected


def test_names_that_were_forgotten_are_learned_again() -> None:
    heads = RequestHeads()
    for fields in calls(5):
        KEYS.clear()
        assert shown(heads(fields)) == shown(request_head(fields))
    assert KEYS


@pytest.mark.parametrize(
    "odd",
    [
        [(b":path", b"/x")],
        [(b"te", b"gzip")],
        [(b"content-length", b"x")],
        [(b"grpc-timeout", b"x")],
        [(b"x-bin", b"!")],
        [(b"traceparent", b"a\nb")],
        [(b"Upper", b"a")],
        [(b"grpc-encoding", b"br")],
        [(b"content-type", b"text/html")],
    ],
)
def test_faults_in_what_changed_are_found(odd: list[Field]) -> None:
    heads = RequestHeads()
    for fields in calls(3):
        heads(fields)
    fields = calls(1)[0] + odd
    assert heads(fields).fault is not None
    assert shown(heads(fields)) == shown(request_head(fields))
    assert heads(None).fault == request_head(None).fault
