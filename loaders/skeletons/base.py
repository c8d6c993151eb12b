"""The port of skeletons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loaders.base import Signature

Views = Mapping[str, torch.Tensor]
"""Weights by name, wherever they lie: over a mapped file, in a row of host memory, in a device's arena."""


class Skeleton(Protocol):
    """A network as a function of its weights. It has no state: any number of threads may run it at once."""

    @property
    def signature(self) -> Signature: ...

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        ...

    def run(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        """All outputs by name. Whatever torch raises is raised."""
        ...

    def run_many(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        """As `run` for several models at once: everything has their number as one more dimension, the first. Weights
        need not be contiguous from one model to the next."""
        ...
