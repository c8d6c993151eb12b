"""Models as their frameworks write them, made once per run: real classifiers on scikit-learn's digits and wine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from loaders.base import Tensor


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """(images FP64 [1797, 64], labels INT64 [1797])"""
    images, labels = load_digits(return_X_y=True)
    return images, labels


@pytest.fixture(scope="session")
def digits_model(digits: tuple[Tensor, Tensor]) -> LogisticRegression:
    images, labels = digits
    return LogisticRegression(max_iter=60, tol=0.1).fit(images / 16, labels)


@pytest.fixture
def save_onnx(tmp_path: Path) -> Callable[..., Path]:
    """Write a graph: `save_onnx(nodes, inputs, outputs, initializers, **save_options)` gives its path."""

    def save(nodes: Any, inputs: Any, outputs: Any, initializers: Any = (), name: str = "model", **how: Any) -> Path:
        def infos(specs: Any) -> list[Any]:
            return [helper.make_tensor_value_info(*spec) for spec in specs]

        graph = helper.make_graph(list(nodes), "g", infos(inputs), infos(outputs), list(initializers))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, **how)
        return path

    return save


@pytest.fixture
def save_mlp(save_onnx: Callable[..., Path]) -> Callable[..., Path]:
    """Write a perceptron: `save_mlp(64, 128, 10)`; weights are seeded, input `x` FP32 [n, 64], output `y`."""

    def save(*widths: int, dtype: Any = np.float32, **how: Any) -> Path:
        rng = np.random.default_rng(7)
        kind = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
        nodes, weights, last = [], [], "x"
        for i, shape in enumerate(pairwise(widths)):
            out = "y" if i == len(widths) - 2 else f"h{i}"
            weights.append(numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(dtype), f"w{i}"))
            nodes += [
                helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
                helper.make_node("Tanh", [f"m{i}"], [out]),
            ]
            last = out
        given, gives = [("x", kind, ["n", widths[0]])], [("y", kind, ["n", widths[-1]])]
        return save_onnx(nodes, given, gives, weights, **how)

    return save


@pytest.fixture
def from_eight_threads() -> Callable[[Callable[[int], bool]], bool]:
    """Call a check with 0..199 from eight threads at once; true if it was true each time."""

    def run(check: Callable[[int], bool]) -> bool:
        with ThreadPoolExecutor(8) as pool:
            return all(pool.map(check, range(200)))

    return run
