"""Weights of models of one layout in rows of memory: to run several in one call, theirs must have a common stride.

A row is the only copy of its model's weights, so that batches across models cost no memory. Address space is reserved
in shelves, of which the system backs with memory what was written to: a free row takes none. Neighbours are run where
they lie, as a window; what else lies in one is computed with input 0 and left, which for a few small rows costs less
than another call. Where models lie too far apart, small rows are copied together first.
"""

from __future__ import annotations

import heapq
import mmap
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from loaders.memory.layout import Layout, aligned
from loaders.skeletons.base import Views
from loaders.skeletons.views import is_even, stacked, views

MOST_ROW_BYTES: Final = 4 << 20
"""Larger models gain nothing: a run takes the time in which their weights are read."""
GAP_BYTES: Final = 256 << 10
"""Of rows in a window that are not asked for: to read more takes longer than another call. Rows above it are not
copied together."""
_SHELF_BYTES: Final = 64 << 20
_MOST_SHELF_ROWS: Final = 1024
_KEPT_WINDOWS: Final = 64


class Row(NamedTuple):
    """A place for one model."""

    shelf: Shelf
    number: int


class Part(NamedTuple):
    """Some of the models of a batch, for one call."""

    weights: Views
    size: int
    """Of rows of the weights."""
    places: list[tuple[int, int]]
    """Of models in the batch, and among the rows."""


class Shelf:
    """Rows one after another."""

    def __init__(self, row_bytes: int) -> None:
        count = max(2, min(_SHELF_BYTES // row_bytes, _MOST_SHELF_ROWS))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, count * row_bytes, flags=flags)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)  # of which one would back many free rows
        self._row_bytes = row_bytes
        self.rows = torch.frombuffer(self._memory, dtype=torch.uint8).reshape(count, row_bytes)
        self.free = list(range(count))
        self.windows: dict[tuple[int, int], Views] = {}

    def clear(self, number: int) -> None:
        """Give the memory of a row back to the system."""
        self._memory.madvise(mmap.MADV_DONTNEED, number * self._row_bytes, self._row_bytes)


class Rows:
    """All rows of one layout. Thread-safe."""

    def __init__(self, layout: Layout, data_bytes: int) -> None:
        self.row_bytes = aligned(max(data_bytes, 1), mmap.PAGESIZE)
        self._layout = layout
        self._data_bytes = data_bytes
        self._gap = GAP_BYTES // self.row_bytes
        self._shelves: list[Shelf] = []
        self._lock = threading.Lock()

    @staticmethod
    def suit(layout: Layout, data_bytes: int) -> bool:
        """Whether models of the layout can gain by rows."""
        return 0 < data_bytes <= MOST_ROW_BYTES and is_even(layout)

    def put(self, run: torch.Tensor) -> tuple[Row, Views]:
        """A model's bytes into a row of its own, the first that is free, and its tensors there."""
        with self._lock:
            shelf = next((shelf for shelf in self._shelves if shelf.free), None)
            if shelf is None:
                shelf = Shelf(self.row_bytes)
                self._shelves.append(shelf)
            row = Row(shelf, heapq.heappop(shelf.free))
        target = shelf.rows[row.number]
        target[: self._data_bytes].copy_(run[: self._data_bytes])
        return row, views(self._layout, target)

    def give_back(self, row: Row) -> None:
        """Nobody runs it any more."""
        row.shelf.clear(row.number)
        with self._lock:
            heapq.heappush(row.shelf.free, row.number)

    def parts(self, rows: Sequence[Row]) -> Iterator[Part]:
        """The rows, all different, in as few calls as pay."""
        for shelf in {id(row.shelf): row.shelf for row in rows}.values():
            places = sorted((row.number, n) for n, row in enumerate(rows) if row.shelf is shelf)
            windows = list(self._windows(places))
            if len(windows) > 2 and self.row_bytes <= GAP_BYTES:
                numbers = torch.from_numpy(np.array([number for number, _ in places]))
                together = shelf.rows.view(torch.int64).index_select(0, numbers).view(torch.uint8)
                there = [(n, at) for at, (_, n) in enumerate(places)]
                yield Part(stacked(self._layout, together), len(places), there)
                continue
            for window in windows:
                first, last = window[0][0], window[-1][0] + 1
                there = [(n, number - first) for number, n in window]
                yield Part(self._window(shelf, first, last), last - first, there)

    def _windows(self, places: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        begin = 0
        for n in range(1, len(places) + 1):
            if n == len(places) or places[n][0] - places[n - 1][0] - 1 > self._gap:
                yield places[begin:n]
                begin = n

    def _window(self, shelf: Shelf, first: int, last: int) -> Views:
        found = shelf.windows.get((first, last))
        if found is None:
            found = stacked(self._layout, shelf.rows[first:last])
            if len(shelf.windows) >= _KEPT_WINDOWS:
                shelf.windows.clear()
            shelf.windows[first, last] = found
        return found
