"""The books of one tier: which models are in it, and where their parts lie. Moves no bytes; not thread-safe."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from loaders.base import LoaderError, OutOfMemory
from loaders.memory.arena import Arena, Extent
from loaders.memory.dedup import Known, ModelKey, Part
from loaders.memory.device import Move, Span
from loaders.memory.slots import Slot


class NoRoom(OutOfMemory):
    """The tier is full, for now."""

    def __init__(self, message: str, needed_bytes: int, largest_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.largest_bytes = largest_bytes
        """Of what cannot be cut."""


class TooLarge(LoaderError):
    """The model does not fit even into an empty tier."""


@dataclass(eq=False, slots=True)
class Filling:
    """A transfer that brings parts which others may wait for."""

    ended: bool = False
    error: BaseException | None = None


@dataclass(eq=False, slots=True)
class Stored:
    """A part in a tier."""

    extents: list[Extent]
    """In the order of the part's bytes."""
    models: dict[ModelKey, None] = field(default_factory=dict)
    """Who uses it here; the first is charged for it."""
    filling: Filling | None = None
    """Its bytes are on their way."""


@dataclass(eq=False, slots=True)
class Resident:
    """A model in a tier."""

    known: Known
    spans: tuple[Span, ...]
    pins: int = 0
    """Runs and transfers that read it: it is not dropped."""
    here: bool = False
    """All its bytes have arrived."""
    slot: Slot | None = None
    """On a device; None: not made yet."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier holds, in bytes; shared ones once."""

    capacity_bytes: int
    taken_bytes: int
    saved_bytes: int
    """What it would hold more if nothing were shared."""
    largest_hole_bytes: int
    models: int


class Tier:
    """One tier."""

    def __init__(self, name: str, capacity_bytes: int) -> None:
        self.name = name
        self.arena = Arena(capacity_bytes)
        self.models: dict[ModelKey, Resident] = {}
        self.parts: dict[Part, Stored] = {}
        self.compacted_bytes = 0
        """Moved within the tier so far, so that others fit."""

    def place(self, known: Known, filling: Filling) -> tuple[Resident, list[Part]]:
        """Take room for what of a model is not here yet; those parts.

        Raises:
            NoRoom, TooLarge: nothing has changed.
        """
        missing = [part for part in known.parts if part not in self.parts]
        for part, extents in zip(missing, self._allocated(missing, known), strict=True):
            self.parts[part] = Stored(extents, filling=filling)
        for part in known.parts:
            self.parts[part].models[known.key] = None
        resident = self.models[known.key] = Resident(known, tuple(self._spans(known)))
        known.tiers += 1
        return resident, missing

    def release(self, key: ModelKey) -> Known:
        """Give up a model, and what of it nobody else uses here."""
        known = self.models.pop(key).known
        known.tiers -= 1
        for part in known.parts:
            stored = self.parts[part]
            del stored.models[key]
            if not stored.models:
                del self.parts[part]
                for extent in stored.extents:
                    self.arena.free(extent.offset)
        return known

    def cut(self, part: Part, pieces: Sequence[Part]) -> None:
        """Pieces stand for a part from now on."""
        stored = self.parts.pop(part, None)
        if stored is not None:
            for piece, extents in zip(pieces, self._shared_out(pieces, stored.extents), strict=True):
                self.parts[piece] = Stored(extents, dict(stored.models), stored.filling)

    def place_anew(self, keys: Iterable[ModelKey]) -> None:
        """Parts of those models lie elsewhere now."""
        for key in keys:
            resident = self.models[key]
            resident.spans, resident.slot = tuple(self._spans(resident.known)), None

    def marginal_bytes(self, key: ModelKey) -> int:
        """What dropping the model would free now."""
        parts = self.models[key].known.parts
        return sum(part.size_bytes for part in parts if len(self.parts[part].models) == 1)

    def charged_bytes(self, key: ModelKey) -> int:
        """Its share of what is taken here: of what is shared, all is charged to whoever has been here longest. So the
        models' charges add up to what is taken."""
        parts = self.models[key].known.parts
        return sum(part.size_bytes for part in parts if next(iter(self.parts[part].models)) == key)

    def usage(self) -> Usage:
        in_all = sum(stored.known.layout.size_bytes for stored in self.models.values())
        return Usage(
            self.arena.capacity_bytes,
            self.arena.taken_bytes,
            in_all - self.arena.taken_bytes,
            self.arena.largest_hole_bytes,
            len(self.models),
        )

    def _allocated(self, missing: Sequence[Part], known: Known) -> list[list[Extent]]:
        needed, arena = sum(part.size_bytes for part in missing), self.arena
        whole = arena.allocate(needed) if needed else None
        extents = [whole] if whole else arena.allocate_cut(list(accumulate(_unit_sizes(missing))))
        if extents is None:
            if (in_all := known.layout.size_bytes) > arena.capacity_bytes:
                raise TooLarge(f"it takes {in_all} bytes, and the {self.name}'s memory has {arena.capacity_bytes}")
            raise NoRoom(
                f"it takes {needed} bytes more, but {arena.free_bytes} of the {self.name}'s memory are free, "
                f"{arena.largest_hole_bytes} of them in a row",
                needed,
                max(_unit_sizes(missing)),
            )
        return self._shared_out(missing, extents)

    def _shared_out(self, parts: Sequence[Part], extents: Sequence[Extent]) -> list[list[Extent]]:
        """Which of those bytes are which part's, in order; what two have is split."""
        shares: list[list[Extent]] = []
        left = list(reversed(extents))
        for part in parts:
            share: list[Extent] = []
            needed = part.size_bytes
            while needed:
                extent = left.pop()
                if extent.size_bytes > needed:
                    self.arena.split(extent.offset, needed)
                    left.append(Extent(extent.offset + needed, extent.size_bytes - needed))
                    extent = Extent(extent.offset, needed)
                share.append(extent)
                needed -= extent.size_bytes
            shares.append(share)
        return shares

    def _spans(self, known: Known) -> Iterator[Span]:
        """Where a model's run lies; neighbours are one."""
        span, done = Span(0, 0, 0), 0
        for part in known.parts:
            for offset, size_bytes in self.parts[part].extents:
                if offset != span.offset + span.size_bytes or not done:
                    if done:
                        yield span
                    span = Span(done, offset, 0)
                span = Span(span.run_offset, span.offset, span.size_bytes + size_bytes)
                done += size_bytes
        if done:
            yield span


