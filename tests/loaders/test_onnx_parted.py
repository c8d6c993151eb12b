"""`loaders.onnx_parted`: a model opened without parsing its weights answers as ONNX Runtime does with the file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from loaders import onnx_parted
from loaders.base import Artifact, Tensor
from loaders.onnx import OnnxLoader
from loaders.onnx_parted import part

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_parted, "LARGE_BYTES", 100_000)


def network(path: Path, *, given: bool = False) -> Path:
    """A convolution whose batch normalisation ONNX Runtime folds into its weights, a fused product and a table that is
    looked up; `given`: one weight is an input too, which clients may override (onnx.proto, GraphProto.initializer)."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 30, name)

    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"]),
        helper.make_node("GlobalAveragePool", ["n"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["g"]),
        helper.make_node("Relu", ["g"], ["r"]),
        helper.make_node("Cast", ["i"], ["j"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "j"], ["e"]),
        helper.make_node("Add", ["r", "e"], ["y"]),
    ]
    statistics = [
        numpy_helper.from_array(rng.uniform(0.5, 2, 64).astype(np.float32), name)
        for name in ("scale", "shift", "mean", "variance")
    ]
    weights = [weight("k", 64, 64, 3, 3), weight("w", 64, 512), weight("b", 512), weight("table", 99, 512), *statistics]
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64, 8, 8]),
        helper.make_tensor_value_info("i", TensorProto.INT32, ["n"]),
    ]
    if given:
        infos.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 512]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])
    graph = helper.make_graph(nodes, "net", infos, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def feeds(rows: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(rows)
    return {
        "x": rng.standard_normal((rows, 64, 8, 8)).astype(np.float32),
        "i": rng.integers(0, 99, rows).astype(np.int32),
    }


def answer_of(path: Path, rows: int) -> Tensor:
    answer: Tensor = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds(rows))[0]
    return answer


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_answers_are_those_of_the_file(tmp_path: Path, given: bool, is_fixed: bool) -> None:
    path = network(tmp_path / "model.onnx", given=given)
    parted = part(path, is_fixed=is_fixed)
    assert parted is not None
    if is_fixed:
        assert "w" not in parted.weights  # the matrix of a product is mapped from wherever it begins
    else:
        assert set(parted.weights) == {"k", "table"} | (set() if given else {"w"})
    assert len(parted.graph) < 20_000 + 64 * 512 * 4 * given
    own, packed = parted.open(), parted.packed()
    for rows in (1, 32):
        expected = answer_of(path, rows)
        np.testing.assert_allclose(own.run(None, feeds(rows))[0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(packed.run(None, feeds(rows))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_use_gets_its_packed_weights(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx")
    expected = answer_of(path, 4)
    model = OnnxLoader().load(Artifact(path))
    path.write_bytes(b"")  # written anew by its owner: what is loaded stays what it was
    opened = model._opened
    assert opened.parted is not None
    while model._opened is opened:
        assert not any(thread.name == "pack" for thread in threading.enumerate()) or model._unpacked_s == np.inf
        np.testing.assert_allclose(model.infer(feeds(4), ["y"])["y"], expected, rtol=1e-4, atol=1e-5)
    assert model._opened.parted is None
    np.testing.assert_allclose(model.infer(feeds(4), ["y"])["y"], expected, rtol=1e-4, atol=1e-5)
    model.unload()


def test_a_model_that_is_unloaded_while_it_is_packed_stays_unloaded(tmp_path: Path) -> None:
    model = OnnxLoader().load(Artifact(network(tmp_path / "model.onnx")))
    parted = model._opened.parted
    assert parted is not None
    model._pack(parted)
    model.unload()
    for thread in threading.enumerate():
        if thread.name == "pack":
            thread.join()
    assert model._opened.session is None


def test_small_files_are_opened_as_they_are(save_mlp: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_parted, "LARGE_BYTES", 8 << 20)
    assert part(save_mlp(64, 64, 2), is_fixed=True) is None
