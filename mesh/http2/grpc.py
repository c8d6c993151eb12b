"""What headers mean to gRPC. Source: grpc/doc/PROTOCOL-HTTP2.md; rules for fields of RFC 9113 §8.2, §8.3.

A head is made once for each distinct header block (see `hpack.Decoder`), so what is worked out here is not worked out
for each request.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from mesh.http2.hpack import Field

ENCODINGS: Final = ("gzip", "deflate")
"""Message encodings beside identity."""

_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_BAD_VALUE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]|^[ \t]|[ \t]$")
_UNITS_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_OF_THE_CONNECTION: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_OURS: Final = frozenset(
    (
        b"te",
        b"content-type",
        b"content-length",
        b"grpc-timeout",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b"grpc-status",
        b"grpc-message",
        b"host",
    )
)
"""Fields that are not handed on as metadata."""

Pair = tuple[str, str | bytes]

_MEMO_ENTRIES: Final = 4_096
_MEMO_BYTES: Final = 256
_MEMO_ACCEPTS: Final = 64
_MEMO_NAMES: Final = 1_024
_pairs: Final[dict[Field, tuple[Pair, ...] | None]] = {}
"""What fields mean that came before on any connection; None: a pseudo-header or one of _OURS."""
KEYS: Final[dict[bytes, str]] = {}
"""Names of metadata that came before, other than `-bin` ones: what changes with each call is mostly the value."""
_accepts: Final[dict[bytes, tuple[str, ...]]] = {}


class Malformed(ValueError):
    """RFC 9113 §8.1.1: the stream ends with PROTOCOL_ERROR."""


class BadBinary(ValueError):
    """A `-bin` value is not base64."""


class RequestHead:
    """The headers of a request."""

    __slots__ = ("accepts", "content_length", "encoding", "fault", "keys", "memo", "metadata", "path", "timeout_s")

    def __init__(self) -> None:
        self.path = ""
        self.metadata: tuple[Pair, ...] = ()
        self.keys: frozenset[str] = frozenset()
        """Of the metadata."""
        self.memo: dict[str, Any] = {}
        """For whoever works out something from the rest."""
        self.timeout_s: float | None = None
        self.encoding = ""
        """Of compressed messages; empty: identity."""
        self.accepts: tuple[str, ...] = ()
        """Encodings of ours that the client takes."""
        self.content_length = -1
        self.fault: Malformed | tuple[int, int, str] | None = None
        """Why it cannot be served: malformed, or an HTTP status, a gRPC code and words."""

    def __repr__(self) -> str:
        return f"<RequestHead {self.path} {dict(self.metadata)} {self.fault or ''}>"


class ResponseHead:
    """The headers or the trailers of a response."""

    __slots__ = ("encoding", "fault", "http_status", "memo", "message", "metadata", "status")

    def __init__(self) -> None:
        self.http_status = ""
        self.status: int | None = None
        """grpc-status"""
        self.message = ""
        self.encoding = ""
        self.metadata: tuple[Pair, ...] = ()
        self.memo: dict[str, Any] = {}
        """For whoever works out something from the rest."""
        self.fault: Malformed | BadBinary | None = None


def request_head(fields: list[Field] | None) -> RequestHead:
    """Read a request's headers; never raises, see `RequestHead.fault`."""
    head = RequestHead()
    if fields is None:
        head.fault = (200, 8, "the headers are larger than SETTINGS_MAX_HEADER_LIST_SIZE")
        return head
    try:
        found, head.metadata = _split(fields)
        if not (b":method" in found and b":scheme" in found and found.get(b":path")):
            raise Malformed("pseudo-headers are missing")
        if found.get(b"te", b"trailers") != b"trailers":
            raise Malformed("te is not trailers")
        length = found.get(b"content-length")
        if length is not None:
            if not length.isdigit() or len(length) > 18:
                raise Malformed("content-length is not a number")
            head.content_length = int(length)
    except Malformed as malformed:
        head.fault = malformed
        return head
    except BadBinary as bad:
        head.fault = (200, 13, str(bad))
        return head
    head.keys = frozenset([key for key, _ in head.metadata])
    head.path = found[b":path"].decode("latin-1")
    encoding = found.get(b"grpc-encoding", b"identity")
    head.encoding = "" if encoding == b"identity" else encoding.decode("latin-1")
    accepted = found.get(b"grpc-accept-encoding", b"")
    known = _accepts.get(accepted)
    head.accepts = _accepts_of(accepted) if known is None else known
    timeout = found.get(b"grpc-timeout")
    content_type = found.get(b"content-type", b"")
    if found[b":method"] != b"POST":
        head.fault = (405, 12, "gRPC calls are POST requests")
    elif content_type != b"application/grpc" and not content_type.startswith(
        (b"application/grpc+", b"application/grpc;")
    ):
        head.fault = (415, 2, "content-type is not application/grpc")
    elif head.encoding and head.encoding not in ENCODINGS:
        head.fault = (200, 12, f"grpc-encoding {head.encoding[:64]!r} is not supported")
    elif timeout is not None:
        head.timeout_s = timeout_of(timeout)
        if head.timeout_s is None:
            head.fault = (200, 13, "grpc-timeout is not up to eight digits and a unit")
    return head


