"""Universal Binary JSON as XGBoost writes it, read strictly: XGBoost's own reader trusts the lengths in a file, and a
damaged one ends the process.

Source: ubjson.org, Draft 12, "Value Types" and "Container Types"; numbers are big-endian.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

_NUMBERS: Final = {
    ord(marker): np.dtype(dtype)
    for marker, dtype in (
        ("i", "i1"),
        ("U", "u1"),
        ("I", ">i2"),
        ("l", ">i4"),
        ("L", ">i8"),
        ("d", ">f4"),
        ("D", ">f8"),
    )
}
_CONSTANTS: Final = {ord("Z"): None, ord("T"): True, ord("F"): False}
_MAX_DEPTH: Final = 32


def parsed(content: bytes | bytearray) -> Any:
    """The only value in `content`: dicts, lists, `str`, numbers, and numpy arrays for those of one numeric type.

    Raises:
        ValueError: it is cut off, has bytes to spare, or is not UBJSON.
    """
    reader = _Reader(content)
    try:
        value = reader.value(reader.byte(), 0)
    except (IndexError, UnicodeDecodeError):
        raise ValueError(f"it ends or breaks off at byte {reader.at}") from None
    if reader.at != len(content):
        raise ValueError(f"{len(content) - reader.at} bytes follow its end")
    return value


class _Reader:
    def __init__(self, content: bytes | bytearray) -> None:
        self._content = content
        self.at = 0

    def byte(self) -> int:
        byte = self._content[self.at]
        self.at += 1
        return byte

    def value(self, marker: int, depth: int) -> Any:
        if marker in _NUMBERS:
            return self._array(marker, 1)[0].item()
        if marker == ord("S"):
            return self._text(self.byte())
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        if depth == _MAX_DEPTH:
            raise ValueError(f"it nests deeper than {_MAX_DEPTH}")
        if marker == ord("{"):
            return self._members(depth + 1)
        if marker == ord("["):
            return self._elements(depth + 1)
        raise ValueError(f"it has no value at byte {self.at - 1}")

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while (marker := self.byte()) != ord("}"):
            key = self._text(marker)
            if key in members:
                raise ValueError(f"it has {key!r} twice")
            members[key] = self.value(self.byte(), depth)
        return members

    def _elements(self, depth: int) -> Any:
        marker = self.byte()
        if marker == ord("$"):
            kind = self.byte()
            if kind not in _NUMBERS or self.byte() != ord("#"):
                raise ValueError(f"it has no typed array at byte {self.at - 1}")
            return self._array(kind, self._length(self.byte()))
        if marker == ord("#"):
            return [self.value(self.byte(), depth) for _ in range(self._length(self.byte()))]
        values = []
        while marker != ord("]"):
            values.append(self.value(marker, depth))
            marker = self.byte()
        return values

    def _array(self, kind: int, count: int) -> Any:
        dtype = _NUMBERS[kind]
        begin = self.at
        self.at += count * dtype.itemsize
        if self.at > len(self._content):
            raise IndexError
        return np.frombuffer(self._content, dtype, count, begin)

    def _text(self, marker: int) -> str:
        length = self._length(marker)
        begin = self.at
        self.at += length
        if self.at > len(self._content):
            raise IndexError
        return self._content[begin : self.at].decode()

    def _length(self, marker: int) -> int:
        if marker not in _NUMBERS or marker in b"dD":
            raise ValueError(f"it has no length at byte {self.at - 1}")
        dtype = _NUMBERS[marker]
        begin = self.at
        self.at += dtype.itemsize
        if self.at > len(self._content):
            raise IndexError
        length = int.from_bytes(self._content[begin : self.at], "big", signed=marker != ord("U"))
        if length < 0:
            raise ValueError(f"it has a negative length at byte {begin}")
        return length