def _unit_sizes(parts: Iterable[Part]) -> Iterator[int]:
    return (unit.size_bytes for part in parts for unit in part.units)


Rows = Sequence[tuple[int, int]]
"""Rows of a run, start and end, ascending and apart."""


def rows_of(parts: Iterable[Part], wanted: Iterable[Part]) -> Rows:
    """Where some of a model's parts stand in its run; neighbours are one."""
    rows: list[tuple[int, int]] = []
    among, offset = set(wanted), 0
    for part in parts:
        if part in among:
            joins = rows and rows[-1][1] == offset
            start = rows.pop()[0] if joins else offset
            rows.append((start, offset + part.size_bytes))
        offset += part.size_bytes
    return rows


def moves_of(target: Sequence[Span], rows: Rows) -> list[Move]:
    """The copies of those rows out of the run itself, as it stands in a file."""
    size_bytes = sum(span.size_bytes for span in target)
    return moves_between([Span(0, 0, size_bytes)], target, rows)


def moves_between(source: Sequence[Span], target: Sequence[Span], rows: Rows) -> list[Move]:
    """The copies of those rows from where they lie to where they shall; neighbours in both are one."""
    moves: list[Move] = []
    for start, end in rows:
        while start < end:
            here, there = _holding(source, start), _holding(target, start)
            until = min(end, here.run_offset + here.size_bytes, there.run_offset + there.size_bytes)
            move = Move(here.offset + start - here.run_offset, there.offset + start - there.run_offset, until - start)
            last = moves[-1] if moves else None
            if last and (last.source + last.size_bytes, last.target + last.size_bytes) == move[:2]:
                moves[-1] = Move(last.source, last.target, last.size_bytes + move.size_bytes)
            else:
                moves.append(move)
            start = until
    return moves


def _holding(spans: Sequence[Span], run_offset: int) -> Span:
    """The one of those that cover the run in order, in which that byte lies."""
    return spans[bisect_right(spans, run_offset, key=lambda span: span.run_offset) - 1]
