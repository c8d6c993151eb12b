"""Models for tests of memory tiers, from seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loaders.base import Tensor
from loaders.memory.arrays import Run, raw_bytes, weight_datatype
from loaders.memory.layout import laid_out
from loaders.memory.weights import check_digests
from loaders.memory.weights_index import Contents

KIB = 1 << 10


def tensor(seed: int, size_bytes: int = 64 * KIB) -> Tensor:
    return np.random.default_rng(seed).integers(0, 255, size_bytes, np.uint8)


@dataclass
class Made:
    """A weights file that lies in memory."""

    contents: Contents
    run: Run

    def verify(self) -> None:
        check_digests("made", self.contents, self.run)

    def read_into(self, target: memoryview, offset: int) -> None:
        target[:] = self.run[offset : offset + len(target)].data


def made(tensors: Sequence[Tensor], architecture: str = "") -> Made:
    layout = laid_out((f"t{n}", weight_datatype(each.dtype), each.shape) for n, each in enumerate(tensors))
    run = np.zeros(layout.size_bytes, np.uint8)
    for place, each in zip(layout.places, tensors, strict=True):
        run[place.offset : place.end] = raw_bytes(each)
    digests = tuple(hashlib.sha256(run[place.offset : place.end].data).hexdigest() for place in layout.places)
    return Made(Contents(architecture, layout, digests), run)
