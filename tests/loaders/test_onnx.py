"""`loaders.onnx`: what ONNX Runtime itself answers, without threads, and with its memory back after unloading."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression

from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.memory import process
from loaders.onnx import OnnxLoader

LOADER = OnnxLoader()
TYPES = {
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
Save = Callable[..., Path]


def identity(save_onnx: Save, datatype: str, shape: Any = ("n", 2)) -> Path:
    info = TYPES[datatype], shape
    return save_onnx([helper.make_node("Identity", ["x"], ["y"])], [("x", *info)], [("y", *info)])


def test_answers_are_the_classifiers_own(
    tmp_path: Path, digits: tuple[Tensor, Tensor], digits_model: LogisticRegression
) -> None:
    images = (digits[0] / 16).astype(np.float32)
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(digits_model, images[:1], options={"zipmap": False}).SerializeToString())
    model = LOADER.load(Artifact(path))
    assert model.signature.platform == "onnx_onnxv1"
    assert model.signature.inputs == (TensorSpec("X", "FP32", (-1, 64)),)
    assert model.signature.outputs == (
        TensorSpec("label", "INT64", (-1,)),
        TensorSpec("probabilities", "FP32", (-1, 10)),
    )
    answer = model.infer({"X": images}, ["probabilities", "label"])
    assert list(answer) == ["probabilities", "label"]
    assert (answer["label"] == digits_model.predict(images)).mean() > 0.999
    np.testing.assert_allclose(answer["probabilities"], digits_model.predict_proba(images), atol=1e-5)


def test_a_zipmap_is_refused_with_the_way_out(
    tmp_path: Path, digits: tuple[Tensor, Tensor], digits_model: LogisticRegression
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(digits_model, digits[0][:1].astype(np.float32)).SerializeToString())
    with pytest.raises(LoaderError, match="which has no V2 datatype: export it with zipmap=False"):
        LOADER.load(Artifact(path))


@pytest.mark.parametrize("datatype", TYPES)
def test_every_datatype_passes_bit_for_bit(save_onnx: Save, datatype: str) -> None:
    model = LOADER.load(Artifact(identity(save_onnx, datatype)))
    assert model.signature.inputs == (TensorSpec("x", datatype, (-1, 2)),)
    if datatype == "BYTES":
        tensor: Tensor = np.array([["é".encode(), b""], [b"a b", "日本".encode()]], dtype=object)
    else:
        dtype = DTYPES[datatype]
        bits = np.random.default_rng(3).integers(0, 2 if datatype == "BOOL" else 256, 4 * dtype.itemsize, np.uint8)
        tensor = np.frombuffer(bits.tobytes(), dtype).reshape(2, 2)  # read-only, as tensors of requests are
    for given in (tensor, tensor[:0]):
        answer = model.infer({"x": given}, ["y"])["y"]
        assert (answer.dtype, answer.shape, answer.flags.c_contiguous) == (given.dtype, given.shape, True)
        assert answer.tolist() == given.tolist() if datatype == "BYTES" else answer.tobytes() == given.tobytes()


def test_strings_that_are_not_text_are_the_clients_fault(save_onnx: Save) -> None:  # onnx.proto: strings are UTF-8
    model = LOADER.load(Artifact(identity(save_onnx, "BYTES")))
    with pytest.raises(InferError, match="not UTF-8") as refusal:
        model.infer({"x": np.array([[b"\xff", b""]], dtype=object)}, ["y"])
    assert refusal.value.bad_input


def test_scalars_and_unknown_sizes(save_onnx: Save) -> None:
    for datatype, tensor in (("FP32", np.array(2.5, np.float32)), ("BYTES", np.array(b"a", dtype=object))):
        model = LOADER.load(Artifact(identity(save_onnx, datatype, ())))
        assert model.signature.inputs[0].shape == ()
        answer = model.infer({"x": tensor}, ["y"])["y"]
        assert (answer.shape, answer.tolist()) == ((), tensor.tolist())
    assert LOADER.load(Artifact(identity(save_onnx, "FP32", (None, "m", 3)))).signature.inputs[0].shape == (-1, -1, 3)


def test_external_data_is_read_from_the_models_folder_only(save_mlp: Save, tmp_path: Path) -> None:
    x = np.ones((1, 8), np.float32)
    inside = LOADER.load(Artifact(save_mlp(8, 4, name="inside")))
    path = save_mlp(8, 4, name="outside", save_as_external_data=True, location="w.bin", size_threshold=0)
    answer = LOADER.load(Artifact(path)).infer({"x": x}, ["y"])["y"]
    np.testing.assert_array_equal(answer, inside.infer({"x": x}, ["y"])["y"])

    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = f"../{tmp_path.name}/w.bin"
    elsewhere = tmp_path.parent / f"{tmp_path.name}-model"
    elsewhere.mkdir()
    (elsewhere / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LoaderError, match="escapes"):
        LOADER.load(Artifact(elsewhere / "model.onnx"))


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [((1, 3), "FP32", "Got: 3 Expected: 2"), ((2,), "FP32", "Invalid rank"), ((1, 2), "FP64", "data type")],
)
def test_what_onnxruntime_calls_invalid_is_the_clients_fault(
    save_onnx: Save, shape: tuple[int, ...], dtype: str, says: str
) -> None:
    model = LOADER.load(Artifact(identity(save_onnx, "FP32")))
    with pytest.raises(InferError, match=says) as refusal:
        model.infer({"x": np.ones(shape, DTYPES[dtype])}, ["y"])
    assert refusal.value.bad_input


def test_a_node_that_fails_is_the_models_fault(save_onnx: Save) -> None:
    shape = numpy_helper.from_array(np.array([7, 7]), "shape")
    infos = [("x", TensorProto.FLOAT, ["n"])], [("y", TensorProto.FLOAT, ["a", "b"])]
    model = LOADER.load(Artifact(save_onnx([helper.make_node("Reshape", ["x", "shape"], ["y"])], *infos, [shape])))
    with pytest.raises(InferError, match="running Reshape node") as failure:
        model.infer({"x": np.ones(3, np.float32)}, ["y"])
    assert not failure.value.bad_input


def test_a_damaged_or_missing_file_is_refused(save_mlp: Save, tmp_path: Path) -> None:
    whole = save_mlp(64, 64).read_bytes()
    path = tmp_path / "bad.onnx"
    for content in (b"", b"junk" * 100, whole[: len(whole) // 2], whole[100:]):
        path.write_bytes(content)
        with pytest.raises(LoaderError, match=r"bad\.onnx") as refusal:
            LOADER.load(Artifact(path))
        assert not refusal.value.retryable
    graph = onnx.load_from_string(whole)
    graph.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(LoaderError, match="NoSuchOperator"):
        LOADER.load(Artifact(path))
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.load(Artifact(tmp_path / "absent.onnx"))
    assert refusal.value.retryable


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "cuda"}, "'CUDAExecutionProvider' is not available here: expected CPUExecutionProvider"),
        ({"device": "tpu"}, "expected 'cpu', 'cuda' or 'cuda:<number>'"),
        ({"providers": "CPUExecutionProvider"}, "expected a list"),
        ({"providers": ["AzureExecutionProvider"]}, "not available"),  # would send inputs to another host
        ({"providers": ["CPUExecutionProvider"], "device": "cpu"}, "exclude each other"),
        ({"threads": 4}, "unknown parameter 'threads': onnx models take device, providers"),
    ],
)
def test_parameters_are_checked(save_mlp: Save, settings: dict[str, Any], says: str) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers() and settings == {"device": "cuda"}:
        pytest.skip("this machine has CUDA")
    with pytest.raises(LoaderError, match=says):
        LOADER.load(Artifact(save_mlp(8, 2), settings))


def test_a_declared_signature_must_agree(save_mlp: Save) -> None:
    path = save_mlp(8, 2)
    declared = (TensorSpec("x", "FP32", (4, 8)),)
    assert LOADER.load(Artifact(path, {"device": "cpu"}, inputs=declared)).signature.inputs == declared
    with pytest.raises(LoaderError, match="contradicts"):
        LOADER.load(Artifact(path, inputs=(TensorSpec("x", "FP64", (4, 8)),)))


def test_both_packages_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.onnx.version", lambda package: "1.31.1")
    with pytest.raises(LoaderError, match="uninstall both, install one"):
        OnnxLoader()
    monkeypatch.setattr("loaders.onnx.version", importlib.metadata.version)
    OnnxLoader()


def test_concurrent_requests_get_their_own_answers(
    save_mlp: Save, from_eight_threads: Callable[[Callable[[int], bool]], bool]
) -> None:
    model = LOADER.load(Artifact(save_mlp(64, 128, 10)))
    inputs = [np.random.default_rng(i).standard_normal((1 + i % 5, 64), np.float32) for i in range(200)]
    expected = [model.infer({"x": x}, ["y"])["y"] for x in inputs]
    assert from_eight_threads(lambda i: bool((model.infer({"x": inputs[i]}, ["y"])["y"] == expected[i]).all()))


def test_a_hundred_sessions_add_no_thread_and_unloading_gives_their_memory_back(save_mlp: Save) -> None:
    artifact = Artifact(save_mlp(128, 512, 512, 64))
    x = np.ones((1, 128), np.float32)
    LOADER.load(artifact).infer({"x": x}, ["y"])  # whatever happens once per process
    gc.collect()
    process.give_back._trim()
    threads, before = len(os.listdir("/proc/self/task")), process.resident_bytes()
    models = [LOADER.load(artifact) for _ in range(100)]
    for model in models:
        model.infer({"x": x}, ["y"])
    assert len(os.listdir("/proc/self/task")) <= threads + 1  # a timer's, for the next trim
    process.give_back._trim()  # of what the files' parser had used
    taken = process.resident_bytes() - before
    claimed = sum(model.size_bytes for model in models)
    assert claimed == pytest.approx(taken, rel=0.3)
    assert LOADER.estimate_bytes(artifact) == pytest.approx(models[0].size_bytes, rel=0.1)
    for model in models:
        model.unload()
    process.give_back._trim()  # what `give_back` does within a second
    assert process.resident_bytes() - before < taken / 4


@pytest.mark.parametrize("widths", [(64, 128, 128, 10), (1024, 2048, 1024)])  # estimated and measured, `Change`
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sizes_are_what_malloc_gave(save_mlp: Save, widths: tuple[int, ...], dtype: Any) -> None:
    artifact = Artifact(save_mlp(*widths, dtype=dtype))
    keep = [LOADER.load(artifact)]
    before = process.malloc_bytes()
    keep += [LOADER.load(artifact) for _ in range(5)]
    assert keep[1].size_bytes == pytest.approx((process.malloc_bytes() - before) / 5, rel=0.15)
    assert LOADER.estimate_bytes(artifact) == pytest.approx(keep[1].size_bytes, rel=0.25)
