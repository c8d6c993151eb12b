"""Models as their frameworks write them, for `bench.formats`: one line of `ZOO` for each kind, in five sizes.

All are trained on, or take, scikit-learn's digits: rows of 64 numbers (networks with convolutions: 1 x 8 x 8).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Predict = Callable[[Array], Array]
SIZES: Final = 5


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of model."""

    format: str
    extension: str
    needs: tuple[str, ...]
    """Modules without which it is left out."""
    make: Callable[[Path, int], None]
    """Writes a model of size 0 to 4."""
    by_hand: Callable[[Path], Predict]
    """Loads it as the framework's users would."""
    output: str = ""
    """The output that is what `by_hand` answers; empty: the first."""
    shape: tuple[int, ...] = (64,)
    """Of one row."""
    dtype: type[np.floating[Any]] = np.float32
    has_process: bool = False
    """Its memory is not this process's."""

    def rows(self, count: int) -> Array:
        """So many rows of the digits."""
        images, _ = _digits()
        return np.ascontiguousarray(images[:count], self.dtype).reshape(count, *self.shape)

    def is_here(self) -> bool:
        return all(find_spec(module) is not None for module in self.needs)


@cache
def _digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)  # type: ignore[no-any-return]


# ONNX


def _graph(
    path: Path, nodes: list[Any], weights: Mapping[str, Array], shape: tuple[int, ...], half: bool = False
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    takes = helper.make_tensor_value_info("x", kind, ["n", *shape])
    gives = helper.make_tensor_value_info("y", kind, ["n", None])
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [takes], [gives], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def _onnx_mlp(path: Path, size: int, half: bool = False) -> None:
    from onnx import helper

    rng = np.random.default_rng(size)
    wide = (32, 128, 384, 1024, 2048)[size]
    dtype = np.float16 if half else np.float32
    sizes = [(64, wide), (wide, wide), (wide, 10)]
    weights = {f"w{i}": (rng.standard_normal(each) / each[0] ** 0.5 / 16).astype(dtype) for i, each in enumerate(sizes)}
    weights |= {f"b{i}": np.zeros(each[1], dtype) for i, each in enumerate(sizes)}
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Gemm", ["r0", "w1", "b1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("Gemm", ["r1", "w2", "b2"], ["y"]),
    ]
    _graph(path, nodes, weights, (64,), half)


