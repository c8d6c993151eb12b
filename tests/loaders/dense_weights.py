"""A format for tests of memory tiers: `y = x @ w`, with `w` in a weights file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from loaders.base import Artifact, LoadedModel, LoaderError, Signature, Tensor, TensorSpec
from loaders.memory.layout import Layout
from loaders.memory.slots import Slot
from loaders.memory.weights import WeightsFile, write_weights
from loaders.memory.weights_index import Contents

ROWS = 64


def write_dense(path: Path, seed: int, columns: int = 1024) -> Tensor:
    """A model of 256 KiB, if nothing else is said; its weights."""
    w = np.random.default_rng(seed).standard_normal((ROWS, columns)).astype(np.float32)
    write_weights(path, {"w": w}, "dense")
    return w


class Dense:
    """All of a model but its weights."""

    open: ClassVar[int] = 0
    """How many there are."""
    on_run: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, path: Path) -> None:
        self._file = WeightsFile(path)
        self.contents: Contents = self._file.contents
        self.layout: Layout = self.contents.layout
        columns = self.layout.places[0].shape[1]
        self.signature = Signature(
            (TensorSpec("x", "FP32", (-1, ROWS)),), (TensorSpec("y", "FP32", (-1, columns)),), "dense"
        )
        Dense.open += 1

    def verify(self) -> None:
        self._file.verify()

    def read_into(self, target: memoryview, offset: int) -> None:
        self._file.read_into(target, offset)

    def run(self, slot: Slot, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        Dense.on_run()
        return {"y": inputs["x"] @ slot.views["w"]}

    def let_go(self) -> None:
        self._file.close()

    def close(self) -> None:
        self.let_go()
        Dense.open -= 1


class DenseLoader:
    def estimate_bytes(self, artifact: Artifact) -> int:
        return self.weights_bytes(artifact)

    def load(self, artifact: Artifact) -> LoadedModel:
        raise LoaderError("there is no device")

    def weights_bytes(self, artifact: Artifact) -> int:
        with WeightsFile(artifact.path) as file:
            return file.layout.size_bytes

    def weightless(self, artifact: Artifact) -> Dense:
        return Dense(artifact.path)