def response_head(fields: list[Field] | None) -> ResponseHead:
    """Read a response's headers or trailers; never raises, see `ResponseHead.fault`."""
    head = ResponseHead()
    if fields is None:
        head.fault = Malformed("the headers are too large")
        return head
    http_status = b""
    if fields and fields[0][0] == b":status":
        http_status, fields = fields[0][1], fields[1:]
    try:
        found, head.metadata = _split(fields)
        if not found.keys().isdisjoint(_PSEUDO):
            raise Malformed("a response has a request's pseudo-headers")
    except (Malformed, BadBinary) as malformed:
        head.fault = malformed
        return head
    head.http_status = http_status.decode("latin-1")
    status = found.get(b"grpc-status")
    if status is not None:
        head.status = int(status) if status.isdigit() and len(status) < 4 else 2
    head.message = unquote_to_bytes(found.get(b"grpc-message", b"")).decode(errors="replace")
    encoding = found.get(b"grpc-encoding", b"identity").decode("latin-1")
    head.encoding = "" if encoding == "identity" else encoding
    return head


def _split(fields: list[Field]) -> tuple[dict[bytes, bytes], tuple[Pair, ...]]:
    """Fields with a meaning here, and metadata.

    Raises:
        Malformed, BadBinary
    """
    found: dict[bytes, bytes] = {}
    metadata: list[Pair] = []
    regular = False
    for field in fields:
        try:
            pairs = _pairs[field]
        except KeyError:
            pairs = pairs_of(field)
        if pairs is not None:
            regular = True
            metadata += pairs
            continue
        name, value = field
        if name[0] == 0x3A:  # ":"
            if regular or name in found:
                raise Malformed(f"{name!r} comes twice or after other fields")  # §8.3
        else:
            regular = True
        found[name] = value
    return found, tuple(metadata)


def pairs_of(field: Field) -> tuple[Pair, ...] | None:
    """What a field is to a handler. `-bin` values are base64 with or without padding, several joined by commas.

    Raises:
        Malformed, BadBinary
    """
    name, value = field
    pairs: tuple[Pair, ...] | None
    text = value.decode("latin-1")
    # All of it printable ASCII is the usual case, and found out by a tenth of a regular expression's work.
    is_plain = text.isascii() and text.isprintable() and text[:1] != " " != text[-1:]
    if not is_plain and _BAD_VALUE.search(value):
        raise Malformed(f"the value of {name[:64]!r} has characters that are not allowed")  # §8.2.1
    key = KEYS.get(name)
    if key is not None:
        pairs = ((key, text),)
    elif name in _PSEUDO or name in _OURS:
        pairs = None
    elif _NAME.fullmatch(name) is None or name in _OF_THE_CONNECTION:
        raise Malformed(f"field {name[:64]!r} is not allowed")  # §8.2.1, §8.2.2
    elif name.endswith(b"-bin"):
        key = name.decode()
        try:
            pairs = tuple([(key, from_base64(part)) for part in value.split(b",")])
        except binascii.Error:
            raise BadBinary(f"the value of {key[:64]!r} is not base64") from None
    else:
        key = name.decode()
        pairs = ((key, text),)
        if len(name) <= _MEMO_BYTES:
            if len(KEYS) >= _MEMO_NAMES:
                KEYS.clear()
            KEYS[name] = key
    if len(name) + len(value) <= _MEMO_BYTES:
        if len(_pairs) >= _MEMO_ENTRIES:
            _pairs.clear()
        _pairs[field] = pairs
    return pairs


def fields_of(metadata: tuple[Pair, ...] | list[Pair]) -> list[Field]:
    """Metadata as header fields."""
    return [
        (
            key.encode("latin-1"),
            base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("latin-1"),
        )
        for key, value in metadata
    ]


def from_base64(text: bytes) -> bytes:
    """
    Raises:
        binascii.Error
    """
    text = text.strip(b" \t").rstrip(b"=")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _accepts_of(accepted: bytes) -> tuple[str, ...]:
    """Those of `grpc-accept-encoding` that are ours."""
    given = accepted.decode("latin-1").replace(" ", "").split(",")
    accepts = tuple([encoding for encoding in ENCODINGS if encoding in given])
    if len(accepted) <= _MEMO_BYTES:
        if len(_accepts) >= _MEMO_ACCEPTS:
            _accepts.clear()
        _accepts[accepted] = accepts
    return accepts


def timeout_of(value: bytes) -> float | None:
    """Seconds of a `grpc-timeout`; None: it is none."""
    digits, unit_s = value[:-1], _UNITS_S.get(value[-1:])
    return None if unit_s is None or not digits.isdigit() or len(digits) > 8 else int(digits) * unit_s


def timeout_field(timeout_s: float) -> bytes:
    """`grpc-timeout`: at most eight digits, so the unit grows with the value; rounded up, never 0."""
    for unit, per_s in ((b"n", 1e9), (b"u", 1e6), (b"m", 1e3), (b"S", 1.0)):
        count = int(timeout_s * per_s) + 1
        if count < 100_000_000:
            return b"%d%b" % (count, unit)
    return b"99999999S"