def _onnx_conv(path: Path, size: int) -> None:
    from onnx import helper

    rng = np.random.default_rng(size)
    wide = (4, 16, 48, 128, 256)[size]
    weights = {"k0": rng.standard_normal((wide, 1, 3, 3)).astype(np.float32) / 9}
    weights |= {f"k{i}": rng.standard_normal((wide, wide, 3, 3)).astype(np.float32) / wide / 9 for i in (1, 2, 3)}
    weights["w"] = rng.standard_normal((wide, 10)).astype(np.float32)
    nodes, name = [], "x"
    for i in range(4):
        nodes.append(helper.make_node("Conv", [name, f"k{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [name := f"r{i}"]))
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"]))
    _graph(path, nodes, weights, (1, 8, 8))


def _onnx_deep(path: Path, size: int) -> None:
    from onnx import helper

    rng = np.random.default_rng(size)
    depth = (10, 40, 120, 300, 800)[size]
    weights = {"w0": rng.standard_normal((64, 24)).astype(np.float32) / 64}
    weights |= {f"w{i}": rng.standard_normal((24, 24)).astype(np.float32) / 8 for i in range(1, depth)}
    nodes, name = [], "x"
    for i in range(depth):
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [name := f"t{i}" if i < depth - 1 else "y"]))
    _graph(path, nodes, weights, (64,))


def _onnx_of(path: Path, size: int, train: Callable[[int], Any]) -> None:
    from skl2onnx import to_onnx

    model = to_onnx(train(size), np.zeros((1, 64), np.float32), options={"zipmap": False})
    path.write_bytes(model.SerializeToString())


def _session(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: np.asarray(session.run(None, {name: rows})[0])


# scikit-learn


@cache
def _forest(size: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier((5, 20, 50, 120, 300)[size], random_state=0).fit(*_digits())


@cache
def _boosting(size: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=(2, 5, 10, 20, 40)[size], max_leaf_nodes=15).fit(*_digits())


def _logistic(size: int) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    images, labels = _digits()
    if size == 0:
        return SGDClassifier(max_iter=20, tol=None, random_state=0).fit(images, labels)
    many = make_pipeline(
        PCA((64, 8, 16, 32, 60)[size]),
        PolynomialFeatures(2),
        StandardScaler(),
        SGDClassifier(max_iter=2, tol=None, random_state=0),
    )
    return many.fit(images, labels)


def _svc(size: int) -> Any:
    from sklearn.svm import SVC

    images, labels = _digits()
    kept = (50, 200, 500, 1000, 1797)[size]
    return SVC(gamma=0.01).fit(images[:kept], labels[:kept])


def _neighbours(size: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = _digits()
    times = (1, 1, 1, 4, 16)[size]
    kept = (200, 800, 1797, 1797, 1797)[size]
    return KNeighborsClassifier().fit(np.tile(images[:kept], (times, 1)), np.tile(labels[:kept], times))


def _network(size: int) -> Any:
    from sklearn.neural_network import MLPClassifier

    wide = (16, 64, 256, 700, 1500)[size]
    images, labels = _digits()
    network = MLPClassifier((wide, wide), batch_size=200)
    return network.partial_fit(images[:200], labels[:200], classes=range(10))


def _skops(train: Callable[[int], Any]) -> Callable[[Path, int], None]:
    def make(path: Path, size: int) -> None:
        import skops.io

        skops.io.dump(train(size), path)

    return make


def _joblib(train: Callable[[int], Any]) -> Callable[[Path, int], None]:
    def make(path: Path, size: int) -> None:
        import joblib

        joblib.dump(train(size), path)

    return make


def _from_skops(path: Path) -> Predict:
    import skops.io

    estimator = skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path))
    return lambda rows: np.asarray(estimator.predict(rows))


def _from_joblib(path: Path) -> Predict:
    import joblib

    estimator = joblib.load(path)
    return lambda rows: np.asarray(estimator.predict(rows))


# Boosters


def _xgboost(path: Path, size: int) -> None:
    import xgboost

    images, labels = _digits()
    rounds = (2, 5, 15, 40, 100)[size]
    settings = {"objective": "multi:softprob", "num_class": 10, "nthread": 2, "verbosity": 0}
    xgboost.train(settings, xgboost.DMatrix(images, labels), rounds).save_model(path)


def _from_xgboost(path: Path) -> Predict:
    import xgboost

    booster = xgboost.Booster(model_file=path)
    return lambda rows: np.asarray(booster.inplace_predict(rows))


def _lightgbm(path: Path, size: int) -> None:
    import lightgbm

    images, labels = _digits()
    rounds = (2, 5, 15, 40, 100)[size]
    settings = {"objective": "multiclass", "num_class": 10, "verbosity": -1, "num_threads": 2}
    lightgbm.train(settings, lightgbm.Dataset(images, labels), rounds).save_model(path)


def _from_lightgbm(path: Path) -> Predict:
    import lightgbm

    booster = lightgbm.Booster(model_file=str(path))
    return lambda rows: np.asarray(booster.predict(rows))


# PyTorch


def _torch(path: Path, size: int, *, conv: bool) -> None:
    import torch
    from torch import nn

    torch.manual_seed(size)
    if conv:
        wide = (4, 16, 48, 128, 256)[size]
        body = [nn.Conv2d(wide, wide, 3, padding=1) for _ in range(3)]
        layers: list[nn.Module] = [nn.Conv2d(1, wide, 3, padding=1), nn.ReLU()]
        layers += [layer for each in body for layer in (each, nn.ReLU())]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10)]
        example = torch.zeros(2, 1, 8, 8)
    else:
        wide = (32, 128, 384, 1024, 2048)[size]
        layers = [nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10)]
        example = torch.zeros(2, 64)
    module = nn.Sequential(*layers).eval()
    if path.suffix == ".pt2":
        batch = torch.export.Dim("n", min=1, max=1024)
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: batch},)), path)
    else:
        torch.jit.trace(module, example).save(str(path))  # type: ignore[no-untyped-call]


def _from_torch(path: Path) -> Predict:
    import torch

    module = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]

    def predict(rows: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(rows)).numpy())

    return predict


def _mlp(path: Path, size: int) -> None:
    _torch(path, size, conv=False)


def _conv(path: Path, size: int) -> None:
    _torch(path, size, conv=True)


_WIDE: Final = (32, 128, 384, 1024, 2048)
_ARCHITECTURE: Final = {
    "input": {"shape": [-1, 64]},
    "layers": [{"linear": "0"}, "relu", {"linear": "2"}, "relu", {"linear": "4"}],
}


def _network_of(size: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(size)
    wide = _WIDE[size]
    return nn.Sequential(nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10))


def _safetensors(path: Path, size: int) -> None:
    from safetensors.torch import save_file

    path.mkdir()
    (path / "architecture.json").write_text(json.dumps(_ARCHITECTURE))
    save_file(dict(_network_of(size).state_dict()), path / "model.safetensors")


def _from_safetensors(path: Path) -> Predict:
    import torch
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    module = _network_of(_WIDE.index(len(weights["0.bias"]))).eval()
    module.load_state_dict(weights)

    def predict(rows: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(rows)).numpy())

    return predict


# OpenVINO, MLflow


