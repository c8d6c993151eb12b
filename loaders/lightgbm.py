"""LightGBM boosters as `save_model` writes them: text, `.txt` or `.bst`. The file is data, not code.

Requests: one 2-D input [rows, features] of any numeric datatype, taken as FP64, under any name; NaN is a missing value,
and a category is its code. The answer is `predict`, FP64 [rows] or [rows, classes]: what `Booster.predict` answers, as
with MLServer and KServe, so probabilities for a classifier. The file holds the rounds that were saved, by default up to
the best one, and all of them count.

One thread per process: LightGBM would otherwise start a team in every thread that predicts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.matrix import matrix
from loaders.memory.process import Change
from loaders.tree_files import check_lightgbm

try:
    import lightgbm
except ImportError as missing:
    raise LoaderError("lightgbm is not installed: pip install 'densemesh[lightgbm]'") from missing

_STORED, _TREE_BYTES, _BOOSTER_BYTES = 0.75, 650, 12_000
"""Bytes in memory over bytes on disk, and what each tree and any booster takes beside. Within 17 % of what malloc
handed out for seven models of 10 to 1000 trees of 8 to 1000 leaves."""
_TREES: Final = re.compile(rb"^tree_sizes=(.*)$", re.MULTILINE)
_HEAD_BYTES: Final = 1 << 20
"""In which `tree_sizes` stands, after the features' names and ranges."""


class LightgbmLoader:
    """Reads `.txt` and `.bst`."""

    def __init__(self) -> None:
        lightgbm.basic._LIB.LGBM_SetMaxThreads(1)  # type: ignore[attr-defined]  # C API; Python has no call for it

    def estimate_bytes(self, artifact: Artifact) -> int:
        parameters(artifact, "lightgbm")
        with reading(artifact.path), artifact.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            stored = file.seek(0, os.SEEK_END)
        found = _TREES.search(head)
        trees = found[1].count(b" ") + 1 if found else 0
        return round(stored * _STORED) + trees * _TREE_BYTES + _BOOSTER_BYTES

    def load(self, artifact: Artifact) -> LightgbmModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        with reading(path):
            content = path.read_bytes()
        try:
            content = check_lightgbm(content)
        except ValueError as error:
            raise LoaderError(f"{path.name} is no whole LightGBM model: {error}") from error
        with Change() as change:
            try:
                booster = lightgbm.Booster(model_str=content.decode())
                model = LightgbmModel(booster, artifact)
            except LoaderError:
                raise
            except Exception as error:
                here = f"LightGBM {lightgbm.__version__}"
                reason = f"{path.name} does not load with {here}: {_reason(error)}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error
            del content
            model.size_bytes = change.measured(estimate, "lightgbm")
            return model


class LightgbmModel:
    """One booster."""

    waits: Final = 0

    def __init__(self, booster: lightgbm.Booster, artifact: Artifact) -> None:
        self.size_bytes = 0
        self.booster = booster
        self._width = booster.num_feature()
        given = TensorSpec("input-0", "FP64", (-1, self._width))
        answer = self._predict(np.zeros((1, self._width)))
        gives = TensorSpec("predict", "FP64", (-1, *answer.shape[1:]))
        self.signature = agreed(Signature((given,), (gives,), platform="lightgbm", lenient=True), artifact)

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: wrong width or datatype (`bad_input`), else LightGBM's reason.
        """
        rows = matrix(inputs, self._width, np.float64)
        try:
            return {"predict": self._predict(rows)}
        except Exception as error:
            raise InferError(_reason(error), bad_input=False) from error

    def unload(self) -> None:
        with Change():
            del self.booster

    def _predict(self, rows: Tensor) -> Tensor:
        return np.asarray(self.booster.predict(rows), np.float64)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:500] or type(error).__name__
