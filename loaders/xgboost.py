"""XGBoost boosters as `save_model` writes them: `.ubj`, `.json`, or either as `.bst`. The file is data, not code.

Requests: one 2-D input [rows, features] of any numeric datatype, taken as FP32, under any name; NaN is a missing value.
Answers are MLServer's:

- a file that `XGBClassifier` wrote (it says so in itself): `predict` is the class, INT64, and `predict_proba` its
  probabilities, FP32 [rows, classes], for those who ask for it;
- any other: `predict` is what `Booster.predict` answers, FP32 [rows] or [rows, outputs].

KServe's xgbserver answers `Booster.predict` for all, so a classifier's probabilities: here they are `predict_proba`. If
training stopped early, a file of the scikit-learn interface is evaluated up to its best round, as there.

One thread per request (`nthread` is 1), and requests to one booster run at once (XGBoost, "Prediction", "Thread
safety"), except linear ones.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import datatype_of
from loaders.matrix import matrix
from loaders.memory.process import Change
from loaders.tree_files import check_xgboost
from loaders.ubjson import parsed

try:
    import xgboost
except ImportError as missing:
    raise LoaderError("xgboost is not installed: pip install 'densemesh[xgboost]'") from missing

_JSON, _UBJ, _UBJ_TREE_BYTES, _BOOSTER_BYTES = 0.95, 1.56, 430, 5_000
"""Bytes in memory over bytes on disk, those that only the file spends on each tree, and what any booster takes. Within
10 % of what malloc handed out for nine models of 10 to 1000 trees, 3 to 14 deep."""
_TREES: Final = re.compile(rb"num_treesSL.{8}(\d+)", re.DOTALL)
_HEAD_BYTES: Final = 1 << 20
"""In which `num_trees` stands, after the features' names."""


class XgboostLoader:
    """Reads `.ubj`, `.json` and `.bst`."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        parameters(artifact, "xgboost")
        with reading(artifact.path), artifact.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            stored = file.seek(0, os.SEEK_END)
        if head[:2] == b'{"':
            return round(stored * _JSON) + _BOOSTER_BYTES
        found = _TREES.search(head)
        in_trees = stored - int(found[1][:7]) * _UBJ_TREE_BYTES if found else stored
        return max(round(in_trees * _UBJ), 0) + _BOOSTER_BYTES

    def load(self, artifact: Artifact) -> XgboostModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        with reading(path):
            content = path.read_bytes()
        try:
            check_xgboost(json.loads(content, object_pairs_hook=_unique) if content[:2] == b'{"' else parsed(content))
        except (ValueError, RecursionError) as error:
            raise LoaderError(f"{path.name} is no whole XGBoost model: {error}") from error
        with Change() as change:
            try:
                with xgboost.config_context(nthread=1):  # the booster's own limit comes after its trees were read
                    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(content))
                del content
                model = XgboostModel(booster, artifact)
            except LoaderError:
                raise
            except Exception as error:
                here = f"XGBoost {xgboost.__version__}"
                reason = f"{path.name} does not load with {here}: {_reason(error)}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error
            model.size_bytes = change.measured(estimate, "xgboost")
            return model


class XgboostModel:
    """One booster."""

    waits: Final = 0

    def __init__(self, booster: xgboost.Booster, artifact: Artifact) -> None:
        learner = json.loads(booster.save_config())["learner"]
        saved_by = json.loads(booster.attr("scikit_learn") or "{}")
        best = booster.attr("best_iteration")
        self.size_bytes = 0
        self.booster = booster
        self._width = int(booster.num_features())
        self._linear = threading.Lock() if learner["gradient_booster"]["name"] == "gblinear" else None
        self.rounds = (0, int(best) + 1) if saved_by and best else (0, 0)
        self.is_classifier = saved_by.get("_estimator_type") == "classifier"
        self._is_multilabel = int(learner["learner_model_param"]["num_target"]) > 1
        if self.is_classifier and learner["objective"]["name"] == "multi:softmax":
            booster.set_param({"objective": "multi:softprob"})  # the same classes, and their probabilities
        self.signature = agreed(self._own_signature(), artifact)

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: wrong width or datatype (`bad_input`), else XGBoost's reason.
        """
        rows = matrix(inputs, self._width, np.float32)
        try:
            scores = self._scores(rows)
        except Exception as error:
            raise InferError(_reason(error), bad_input=False) from error
        return {
            name: self._probabilities(scores) if name == "predict_proba" else self._answer(scores) for name in outputs
        }

    def unload(self) -> None:
        with Change():
            del self.booster

    def _own_signature(self) -> Signature:
        """Datatypes and widths as a prediction has them."""
        given = TensorSpec("input-0", "FP32", (-1, self._width))
        scores = self._scores(np.zeros((1, self._width), np.float32))
        answer = self._answer(scores)
        outputs = [TensorSpec("predict", datatype_of(answer.dtype), (-1, *answer.shape[1:]))]
        if self.is_classifier:
            outputs.append(TensorSpec("predict_proba", "FP32", (-1, *self._probabilities(scores).shape[1:])))
        return Signature((given,), tuple(outputs), platform="xgboost", lenient=True, default_outputs=("predict",))

    def _scores(self, rows: Tensor) -> Tensor:
        if self._linear is None:
            return self.booster.inplace_predict(rows, iteration_range=self.rounds, validate_features=False)
        with self._linear:  # neither in place nor thread-safe
            return self.booster.predict(xgboost.DMatrix(rows, nthread=1), validate_features=False)

    def _answer(self, scores: Tensor) -> Tensor:
        """What `predict` of the interface that wrote the file makes of the booster's scores."""
        if not self.is_classifier:
            return scores
        several = scores.ndim == 2 and not self._is_multilabel
        return scores.argmax(axis=1) if several else (scores > 0.5).astype(np.int64)

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores if scores.ndim == 2 else np.stack([1 - scores, scores], axis=1)


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(members)) != len(members):
        raise ValueError("it has a name twice")
    return found


def _reason(error: Exception) -> str:
    """XGBoost's sentence without the time, the place in its source and the stack; the type if there is none."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)[:500] or type(error).__name__
