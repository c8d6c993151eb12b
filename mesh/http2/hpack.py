"""HPACK (RFC 7541): header blocks to fields. One decoder for each connection.

What makes it fast: a block that came before is looked up, not decoded. A block that neither changed the dynamic table
nor used it means the same for ever; one that used it means the same until the table changes; one that changed it is
decoded each time. Of a new block, the indexed fields that it begins with are looked up together in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from mesh.http2 import huffman
from mesh.http2.frames import ConnectionFault, ErrorCode
from mesh.http2.tables import STATIC

Field = tuple[bytes, bytes]

T = TypeVar("T")

FIELD_OVERHEAD: Final = 32
"""§4.1: what an entry of the table counts beyond its name and value; RFC 9113 §6.5.2 counts header lists likewise."""
_STATIC_ENTRIES: Final = len(STATIC) - 1
_CACHED_BLOCKS: Final = 32
_CACHED_BYTES: Final = 1_024
_indexed: Final = re.compile(rb"[\x81-\xfe]{0,32}").match
"""Fields of one byte each (§6.1)."""


class Decoder(Generic[T]):
    """Header blocks to whatever `build` makes of their fields; `build` must depend on nothing else."""

    __slots__ = (
        "_always",
        "_beginnings",
        "_build",
        "_entries",
        "_most",
        "_most_bytes",
        "_most_list",
        "_size",
        "_until_change",
    )

    def __init__(self, build: Callable[[list[Field] | None], T], *, table_bytes: int, list_bytes: int) -> None:
        """`build` gets None for a list of more than `list_bytes`, which is decoded only as far as the table needs it.
        `table_bytes` is our SETTINGS_HEADER_TABLE_SIZE."""
        self._build = build
        self._most = self._most_bytes = table_bytes
        self._most_list = list_bytes
        self._entries: list[Field] = []
        """The dynamic table, newest last: index 62 is the last entry."""
        self._size = 0
        self._always: dict[bytes, T] = {}
        self._until_change: dict[bytes, T] = {}
        self._beginnings: dict[bytes, tuple[list[Field], int]] = {}
        """Fields and their size by what blocks begin with, until the table changes."""

    def __repr__(self) -> str:
        return f"<Decoder {len(self._entries)} entries, {self._size}/{self._most} bytes>"

    def decode(self, block: bytes) -> T:
        """What a block means; it may change the dynamic table.

        Raises:
            ConnectionFault: COMPRESSION_ERROR (RFC 9113 §4.3): the table cannot be trusted any more.
        """
        found = self._until_change.get(block)
        if found is None:
            found = self._always.get(block)
            if found is None:
                try:
                    return self._decode(block)
                except (IndexError, huffman.HuffmanError) as error:
                    said = str(error) if isinstance(error, huffman.HuffmanError) else "the block or its table ends"
                    raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"HPACK: {said}") from None
        return found

    def _decode(self, block: bytes) -> T:
        fields: list[Field] | None = []
        entries = self._entries
        at, end, list_bytes, most_list = 0, len(block), 0, self._most_list
        used = changed = False
        updates = 0
        beginning = _indexed(block).group()  # type: ignore[union-attr]
        known = self._beginnings.get(beginning)
        if known is not None:
            fields, list_bytes = known[0].copy(), known[1]
            at, used = len(beginning), True
        while at < end:
            byte = block[at]
            at += 1
            if byte & 0x80:  # §6.1: indexed field
                index = byte & 0x7F
                if index == 0x7F:
                    index, at = _integer(block, at, 0x7F)
                if index <= _STATIC_ENTRIES:
                    if not index:
                        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "HPACK: index 0")
                    field = STATIC[index]
                else:
                    used = True
                    field = entries[_STATIC_ENTRIES - index]
            else:
                if byte & 0x40:  # §6.2.1: literal with incremental indexing
                    mask, indexed = 0x3F, True
                elif byte & 0x20:  # §6.3: dynamic table size update
                    size, at = (byte & 0x1F, at) if byte & 0x1F != 0x1F else _integer(block, at, 0x1F)
                    updates += 1
                    # §4.2: at the beginning of a block; two are enough to signal the smallest and the last size.
                    if fields or fields is None or updates > 2 or size > self._most_bytes:
                        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"HPACK: table size update to {size}")
                    self._most, changed = size, True
                    self._evict()
                    continue
                else:  # §6.2.2, §6.2.3: literal without indexing, or never indexed
                    mask, indexed = 0x0F, False
                index = byte & mask
                if index == mask:
                    index, at = _integer(block, at, mask)
                if not index:
                    name, at = _string(block, at)
                elif index <= _STATIC_ENTRIES:
                    name = STATIC[index][0]
                else:
                    used = True
                    name = entries[_STATIC_ENTRIES - index][0]
                size = block[at]
                if size < 0x7F:  # the usual value, in line: neither Huffman nor long
                    at += 1 + size
                    value = block[at - size : at]
                else:
                    value, at = _string(block, at)
                if at > end:
                    raise IndexError
                field = name, value
                if indexed:
                    changed = True
                    self._add(field)
            list_bytes += len(field[0]) + len(field[1]) + FIELD_OVERHEAD
            if list_bytes > most_list:
                fields = None
            elif fields is not None:
                fields.append(field)
        built = self._build(fields)
        if changed:
            self._until_change.clear()
            self._beginnings.clear()
            return built
        if known is None and beginning and fields is not None:
            if len(self._beginnings) >= _CACHED_BLOCKS:
                self._beginnings.clear()
            begun = fields[: len(beginning)]
            size = sum([len(name) + len(value) + FIELD_OVERHEAD for name, value in begun])
            self._beginnings[beginning] = begun, size
        if end <= _CACHED_BYTES:
            cache = self._until_change if used else self._always
            if len(cache) >= _CACHED_BLOCKS:
                cache.clear()
            cache[block] = built
        return built

    def _add(self, field: Field) -> None:
        """§4.4: entries go to make room, also all of them, and what is larger than the table empties it."""
        self._entries.append(field)
        self._size += len(field[0]) + len(field[1]) + FIELD_OVERHEAD
        if self._size > self._most:
            self._evict()

    def _evict(self) -> None:
        gone = 0
        for name, value in self._entries:
            if self._size <= self._most:
                break
            self._size -= len(name) + len(value) + FIELD_OVERHEAD
            gone += 1
        del self._entries[:gone]


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """§5.1: an integer that filled its prefix, whose maximum is `value`; and where it ends.

    Raises:
        IndexError: the block ends first.
        ConnectionFault: more than 28 bits.
    """
    for shift in (0, 7, 14, 21):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "HPACK: an integer of more than 28 bits")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """§5.2: a string, and where it ends."""
    byte = block[at]
    at += 1
    size = byte & 0x7F
    if size == 0x7F:
        size, at = _integer(block, at, 0x7F)
    end = at + size
    if end > len(block):
        raise IndexError
    return (huffman.decode(block[at:end]) if byte & 0x80 else block[at:end]), end
