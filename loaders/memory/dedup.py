"""What identical tensors of different models are stored as: once.

A model's bytes are a row of *units*: each large tensor, and each run of small ones between them. A *part* is a row of
units that the same models have in common: a model that shares nothing is one part, so what is done to it costs the same
whatever number of tensors it has. When a model arrives whose bytes begin or end somewhere in a part, the part is cut
there, for all its users and in every tier; nothing is moved, since the pieces lie where they lay. A fleet of fine-tunes
with one frozen backbone comes out as the backbone's part, and one or two of each model's own.

Bytes are the same if their SHA-256 is. Shared runs below 64 KiB are not worth a cut. Not thread-safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, NamedTuple

from loaders.memory.layout import LARGE_BYTES, Layout
from loaders.memory.weights_index import Contents

MIN_SHARED_BYTES: Final = LARGE_BYTES

ModelKey = Hashable
"""What a model's bytes go by: its id and registration, whatever the owner of the tiers tells them apart by."""


class Unit(NamedTuple):
    digest: str
    size_bytes: int
    """Up to the next unit, what lies between included."""


@dataclass(eq=False, slots=True)
class Part:
    """Bytes in a row that are stored once in each tier."""

    units: tuple[Unit, ...]
    models: dict[ModelKey, Known] = field(default_factory=dict)
    """Who has it, whichever tiers they are in."""
    transfers: int = 0
    """That write or read it: it is not cut meanwhile."""
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = sum(unit.size_bytes for unit in self.units)

    def __repr__(self) -> str:
        return f"<{len(self.units)} units, {self.size_bytes}B of {len(self.models)} models>"


@dataclass(eq=False, slots=True)
class Known:
    """A model whose bytes are in some tier."""

    key: ModelKey
    contents: Contents
    parts: list[Part] = field(default_factory=list)
    """In the order of its bytes, each once."""
    tiers: int = 0
    """In which it is."""

    @property
    def layout(self) -> Layout:
        return self.contents.layout


Cut = Callable[[Part, Sequence[Part]], None]
"""Told of a part and the pieces that stand for it from now on."""


class Catalogue:
    """The models that are known, and their parts."""

    def __init__(self, on_cut: Cut) -> None:
        self.models: dict[ModelKey, Known] = {}
        self._where: dict[Unit, tuple[Part, int]] = {}
        self._on_cut = on_cut

    def add(self, key: ModelKey, contents: Contents) -> Known:
        """The model's parts, those of others among them."""
        known = self.models.get(key)
        if known is None:
            known = self.models[key] = Known(key, contents)
            known.parts = list(self._parts(known, tuple(units_of(contents))))
            for part in known.parts:
                part.models[key] = known
        return known

    def remove(self, key: ModelKey) -> None:
        known = self.models.pop(key)
        for part in known.parts:
            del part.models[key]
            if not part.models:
                for unit in part.units:
                    if self._stored(unit) is part:
                        del self._where[unit]

    def _parts(self, known: Known, units: tuple[Unit, ...]) -> Iterator[Part]:
        own = n = 0
        taken: set[Part] = set()
        while n < len(units):
            shared = self._shared(units, n, taken)
            if shared is None:
                n += 1
                continue
            for part in (*self._new(units[own:n]), shared):
                taken.add(part)
                yield part
            own = n = n + len(shared.units)
        yield from self._new(units[own:n])

    def _new(self, units: tuple[Unit, ...]) -> Iterator[Part]:
        if units:
            part = Part(units)
            for n, unit in enumerate(units):
                self._where.setdefault(unit, (part, n))
            yield part

    def _stored(self, unit: Unit) -> Part | None:
        return self._where.get(unit, (None, 0))[0]

    def _shared(self, units: tuple[Unit, ...], n: int, taken: set[Part]) -> Part | None:
        """A part that is the model's bytes from its nth unit on, cut out of a longer one if need be. A part stands for
        one place of a model only."""
        part, first = self._where.get(units[n], (None, 0))
        if part is None or part in taken or (first and part.transfers):
            return None
        count, most = 0, min(len(units) - n, len(part.units) - first)
        while count < most and units[n + count] == part.units[first + count]:
            count += 1
        if count == len(part.units):
            return part
        shared_bytes = sum(unit.size_bytes for unit in units[n : n + count])
        if part.transfers or (shared_bytes < MIN_SHARED_BYTES and count < len(units)):
            return None
        return self._cut(part, first, first + count)

    def _cut(self, part: Part, start: int, end: int) -> Part:
        """Into at most three; the middle one."""
        middle = Part(part.units[start:end], dict(part.models))
        around = [Part(units, dict(part.models)) for units in (part.units[:start], part.units[end:])]
        pieces = tuple(piece for piece in (around[0], middle, around[1]) if piece.units)
        for known in part.models.values():
            at = known.parts.index(part)
            known.parts[at : at + 1] = pieces
        for piece in pieces:
            for n, unit in enumerate(piece.units):
                if self._stored(unit) is part:
                    self._where[unit] = piece, n
        self._on_cut(part, pieces)
        return middle


def units_of(contents: Contents) -> Iterator[Unit]:
    """A model's units in order; their sizes add up to that of its layout."""
    told = list(zip(contents.layout.places, contents.digests, strict=True))
    starts: list[tuple[int, str]] = []
    for is_large, group in groupby(told, key=lambda each: each[0].is_large):
        row = list(group)
        if is_large:
            starts += [(place.offset, digest) for place, digest in row]
        else:
            start = row[0][0].offset
            run = "".join(f"{place.offset - start} {place.size_bytes} {digest}\n" for place, digest in row)
            starts.append((start, hashlib.sha256(run.encode()).hexdigest()))
    ends = [*(start for start, _ in starts[1:]), contents.layout.size_bytes]
    return (Unit(digest, end - start) for (start, digest), end in zip(starts, ends, strict=False) if end > start)