def _openvino(path: Path, size: int) -> None:
    openvino = _quiet_openvino()
    from openvino import opset13

    rng, wide = np.random.default_rng(size), _WIDE[size]
    given = answer = opset13.parameter([-1, 64], np.float32, name="x")
    for takes, gives in ((64, wide), (wide, wide), (wide, 10)):
        weights = opset13.constant(rng.standard_normal((takes, gives)).astype(np.float32) / takes)
        answer = opset13.tanh(opset13.matmul(answer, weights, False, False))
    answer.output(0).set_names({"y"})
    openvino.save_model(openvino.Model([answer], [given], "m"), path, compress_to_fp16=False)


def _from_openvino(path: Path) -> Predict:
    compiled = _quiet_openvino().Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda rows: np.asarray(compiled(rows)[0])


def _quiet_openvino() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _mlflow(path: Path, size: int) -> None:
    path.mkdir()
    _onnx_mlp(path / "model.onnx", size)
    (path / "MLmodel").write_text("flavors:\n  onnx:\n    data: model.onnx\n  python_function: {}\n")


# Python

_MODEL: Final = """
import numpy as np

class Model:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}]

    def load(self, path):
        self.weights = np.load("weights.npy")

    def predict(self, inputs):
        return {"y": np.tanh(inputs["x"] @ self.weights)}
"""


def _python(path: Path, size: int) -> None:
    path.mkdir()
    (path / "model.py").write_text(_MODEL)
    np.save(path / "weights.npy", np.random.default_rng(size).standard_normal((64, 10)).astype(np.float32))


def _from_python(path: Path) -> Predict:
    weights = np.load(path / "weights.npy")
    return lambda rows: np.asarray(np.tanh(rows @ weights))


_IMAGE: Final = (1, 8, 8)
_ONNX: Final = ("onnx", "onnxruntime", "sklearn")
_SKLEARN: Final = ("sklearn", "skops")
_TORCH: Final = ("torch", "sklearn")

ZOO: Final[dict[str, Kind]] = {
    "onnx mlp": Kind("onnx", ".onnx", _ONNX, _onnx_mlp, _session),
    "onnx mlp fp16": Kind(
        "onnx", ".onnx", _ONNX, lambda path, size: _onnx_mlp(path, size, half=True), _session, dtype=np.float16
    ),
    "onnx conv": Kind("onnx", ".onnx", _ONNX, _onnx_conv, _session, shape=_IMAGE),
    "onnx deep": Kind("onnx", ".onnx", _ONNX, _onnx_deep, _session),
    "onnx forest": Kind(
        "onnx", ".onnx", (*_ONNX, "skl2onnx"), lambda path, size: _onnx_of(path, size, _forest), _session
    ),
    "onnx boosting": Kind(
        "onnx", ".onnx", (*_ONNX, "skl2onnx"), lambda path, size: _onnx_of(path, size, _boosting), _session
    ),
    "sklearn forest": Kind("sklearn", ".skops", _SKLEARN, _skops(_forest), _from_skops),
    "sklearn forest, joblib": Kind("sklearn", ".joblib", _SKLEARN, _joblib(_forest), _from_joblib),
    "sklearn boosting": Kind("sklearn", ".skops", _SKLEARN, _skops(_boosting), _from_skops, dtype=np.float64),
    "sklearn linear": Kind("sklearn", ".skops", _SKLEARN, _skops(_logistic), _from_skops, dtype=np.float64),
    "sklearn svc": Kind("sklearn", ".joblib", _SKLEARN, _joblib(_svc), _from_joblib, dtype=np.float64),
    "sklearn neighbours": Kind("sklearn", ".skops", _SKLEARN, _skops(_neighbours), _from_skops, dtype=np.float64),
    "sklearn network": Kind("sklearn", ".joblib", _SKLEARN, _joblib(_network), _from_joblib),
    "xgboost": Kind("xgboost", ".ubj", ("xgboost", "sklearn"), _xgboost, _from_xgboost),
    "xgboost, json": Kind("xgboost", ".json", ("xgboost", "sklearn"), _xgboost, _from_xgboost),
    "lightgbm": Kind("lightgbm", ".txt", ("lightgbm", "sklearn"), _lightgbm, _from_lightgbm, dtype=np.float64),
    "python": Kind("python", "", ("sklearn",), _python, _from_python, has_process=True),
    "safetensors": Kind("safetensors", "", (*_TORCH, "safetensors"), _safetensors, _from_safetensors),
    "openvino": Kind("openvino", ".xml", ("openvino", "sklearn"), _openvino, _from_openvino),
    "mlflow": Kind("mlflow", "", (*_ONNX, "yaml"), _mlflow, lambda path: _session(path / "model.onnx")),
    "torch mlp, pt2": Kind("torch", ".pt2", _TORCH, _mlp, _from_torch),
    "torch conv, pt2": Kind("torch", ".pt2", _TORCH, _conv, _from_torch, shape=_IMAGE),
    "torch mlp, pt": Kind("torch", ".pt", _TORCH, _mlp, _from_torch),
    "torch conv, pt": Kind("torch", ".pt", _TORCH, _conv, _from_torch, shape=_IMAGE),
}
