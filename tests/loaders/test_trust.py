"""`loaders.prepare.trust`: a conversion that differs from the model, or is not faster, is not trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from loaders.base import InferError, Signature, Tensor, TensorSpec
from loaders.prepare import NotPreparable
from loaders.prepare.trust import TOLERANCE, check_agreement, check_gain

ROWS = {"x": np.linspace(-2, 2, 9).reshape(-1, 1)}


class Model:
    """Answers with a function of the rows."""

    waits = 0
    size_bytes = 1

    def __init__(self, answer: Callable[[Tensor], Any], datatype: str = "FP64") -> None:
        self._answer = answer
        self.signature = Signature((TensorSpec("x", "FP64", (-1, 1)),), (TensorSpec("y", datatype, (-1, 1)),), "test")

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        return {"y": self._answer(inputs["x"])}

    def unload(self) -> None:
        pass


def refuse(rows: Tensor) -> Tensor:
    raise InferError("not these", bad_input=True)


def fail(rows: Tensor) -> Tensor:
    raise InferError("broken", bad_input=False)


def labels(rows: Tensor) -> Tensor:
    return (rows > 0).astype(np.int64)


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (lambda rows: rows, lambda rows: rows * (1 + TOLERANCE / 2)),
        (lambda rows: rows * 1e6, lambda rows: rows * 1e6 + 1),
        (lambda rows: rows / 0, lambda rows: rows / 0),  # infinite where the model is, and NaN
        (labels, labels),
    ],
)
def test_what_agrees(own: Callable[[Tensor], Tensor], found: Callable[[Tensor], Tensor]) -> None:
    check_agreement(Model(own), Model(found), [ROWS])
    check_agreement(Model(own), Model(found), [ROWS, ROWS])


@pytest.mark.parametrize(
    ("own", "found", "says"),
    [
        (lambda rows: rows, lambda rows: rows + 3 * TOLERANCE, "y is off by up to 3e-05"),
        (lambda rows: rows, lambda rows: np.where(rows > 1.9, np.nan, rows), "off by"),
        (labels, lambda rows: labels(rows - 0.6), "answers 1 of 9 y differently"),
        (labels, lambda rows: labels(rows).astype(np.int32), r"int32 \[9, 1\] for int64 \[9, 1\]"),
        (labels, lambda rows: labels(rows).ravel(), r"int64 \[9\] for int64 \[9, 1\]"),
        (labels, refuse, "only its conversion refuses: not these"),
        (refuse, labels, "only the model refuses: not these"),
        (labels, fail, "a probe makes it fail: broken"),
        (refuse, refuse, "answers none of the probes"),
    ],
)
def test_what_does_not(own: Callable[[Tensor], Tensor], found: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(NotPreparable, match=says):
        check_agreement(Model(own), Model(found), [ROWS])


def test_what_is_not_faster_is_not_worth_it() -> None:
    def slow(rows: Tensor) -> Tensor:
        time.sleep(0.002)
        return rows

    check_gain(Model(slow), Model(labels), [ROWS])
    with pytest.raises(NotPreparable, match=r"its conversion is not faster: \d+ us against \d+ us for 9 rows"):
        check_gain(Model(labels), Model(slow), [ROWS])


def test_what_is_larger_must_be_faster_by_as_much() -> None:
    def slow(rows: Tensor) -> Tensor:
        time.sleep(0.002)
        return rows

    own, conversion = Model(slow), Model(labels)
    own.size_bytes, conversion.size_bytes = 1_000, 1 << 20
    check_gain(own, conversion, [ROWS])
    conversion.size_bytes = 1 << 40
    with pytest.raises(NotPreparable, match=r"is not faster: .* for 9 rows, at 1048576.0 times the memory"):
        check_gain(own, conversion, [ROWS])
