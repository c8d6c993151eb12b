"""Which models may be given several requests at once. Authority: mesh.rowwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest

from loaders.base import InferError, Signature, Tensor, TensorSpec
from mesh.rowwise import has_batch_dimension, is_rowwise, kind_of, rows_of, stack
from tests.mesh.models import classifier

Function = Callable[[Tensor], Any]

WEIGHTS = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


class Model:
    """`y` is a function of `x`; runs are counted."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 3)),), "test")
    size_bytes = 1
    waits = 0

    def __init__(self, function: Function) -> None:
        self.function = function
        self.runs: list[int] = []

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        self.runs.append(rows_of(inputs))
        return {name: self.function(inputs["x"]) for name in outputs}

    def unload(self) -> None: ...


def softmax(x: Tensor, axis: int) -> Tensor:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def is_small(x: Tensor) -> Tensor:
    if (np.abs(x) > 1e-3).any():
        raise InferError("too large", bad_input=True)
    return x


ROW = np.array([[0.5, -1, 2, 3]], np.float32)
_calls = count()

ROWWISE: dict[str, Function] = {
    "identity": lambda x: x,
    "a layer": lambda x: x @ WEIGHTS,
    "softmax of each row": lambda x: softmax(x @ WEIGHTS, axis=1),
    "one number each": lambda x: x.sum(axis=1),
    "a class": lambda x: (x @ WEIGHTS).argmax(axis=1),
    "half precision": lambda x: (x @ WEIGHTS).astype(np.float16),
    "not a number": lambda x: np.sqrt(-np.abs(x)),
    "strings": lambda x: np.array([b"%d" % (row.sum() > 2) for row in x], object),
}
MIXING: dict[str, Function] = {
    "mean over the batch": lambda x: x - x.mean(axis=0),
    "softmax over the batch": lambda x: softmax(x, axis=0),
    "rows before this one": lambda x: np.cumsum(x, axis=0),
    "sorted": lambda x: np.sort(x, axis=0),
    "reversed": lambda x: x[::-1],
    "one answer for all": lambda x: x.sum(axis=0, keepdims=True),
    "no batch dimension": lambda x: np.asarray(x.sum()),
    "twice the rows": lambda x: np.concatenate([x, x]),
    "the number of rows": lambda x: np.full((len(x), 1), len(x)),
    "chance": lambda x: x + np.random.default_rng(next(_calls)).standard_normal(x.shape),
    "a memory": lambda x: np.full((len(x), 1), next(_calls)),
    "picky about values": is_small,
}


@pytest.mark.parametrize("name", ROWWISE)
def test_models_that_answer_row_by_row(name: str) -> None:
    with np.errstate(invalid="ignore"):
        assert is_rowwise(Model(ROWWISE[name]), {"x": ROW}, ("y",))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("given", [ROW, np.zeros((1, 4), np.float32), np.repeat(ROW, 3, axis=0)])
def test_models_that_do_not(name: str, given: Tensor) -> None:
    """Also when the client's own values would not show it: equal rows, or nothing but zeros."""
    model = Model(MIXING[name])
    assert not is_rowwise(model, {"x": given}, ("y",))


@pytest.mark.parametrize(
    "given",
    [
        np.array([[True, False]]),
        np.array([[3, 1]], np.int64),
        np.array([[3, 1]], np.uint8),
        np.array([[b"a", b"b"]], object),
        np.array([[np.nan, np.inf, 7e4]], np.float64),
        np.zeros((2, 0), np.float32),
        np.full((1, 2), 60_000, np.float16),
    ],
)
def test_every_datatype_can_be_tried(given: Tensor) -> None:
    """The made-up values are of the datatype, and integers are the client's, 0 or 1: indices of an embedding."""
    model = Model(lambda x: x)
    assert is_rowwise(model, {"x": given}, ("y",))
    assert model.runs == [len(given), 2, 1, len(given) + 3]
    table = np.arange(4)
    if given.dtype.kind in "iu":
        assert is_rowwise(Model(lambda x: table[x]), {"x": given}, ("y",))


def test_a_classifier_of_scikit_learn() -> None:
    estimator = classifier()
    for answer in (estimator.predict, estimator.predict_proba):
        assert is_rowwise(Model(answer), {"x": np.array([[5.0, 3.0]])}, ("y",))


def test_the_signature_says_what_has_a_batch_dimension() -> None:
    def signature(given: tuple[int, ...], answered: tuple[int, ...], *, lenient: bool = False) -> Signature:
        return Signature((TensorSpec("x", "FP32", given),), (TensorSpec("y", "FP32", answered),), "t", lenient)

    assert has_batch_dimension(signature((-1, 4), (-1,)))
    assert has_batch_dimension(signature((4,), (), lenient=True))  # a hint
    for given, answered in (((1, 4), (-1,)), ((-1, 4), (1,)), ((-1,), ()), ((), (-1,))):
        assert not has_batch_dimension(signature(given, answered))


def test_kinds_and_rows() -> None:
    a, b = np.zeros((2, 3), np.float32), np.zeros((2,), np.int64)
    assert rows_of({"a": a, "b": b}) == 2
    assert rows_of({"a": a, "b": b[:1]}) == rows_of({"a": np.zeros(())}) == rows_of({"a": a[:0]}) == 0
    kind = kind_of({"a": a, "b": b}, ("y",))
    assert kind == kind_of({"b": b[:1], "a": a[:1]}, ["y"])
    assert kind not in [
        kind_of({"a": a, "b": b}, ("z",)),
        kind_of({"a": a[:, :2], "b": b}, ("y",)),
        kind_of({"a": a.astype(np.float64), "b": b}, ("y",)),
        kind_of({"a": a}, ("y",)),
    ]
    assert stack([{"a": a, "b": b}, {"b": b[:1], "a": a[:1]}])["a"].shape == (3, 3)
