"""HPACK (RFC 7541): fields to header blocks.

`literal` blocks use the static table only, so that they mean the same on every connection and can be kept. `Encoder`
also uses the dynamic table, for fields that were sent before: what is never repeated (a trace id) never enters it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mesh.http2.hpack import FIELD_OVERHEAD, Field
from mesh.http2.tables import STATIC

_BY_FIELD: Final = {field: index for index, field in reversed(list(enumerate(STATIC))) if index}
_BY_NAME: Final = {field[0]: index for index, field in reversed(list(enumerate(STATIC))) if index}
_SEEN: Final = 1_024
_INDEXED_BYTES: Final = 512
"""Larger fields would push everything else out."""


def integer(value: int, prefix_bits: int, first: int) -> bytes:
    """§5.1: an integer after the bits of `first`."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _literal(name: bytes, value: bytes, index: int, prefix_bits: int, first: int) -> bytes:
    head = integer(index, prefix_bits, first)
    if not index:
        head += integer(len(name), 7, 0) + name
    return head + integer(len(value), 7, 0) + value


def literal(fields: Iterable[Field]) -> bytes:
    """A block that touches no dynamic table (§6.1, §6.2.2)."""
    parts = []
    for field in fields:
        index = _BY_FIELD.get(field)
        if index is not None:
            parts.append(integer(index, 7, 0x80))
        else:
            parts.append(_literal(*field, _BY_NAME.get(field[0], 0), 4, 0))
    return b"".join(parts)


class Encoder:
    """Blocks for one connection, in the order in which they are sent."""

    __slots__ = ("_added", "_entries", "_limit", "_most", "_seen", "_size", "pending")

    def __init__(self, table_bytes: int) -> None:
        """`table_bytes`: the most we use, whatever the peer allows."""
        self._limit = table_bytes
        self._most = min(table_bytes, 4_096)  # §4.2: the size until the peer says otherwise
        self.pending: list[int] = []
        """Size updates for the next block."""
        self._entries: dict[Field, int] = {}
        """In order of age; the value is the count of additions when it was added, which gives its index."""
        self._added = 0
        self._size = 0
        self._seen: dict[Field, None] = {}

    def __repr__(self) -> str:
        return f"<Encoder {len(self._entries)} entries, {self._size}/{self._most} bytes>"

    def resize(self, table_bytes: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE (§4.2)."""
        most = min(table_bytes, self._limit)
        if most == self._most and not self.pending:
            return
        self._most = most
        self._evict()
        # The smallest size since the last block, and the last one.
        self.pending = [most] if not self.pending or most <= self.pending[0] else [self.pending[0], most]

    def updates(self) -> bytes:
        """What the next block must begin with; only to be called for a block that is not made by `encode`."""
        if not self.pending:
            return b""
        said = b"".join([integer(size, 5, 0x20) for size in self.pending])
        self.pending.clear()
        return said

    def encode(self, fields: Iterable[Field]) -> bytes:
        """The next block."""
        parts = [self.updates()]
        for field in fields:
            added = self._entries.get(field)
            if added is not None:
                parts.append(integer(len(STATIC) + self._added - added, 7, 0x80))
                continue
            index = _BY_FIELD.get(field)
            if index is not None:
                parts.append(integer(index, 7, 0x80))
                continue
            name = _BY_NAME.get(field[0], 0)
            if field in self._seen and len(field[0]) + len(field[1]) <= min(_INDEXED_BYTES, self._most >> 1):
                parts.append(_literal(*field, name, 6, 0x40))
                self._add(field)
            else:
                parts.append(_literal(*field, name, 4, 0))
                self._remember(field)
        return b"".join(parts)

    def _remember(self, field: Field) -> None:
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        if len(field[1]) <= _INDEXED_BYTES:
            self._seen[field] = None

    def _add(self, field: Field) -> None:
        del self._seen[field]
        self._added += 1
        self._entries[field] = self._added
        self._size += len(field[0]) + len(field[1]) + FIELD_OVERHEAD
        self._evict()

    def _evict(self) -> None:
        while self._size > self._most:
            oldest = next(iter(self._entries))
            del self._entries[oldest]
            self._size -= len(oldest[0]) + len(oldest[1]) + FIELD_OVERHEAD
