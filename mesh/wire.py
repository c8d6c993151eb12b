"""What can be read from a raw message without decoding it: enough to route a request, never a tensor.

Source: Protocol Buffers, "Encoding" (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mesh.errors import InvalidRequest

_MEMO_ENTRIES: Final = 4_096
_MEMO_HEAD: Final = 48
_MEMO_PREFIX: Final = 1_024
_memo: Final[dict[tuple[int, bytes], tuple[int, bytes, str]]] = {}
"""By field and first bytes: the length of a message, all of it before its last field's contents, and what was found.
A message of the same length and the same prefix has the same top level, whatever its last field, a tensor, holds."""


def peek_string(message: bytes, field_number: int) -> str | None:
    """The string in a top-level field, or None when the message does not carry the field.

    The whole top level is walked, one hop per field, also when the field comes first: the last occurrence counts, and
    a peek that disagreed with the decoder could check one model's name and run another. Stricter than protobuf in one
    point: groups, which proto3 does not have, are refused, not skipped.

    Raises:
        InvalidRequest: the message is truncated or malformed, or the field is not UTF-8.
    """
    at, end = 0, len(message)
    key = (field_number, message[:_MEMO_HEAD])
    known = _memo.get(key)
    if known is not None and known[0] == end and message.startswith(known[1]):
        return known[2]
    wanted = field_number << 3 | 2
    start = stop = contents = -1
    try:
        while at < end:
            tag = message[at]
            if tag < 128:
                at += 1
            else:
                tag, at = _varint(message, at)
            wire_type = tag & 7
            if tag < 8 or tag >> 32:
                raise InvalidRequest(f"malformed message: field number {tag >> 3} before byte {at}")
            if wire_type == 2:  # length-delimited
                size = message[at]
                if size < 128:
                    at += 1
                else:
                    size, at = _varint(message, at)
                if tag == wanted:
                    start, stop = at, at + size
                contents = at
                at += size
            elif wire_type == 0:  # varint
                contents = -1
                _, at = _varint(message, at)
            elif wire_type == 5:  # 32 bits
                contents = -1
                at += 4
            elif wire_type == 1:  # 64 bits
                contents = -1
                at += 8
            else:
                raise InvalidRequest(f"malformed message: field {tag >> 3} has wire type {wire_type}")
    except IndexError:
        raise InvalidRequest(f"malformed message: it ends at byte {end} inside a tag, a length or a varint") from None
    if at != end:
        raise InvalidRequest(f"malformed message: it has {end} bytes, its last field needs {at}")
    if start < 0:
        return None
    try:
        found = str(message[start:stop], "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"malformed message: field {field_number} is not UTF-8: {error.reason}") from None
    if stop <= contents <= _MEMO_PREFIX:
        if len(_memo) >= _MEMO_ENTRIES:
            _memo.clear()
        _memo[key] = end, message[:contents], found
    return found


def with_strings(message: bytes, strings: Mapping[int, str]) -> bytes:
    """The message with these strings in top-level fields by number, in place of what it had there; "": nothing.

    Raises:
        InvalidRequest: see `peek_string`.
    """
    parts = [
        b"".join((bytes((number << 3 | 2,)), _as_varint(len(value)), value))
        for number, value in ((number, text.encode()) for number, text in strings.items())
        if value
    ]
    at, end, kept = 0, len(message), 0
    try:
        while at < end:
            start = at
            tag, at = _varint(message, at)
            if tag & 7 == 2:
                size, at = _varint(message, at)
            elif tag & 7 == 0:
                size, (_, at) = 0, _varint(message, at)
            elif tag & 7 in (1, 5):
                size = 8 if tag & 7 == 1 else 4
            else:
                raise InvalidRequest(f"malformed message: field {tag >> 3} has wire type {tag & 7}")
            at += size
            if tag >> 3 in strings:
                parts.append(message[kept:start])
                kept = at
    except IndexError:
        at = end + 1
    if at != end:
        raise InvalidRequest(f"malformed message: it has {end} bytes, which is not all of it")
    parts.append(message[kept:])
    return b"".join(parts)


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The varint that starts at byte `at`, and the byte after it.

    Raises:
        IndexError: the message ends first.
        InvalidRequest: it is longer than ten bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise InvalidRequest(f"malformed message: the varint before byte {at} is longer than ten bytes")


class PartialPeek:
    """`peek_string` along a message that comes in pieces, for as long as it is what it usually is: one occurrence of
    the field, in the first piece, and nothing that `peek_string` would refuse."""

    __slots__ = ("_rest", "_skip", "_wanted", "found")

    def __init__(self, field_number: int) -> None:
        self._wanted = field_number << 3 | 2
        self._rest = b""
        """A tag or length that was cut off."""
        self._skip = 0
        """Bytes of the last field's contents that are still to come."""
        self.found: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the message may end here."""
        return not self._skip and not self._rest

    def feed(self, piece: bytes) -> bool:
        """The next piece; False: a look at the whole message has to tell."""
        if self._skip >= len(piece):
            self._skip -= len(piece)
            return True
        data, at = self._rest + piece[self._skip :], 0
        self._skip, self._rest = 0, b""
        end = len(data)
        try:
            while at < end:
                start = at
                tag, at = _varint(data, at)
                if tag < 8 or tag >> 32:
                    return False
                if tag & 7 == 2:
                    size, at = _varint(data, at)
                elif tag & 7 == 0:
                    size = 0
                    _, at = _varint(data, at)
                elif tag & 7 in (1, 5):
                    size = 8 if tag & 7 == 1 else 4
                else:
                    return False
                if tag == self._wanted:
                    if self.found is not None or at + size > end:
                        return False
                    self.found = str(data[at : at + size], "utf-8")
                at += size
        except IndexError:
            self._rest = data[start:]
            return True
        except (InvalidRequest, UnicodeDecodeError):
            return False
        self._skip = at - end
        return True
