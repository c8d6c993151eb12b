"""Architectures and fleets of made-up models for benches of memory. Needs nothing but the standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loaders.memory.layout import Layout, laid_out
from loaders.memory.weights_index import Contents

Told = tuple[str, str, tuple[int, ...]]
"""A tensor: name, datatype, shape."""


def mlp(*sizes: int, datatype: str = "FP32") -> list[Told]:
    """Dense layers, each with a bias."""
    return [
        told
        for n, (rows, columns) in enumerate(pairwise(sizes))
        for told in ((f"{n}.weight", datatype, (rows, columns)), (f"{n}.bias", datatype, (columns,)))
    ]


def encoder(layers: int, width: int, vocabulary: int = 30_522, datatype: str = "FP16") -> list[Told]:
    """BERT's tensors: `encoder(12, 768)` is its base model, 220 MB at 16 bits."""
    told: list[Told] = [("embedding", datatype, (vocabulary, width)), ("positions", datatype, (512, width))]
    for n in range(layers):
        shapes = {
            "query": (width, width),
            "key": (width, width),
            "value": (width, width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        for name, shape in shapes.items():
            told += [(f"{n}.{name}.weight", datatype, shape), (f"{n}.{name}.bias", datatype, shape[1:])]
        told += [(f"{n}.norm{k}.{which}", datatype, (width,)) for k in (1, 2) for which in ("weight", "bias")]
    return told


@dataclass(frozen=True)
class Seeded:
    """A model without a file, whose bytes are the same two everywhere: for benches that look at speed and books."""

    contents: Contents
    fill: bytes = b"\x00\x3c"

    def verify(self) -> None:
        return None

    def read_into(self, target: memoryview, offset: int) -> None:
        piece = self.fill * min(len(target) // 2, 1 << 20)
        for at in range(0, len(target), len(piece) or 1):
            target[at : at + len(piece)] = piece[: len(target) - at]


def fine_tunes(architecture: Sequence[Told], count: int, shared: Iterable[str] = (), name: str = "") -> list[Seeded]:
    """Models of one architecture that have the tensors `shared` in common, and no other."""
    layout, common = laid_out(architecture), frozenset(shared)
    return [Seeded(Contents(name, layout, tuple(_digests(layout, common, f"{name}/{n}")))) for n in range(count)]


def _digests(layout: Layout, common: frozenset[str], model: str) -> Iterable[str]:
    for place in layout.places:
        of = layout.key if place.name in common else model
        yield hashlib.sha256(f"{of} {place.name}".encode()).hexdigest()
