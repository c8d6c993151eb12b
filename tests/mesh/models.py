"""Small real models in a Triton-style repository, as their frameworks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS: Final[dict[str, int]] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""Every V2 datatype (Open Inference Protocol, Tensor Data Types; BF16 as Triton has it) in ONNX's words."""

_rng = np.random.default_rng(7)
WEIGHTS: Final = _rng.standard_normal((8, 3)).astype(np.float32)
BIAS: Final = _rng.standard_normal(3).astype(np.float32)


def mlp(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the model `mlp` computes."""
    y: npt.NDArray[np.float32] = np.maximum(x @ WEIGHTS + BIAS, 0).astype(np.float32)
    return y


def write_repository(root: Path) -> None:
    """`identity_<datatype>` and `scalar` (one input, as it is), `addsub` (two and two, version 3), `mlp` (batches of at
    most 8) and `slow` (a second)."""
    for datatype, kind in KINDS.items():
        spec = [("INPUT0", kind, ["n", "m"])]
        node = helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])
        _save(root / f"identity_{datatype.lower()}", [node], spec, [("OUTPUT0", kind, ["n", "m"])])
    four: Any = [TensorProto.FLOAT, ["n", 4]]
    _save(
        root / "addsub" / "3",
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        [("INPUT0", *four), ("INPUT1", *four)],
        [("OUTPUT0", *four), ("OUTPUT1", *four)],
    )
    _save(
        root / "mlp",
        [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 8])],
        [("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(WEIGHTS, "w"), numpy_helper.from_array(BIAS, "b")],
    )
    (root / "mlp" / "config.pbtxt").write_text('name: "mlp"\nmax_batch_size: 8\n')
    write_synthetic(root / "slow", infer_ms=1_000)


def classifier() -> Any:
    """What `classifier` is."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(FLOWERS, [0, 1, 2] * 2)


def write_classifier(root: Path) -> None:
    """`classifier`: scikit-learn's, in skops' format, which runs no code."""
    import skops.io

    (root / "classifier").mkdir(parents=True)
    skops.io.dump(classifier(), root / "classifier" / "model.skops")


FLOWERS: Final = np.array([[5, 3], [6, 2], [7, 3], [5, 4], [6, 3], [8, 3]], np.float64)


def write_synthetic(folder: Path, **settings: Any) -> Path:
    """A model that costs what it is told to (loaders.synthetic)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.synthetic.json"
    path.write_text(json.dumps(settings))
    return path


def _save(folder: Path, nodes: Any, inputs: Any, outputs: Any, weights: Any = ()) -> None:
    def infos(specs: Any) -> list[Any]:
        return [helper.make_tensor_value_info(*spec) for spec in specs]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
