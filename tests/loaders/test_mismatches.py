"""A declared signature that a model does not have fails its load, in every format, and the reason has both (issue 5,
part 5). Where the file does not tell (TorchScript) or the model takes many forms (`Signature.lenient`), names count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.formats import made
from bench.zoo import ZOO
from loaders import loader_for
from loaders.base import Artifact, LoaderError, TensorSpec

ONE = (TensorSpec("a", "FP32", (-1, 64)),)
TWO = (*ONE, TensorSpec("b", "FP32", (-1, 64)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, there = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in there:
            there[kind] = made(folder, kind, ZOO[kind], 0)
        return there[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "declared", "own"),
    [
        ("onnx mlp", ONE, (), "input a FP32 [-1, 64]", "x FP32 [-1, 64]"),
        ("onnx mlp", (TensorSpec("x", "FP64", (-1, 64)),), (), "input x FP64 [-1, 64]", "x FP32 [-1, 64]"),
        ("onnx mlp", (TensorSpec("x", "FP32", (-1, 63)),), (), "input x FP32 [-1, 63]", "x FP32 [-1, 64]"),
        ("onnx mlp", (), ONE, "output a FP32 [-1, 64]", "y FP32 [-1, 10]"),
        ("torch mlp, pt2", ONE, (), "input a FP32 [-1, 64]", "input FP32 [-1, 64]"),
        ("torch mlp, pt2", (TensorSpec("input", "INT8", (-1, 64)),), (), "input input INT8 [-1, 64]", "input FP32"),
        ("torch mlp, pt2", (), (TensorSpec("y", "INT64", (-1, 10)),), "output y INT64 [-1, 10]", "y FP32 [-1, 10]"),
        ("torch mlp, pt", ONE, (), "inputs a", "forward takes input"),
        ("torch mlp, pt", TWO, (), "inputs a, b", "forward takes input"),
        ("sklearn linear", TWO, (), "takes one input", "a FP32 [-1, 64], b FP32 [-1, 64]"),
        ("sklearn linear", (), ONE, "outputs a FP32 [-1, 64]", "predict INT64 [-1]"),
        ("xgboost", TWO, (), "takes one input", "a FP32 [-1, 64], b FP32 [-1, 64]"),
        ("xgboost", (), ONE, "outputs a FP32 [-1, 64]", "predict FP32 [-1, 10]"),
        ("lightgbm", TWO, (), "takes one input", "a FP32 [-1, 64], b FP32 [-1, 64]"),
        ("lightgbm", (), ONE, "outputs a FP32 [-1, 64]", "predict FP64 [-1, 10]"),
        ("python", ONE, (), "input a FP32 [-1, 64]", "x FP32 [-1, 64]"),
        ("python", (), ONE, "output a FP32 [-1, 64]", "y FP32 [-1, 10]"),
    ],
)
def test_a_mismatch_is_told_with_both(
    model: Callable[[str], Path],
    kind: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    declared: str,
    own: str,
) -> None:
    with pytest.raises(LoaderError) as caught:
        loader_for(ZOO[kind].format).load(Artifact(model(kind), inputs=inputs, outputs=outputs))
    assert declared in str(caught.value)
    assert own in str(caught.value)
