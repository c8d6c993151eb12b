"""Registry values and keys: what is written is read again, and whatever else is there is a BadRecord."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import MISSING, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.records import (
    BadRecord,
    CopyRecord,
    CopyStatus,
    ModelRecord,
    PodRecord,
    Priority,
    Record,
    TenantRecord,
    Tier,
    VModelRecord,
    copy_key,
    decode,
    encode,
    key_of,
    model_key,
)

_SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)

_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too: an error may quote a file name that is not UTF-8
_IDS = _TEXT.filter(bool)
_POD_IDS = _IDS.filter(lambda text: "/" not in text)
_NUMBERS = st.integers(0, 2**63 - 1)
_RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        ModelRecord,
        _IDS,
        _TEXT,
        _TEXT,
        _TEXT,
        _NUMBERS,
        _NUMBERS,
        st.booleans(),
        _TEXT,
        _NUMBERS,
        _NUMBERS,
        st.booleans(),
        _NUMBERS,
        _TEXT,
        st.sampled_from(Priority),
        _NUMBERS,
        revision=_NUMBERS,
        created=_NUMBERS,
    ),
    st.builds(TenantRecord, _IDS, _NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, revision=_NUMBERS),
    st.builds(VModelRecord, _IDS, _TEXT, _TEXT, _TEXT, _TEXT, revision=_NUMBERS),
    st.builds(
        PodRecord,
        _POD_IDS,
        _TEXT,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        st.booleans(),
        _TEXT,
        _TEXT,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        _NUMBERS,
        revision=_NUMBERS,
        created=_NUMBERS,
    ),
    st.builds(
        CopyRecord,
        _IDS,
        _POD_IDS,
        st.sampled_from(CopyStatus),
        _NUMBERS,
        _NUMBERS,
        _TEXT,
        st.booleans(),
        st.booleans(),
        _NUMBERS,
        st.sampled_from(Tier),
        _NUMBERS,
    ),
)


@_SETTINGS
@given(_RECORDS)
def test_round_trip(record: Record) -> None:
    """Model ids with slashes and any unicode included; the registry's own numbers come beside the value."""
    stamps = {name: getattr(record, name, 0) for name in ("revision", "created")}
    again = decode(key_of(record), encode(record), **stamps)
    assert again == record
    assert all(getattr(again, name, 0) == stamp for name, stamp in stamps.items())


@_SETTINGS
@given(_RECORDS, st.dictionaries(st.text().map("x-{}".format), st.integers() | st.text() | st.none()))
def test_unknown_members_are_ignored(record: Record, more: dict[str, object]) -> None:
    """Versions can be mixed in one mesh."""
    value = {**json.loads(encode(record)), **more}
    assert decode(key_of(record), json.dumps(value).encode()) == record


def test_defaults_and_what_the_key_tells_are_left_out() -> None:
    assert json.loads(encode(ModelRecord("m", "onnx", "/m", revision=3, created=2))) == {"format": "onnx", "path": "/m"}
    assert json.loads(encode(CopyRecord("a/b", "p", CopyStatus.LOADED))) == {"status": "loaded"}


def test_members_cannot_contradict_the_key_or_the_registry() -> None:
    value = b'{"model_id": "other", "format": "onnx", "path": "/m", "revision": 99, "created": 99}'
    assert decode("models/m", value, revision=4, created=3) == ModelRecord("m", "onnx", "/m", created=3)


def test_a_slash_belongs_to_the_model_not_to_the_pod() -> None:
    assert copy_key("p", "team/m") == "copies/p/team/m"
    record = decode("copies/p/team/m", b'{"status": "loading"}')
    assert record == CopyRecord("team/m", "p", CopyStatus.LOADING)


_GOOD: dict[type[Record], Record] = {
    ModelRecord: ModelRecord("m", "onnx", "/m"),
    VModelRecord: VModelRecord("v", "a", "b"),
    PodRecord: PodRecord("p", "h:1", 10),
    CopyRecord: CopyRecord("m", "p", CopyStatus.LOADED),
}
_MEMBERS = [
    (record, f.name, f.default is MISSING)
    for record in _GOOD.values()
    for f in fields(record)
    if f.name not in ("revision", "created")
]
_KEYS = ("model_id", "vmodel_id", "pod_id")


@pytest.mark.parametrize(("record", "member", "required"), _MEMBERS)
def test_members_of_the_wrong_type_or_missing(record: Record, member: str, required: bool) -> None:
    value = json.loads(encode(record))
    wrong: list[object] = [None, [], {}, 1.5, -1, 2**63, 10**4_000, float("inf"), [[["deep"]]]]
    kind = type(getattr(record, member))
    wrong += [x for x in (True, 1, "text") if type(x) is not kind]
    for bad in wrong:
        with pytest.raises(BadRecord, match=rf"{member}") as caught:
            decode(key_of(record), json.dumps({**value, member: bad}).encode())
        assert len(str(caught.value)) < 200, "a message of bounded length, whatever was written"
    if required and member not in _KEYS:
        del value[member]
        with pytest.raises(BadRecord, match=member):
            decode(key_of(record), json.dumps(value).encode())


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"{",
        b"{}x",
        b"\xff\xfe",
        b'{"format": "onnx", "path": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"refs": ' + b"9" * 5_000 + b"}",
    ],
)
def test_what_is_not_a_json_object(value: bytes) -> None:
    with pytest.raises(BadRecord, match="models/m"):
        decode("models/m", value)


@pytest.mark.parametrize(
    "key",
    ["", "/", "models", "models/", "pods/", "pods/a/b", "copies/p", "copies/p/", "copies//m", "things/x", "model/m"],
)
def test_bad_keys(key: str) -> None:
    with pytest.raises(BadRecord):
        decode(key, b'{"format": "onnx", "path": "/m", "address": "h:1", "capacity_bytes": 1, "status": "loaded"}')


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([m for _, m, _ in _MEMBERS]), inner),
    max_leaves=8,
)


@_SETTINGS
@given(st.sampled_from([*_GOOD.values()]), st.binary(max_size=40) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_is_a_record_or_a_bad_record(record: Record, value: bytes) -> None:
    with suppress(BadRecord):
        assert type(decode(key_of(record), value)) is type(record)


@_SETTINGS
@given(st.text(max_size=12), st.binary(max_size=12))
def test_any_key_is_a_record_or_a_bad_record(key: str, value: bytes) -> None:
    for kind in ("", "models/", "vmodels/", "pods/", "copies/"):
        try:
            record = decode(kind + key, value)
        except BadRecord:
            continue
        assert key_of(record) == kind + key


def test_stamps_do_not_make_records_differ() -> None:
    record = ModelRecord("m", "onnx", "/m", revision=1, created=1)
    assert record == replace(record, revision=2, created=2)
    assert model_key("m") == key_of(record)
