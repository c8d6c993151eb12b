"""Room that is there but in pieces too small: what lies between some holes is moved into others.

A window of the arena is chosen, long enough and with the fewest bytes in it; its holes are set aside, its pieces go
into holes elsewhere, cut between units where need be, and the window is one hole. No more bytes are moved within the
device than are free in it, at ten times the link's speed or more. What a run or transfer uses stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from loaders.memory.arena import Extent
from loaders.memory.dedup import Part
from loaders.memory.device import Move
from loaders.memory.tier import Stored, Tier

Shift = Callable[[Sequence[Move]], None]
"""Copies within the tier's memory and waits; sources and targets are apart."""


class Segment(NamedTuple):
    """A hole, or a piece of a part."""

    extent: Extent
    part: Part | None = None
    is_movable: bool = True


def make_hole(tier: Tier, size_bytes: int, shift: Shift) -> bool:
    """Whether there is a hole of that size now; if not, nothing has moved.

    Raises:
        LoaderError: from `shift`; the books are right, what had moved until then has moved.
    """
    window = _window(tier, size_bytes)
    if window is None:
        return False
    for segment in window:
        if segment.part is None:
            tier.arena.take_hole(segment.extent.offset)
    planned: list[tuple[Stored, Extent, list[Extent]]] = []
    try:
        for segment in window:
            if segment.part is not None:
                stored = tier.parts[segment.part]
                target = tier.arena.allocate_cut(_ends_in(segment.part, stored, segment.extent))
                if target is None:
                    return False
                planned.append((stored, segment.extent, target))
        while planned:
            stored, source, target = planned[-1]
            shift(list(_moves(source, target)))
            at = stored.extents.index(source)
            stored.extents[at : at + 1] = target
            planned.pop()
            tier.arena.free(source.offset)
            tier.compacted_bytes += source.size_bytes
            tier.place_anew(stored.models)
        return True
    finally:
        for _, _, target in planned:
            for extent in target:
                tier.arena.free(extent.offset)
        for segment in window:
            if segment.part is None:
                tier.arena.free(segment.extent.offset)


def _window(tier: Tier, size_bytes: int) -> list[Segment] | None:
    """The neighbours of at least that many bytes together with the fewest to move, if as much is free elsewhere."""
    segments = sorted(_segments(tier), key=lambda segment: segment.extent)
    best: tuple[int, int, int] | None = None
    end = length = live = 0
    for start, segment in enumerate(segments):
        if end < start:
            end, length, live = start, 0, 0
        while length < size_bytes and end < len(segments) and segments[end].is_movable:
            length += segments[end].extent.size_bytes
            live += segments[end].extent.size_bytes if segments[end].part is not None else 0
            end += 1
        elsewhere = tier.arena.free_bytes - (length - live)
        if length >= size_bytes and live <= elsewhere and (best is None or live < best[0]):
            best = live, start, end
        if end > start:
            length -= segment.extent.size_bytes
            live -= segment.extent.size_bytes if segment.part is not None else 0
    return segments[best[1] : best[2]] if best else None


def _segments(tier: Tier) -> Iterator[Segment]:
    for hole in tier.arena.holes():
        yield Segment(hole)
    for part, stored in tier.parts.items():
        is_movable = not part.transfers and not any(tier.models[key].pins for key in stored.models)
        for extent in stored.extents:
            yield Segment(extent, part, is_movable)


def _ends_in(part: Part, stored: Stored, extent: Extent) -> list[int]:
    """Where units of the part end in one of its extents."""
    before = sum(each.size_bytes for each in stored.extents[: stored.extents.index(extent)])
    ends = accumulate(unit.size_bytes for unit in part.units)
    return [end - before for end in ends if before < end <= before + extent.size_bytes]


def _moves(source: Extent, target: Sequence[Extent]) -> Iterator[Move]:
    at = source.offset
    for extent in target:
        yield Move(at, extent.offset, extent.size_bytes)
        at += extent.size_bytes
