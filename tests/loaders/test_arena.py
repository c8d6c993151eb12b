"""`loaders.memory.arena`: no byte is given twice, none is lost, and what fits is found."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaders.memory.arena import GRANULE, Arena, Extent

CELLS = 64


def _fits(holes: list[int], sizes: list[int]) -> bool:
    """The largest first, each into the hole that fits it best."""
    for size in sorted(sizes, reverse=True):
        fitting = [hole for hole in holes if hole >= size]
        if not fitting:
            return False
        holes.remove(min(fitting))
        holes.append(min(fitting) - size)
    return True


class AgainstAMap(RuleBasedStateMachine):
    """Beside a naive model: one flag for every granule."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(CELLS * GRANULE)
        self.cells = [False] * CELLS
        self.pieces: list[Extent] = []

    def _take(self, piece: Extent) -> None:
        cells = range(piece.offset // GRANULE, (piece.offset + piece.size_bytes) // GRANULE)
        assert not any(self.cells[n] for n in cells)
        for n in cells:
            self.cells[n] = True
        self.pieces.append(piece)

    def _holes(self) -> list[int]:
        runs = "".join(" #"[taken] for taken in self.cells).split("#")
        return sorted(len(run) * GRANULE for run in runs if run)

    @rule(cells=st.integers(1, CELLS))
    def allocate(self, cells: int) -> None:
        fitting = [hole for hole in self._holes() if hole >= cells * GRANULE]
        piece = self.arena.allocate(cells * GRANULE)
        assert (piece is not None) == bool(fitting)
        if piece is not None:
            assert piece.size_bytes == cells * GRANULE
            self._take(piece)
            left = self._holes()
            assert fitting[0] == piece.size_bytes or fitting[0] - piece.size_bytes in left  # best fit

    @rule(parts=st.lists(st.integers(1, 12), min_size=1, max_size=12))
    def allocate_cut(self, parts: list[int]) -> None:
        ends = [sum(parts[: n + 1]) * GRANULE for n in range(len(parts))]
        pieces = self.arena.allocate_cut(ends)
        if pieces is None:
            assert not _fits(self._holes(), [part * GRANULE for part in parts])
            return
        done = 0
        for piece in pieces:
            done += piece.size_bytes
            assert done in ends
            self._take(piece)
        assert done == ends[-1]

    @rule(n=st.integers(0, 1000), first=st.integers(1, CELLS))
    def split(self, n: int, first: int) -> None:
        if self.pieces:
            piece = self.pieces[n % len(self.pieces)]
            if first * GRANULE < piece.size_bytes:
                self.arena.split(piece.offset, first * GRANULE)
                self.pieces.remove(piece)
                self.pieces.append(Extent(piece.offset, first * GRANULE))
                self.pieces.append(Extent(piece.offset + first * GRANULE, piece.size_bytes - first * GRANULE))

    @rule(n=st.integers(0, 1000))
    def free(self, n: int) -> None:
        if self.pieces:
            piece = self.pieces.pop(n % len(self.pieces))
            self.arena.free(piece.offset)
            for cell in range(piece.offset // GRANULE, (piece.offset + piece.size_bytes) // GRANULE):
                self.cells[cell] = False

    @invariant()
    def books_are_exact(self) -> None:
        assert self.arena.free_bytes == self.cells.count(False) * GRANULE
        assert self.arena.taken_bytes == sum(piece.size_bytes for piece in self.pieces)
        assert self.arena.largest_hole_bytes == max(self._holes(), default=0)


AgainstAMap.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstAMap = AgainstAMap.TestCase


def test_what_fits_in_no_hole_is_cut_where_allowed() -> None:
    arena = Arena(10 * GRANULE)
    pieces = [arena.allocate(GRANULE) for _ in range(10)]
    for n in (1, 2, 4, 5, 6):
        piece = pieces[n]
        assert piece is not None
        arena.free(piece.offset)
    assert arena.allocate(4 * GRANULE) is None
    assert arena.allocate_cut([4 * GRANULE]) is None
    cut = arena.allocate_cut([2 * GRANULE, 3 * GRANULE, 5 * GRANULE])
    assert cut == [Extent(4 * GRANULE, 3 * GRANULE), Extent(GRANULE, 2 * GRANULE)]
    assert arena.free_bytes == 0


def test_the_largest_go_first_where_order_does_not_do() -> None:
    """Holes of 3 and 2, pieces of 2 and 3: in order the first would spoil the larger hole."""
    arena = Arena(6 * GRANULE)
    pieces = [arena.allocate(size * GRANULE) for size in (3, 1, 2)]
    for piece in (pieces[0], pieces[2]):
        assert piece is not None
        arena.free(piece.offset)
    assert arena.allocate_cut([2 * GRANULE, 5 * GRANULE]) == [Extent(4 * GRANULE, 2 * GRANULE), Extent(0, 3 * GRANULE)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_freeing_all_leaves_one_hole(sizes: list[int]) -> None:
    arena = Arena(2000 * GRANULE)
    pieces = [piece for size in sizes if (piece := arena.allocate(size * GRANULE))]
    assert all(a.offset + a.size_bytes <= b.offset for a, b in pairwise(sorted(pieces)))
    for piece in sorted(pieces, key=lambda piece: piece.size_bytes):
        arena.free(piece.offset)
    assert arena.largest_hole_bytes == arena.free_bytes == arena.capacity_bytes


def test_mistakes_are_told() -> None:
    arena = Arena(4 * GRANULE + 100)
    assert arena.capacity_bytes == 4 * GRANULE
    for size in (0, -GRANULE, 100):
        with pytest.raises(ValueError, match="size_bytes: expected a positive multiple of 512"):
            arena.allocate(size)
    piece = arena.allocate(2 * GRANULE)
    assert piece is not None
    with pytest.raises(ValueError, match="first_bytes: expected a multiple of 512 below 1024"):
        arena.split(piece.offset, 2 * GRANULE)
    arena.free(piece.offset)
    with pytest.raises(KeyError):
        arena.free(piece.offset)
    assert Arena(0).allocate_cut([GRANULE]) is None
    assert Arena(0).allocate_cut([]) == []
