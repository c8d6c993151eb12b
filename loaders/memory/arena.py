"""Which bytes of one large buffer are taken: a device's memory, or the slab of the host.

Best fit, at the low end, free neighbours joined at once. What does not fit into one hole may lie in several, cut where
its owner allows: first as few and as large pieces as the holes allow, and where that fails, the largest pieces first,
each into the hole that fits it best.

Every operation takes O(log n) comparisons for n holes; a hole of a size that none has yet moves up to 8 bytes for each
other size. Whatever is taken is a multiple of 512 bytes, so that nothing is lost to rounding. Not thread-safe.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

GRANULE: Final = 512


class Extent(NamedTuple):
    offset: int
    size_bytes: int


class Arena:
    """The books of a buffer, exact: what is taken and what is free make up the capacity."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes & -GRANULE
        self.free_bytes = 0
        self._taken: dict[int, int] = {}
        self._holes: dict[int, int] = {}
        """Size by offset."""
        self._ends: dict[int, int] = {}
        """Offset of the hole that ends there."""
        self._of_size: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []
        """Those of holes, each once, ascending."""
        if self.capacity_bytes:
            self._add_hole(0, self.capacity_bytes)

    @property
    def taken_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_hole_bytes(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, size_bytes: int) -> Extent | None:
        """One piece of a positive multiple of 512 bytes; None: no hole is as large."""
        if size_bytes <= 0 or size_bytes % GRANULE:
            raise ValueError(f"size_bytes: expected a positive multiple of {GRANULE}, not {size_bytes}")
        at = bisect_left(self._sizes, size_bytes)
        if at == len(self._sizes):
            return None
        hole_bytes = self._sizes[at]
        offset = next(iter(self._of_size[hole_bytes]))
        self._remove_hole(offset)
        if hole_bytes > size_bytes:
            self._add_hole(offset + size_bytes, hole_bytes - size_bytes)
        self._taken[offset] = size_bytes
        return Extent(offset, size_bytes)

    def allocate_cut(self, ends: Sequence[int]) -> list[Extent] | None:
        """Pieces for bytes that may be cut at any of these ends, the last of which is their size, in the order of the
        bytes; None: there is no such way, and nothing was taken."""
        if not ends:
            return []
        if ends[-1] > self.free_bytes:
            return None
        return self._in_order(ends) or self._largest_first(ends)

    def split(self, offset: int, first_bytes: int) -> None:
        """One piece becomes two, that can be freed one by one."""
        size_bytes = self._taken[offset]
        if first_bytes % GRANULE or not 0 < first_bytes < size_bytes:
            raise ValueError(f"first_bytes: expected a multiple of {GRANULE} below {size_bytes}, not {first_bytes}")
        self._taken[offset] = first_bytes
        self._taken[offset + first_bytes] = size_bytes - first_bytes

    def free(self, offset: int) -> None:
        """Give a piece back.

        Raises:
            KeyError: none begins there.
        """
        size_bytes = self._taken.pop(offset)
        following = self._holes.get(offset + size_bytes)
        if following is not None:
            self._remove_hole(offset + size_bytes)
            size_bytes += following
        before = self._ends.get(offset)
        if before is not None:
            size_bytes += self._remove_hole(before)
            offset = before
        self._add_hole(offset, size_bytes)

    def holes(self) -> Iterator[Extent]:
        """In no order."""
        return (Extent(offset, size_bytes) for offset, size_bytes in self._holes.items())

    def take_hole(self, offset: int) -> None:
        """The whole hole that begins there.

        Raises:
            KeyError: none does.
        """
        self._taken[offset] = self._remove_hole(offset)

    def _in_order(self, ends: Sequence[int]) -> list[Extent] | None:
        pieces: list[Extent] = []
        done = 0
        while done < ends[-1]:
            reach = min(done + self.largest_hole_bytes, ends[-1])
            at = bisect_right(ends, reach)
            if not at or ends[at - 1] <= done:
                self._free_all(pieces)
                return None
            piece = self.allocate(ends[at - 1] - done)
            assert piece is not None
            pieces.append(piece)
            done = ends[at - 1]
        return pieces

    def _largest_first(self, ends: Sequence[int]) -> list[Extent] | None:
        sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        pieces: dict[int, Extent] = {}
        for n in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            piece = self.allocate(sizes[n])
            if piece is None:
                self._free_all(pieces.values())
                return None
            pieces[n] = piece
        return [pieces[n] for n in range(len(sizes))]

    def _free_all(self, pieces: Iterable[Extent]) -> None:
        for piece in pieces:
            self.free(piece.offset)

    def _add_hole(self, offset: int, size_bytes: int) -> None:
        self._holes[offset] = size_bytes
        self._ends[offset + size_bytes] = offset
        offsets = self._of_size.get(size_bytes)
        if offsets is None:
            self._of_size[size_bytes] = {offset: None}
            insort(self._sizes, size_bytes)
        else:
            offsets[offset] = None
        self.free_bytes += size_bytes

    def _remove_hole(self, offset: int) -> int:
        size_bytes = self._holes.pop(offset)
        del self._ends[offset + size_bytes]
        offsets = self._of_size[size_bytes]
        del offsets[offset]
        if not offsets:
            del self._of_size[size_bytes]
            del self._sizes[bisect_left(self._sizes, size_bytes)]
        self.free_bytes -= size_bytes
        return size_bytes
