"""`loaders.openvino`: the model's own names and answers, no threads, no telemetry."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import loader_for, recognised
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec

LOADER = loader_for("openvino")
import openvino  # noqa: E402
from openvino import opset13 as ops  # noqa: E402

WEIGHTS = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear model of digits: scores FP32 [n, 10] and label INT64 [n, 1]."""
    given = ops.parameter([-1, 64], np.float32, name="x")
    scores = ops.matmul(given, ops.constant(WEIGHTS), False, False)
    scores.output(0).set_names({"scores"})
    best = ops.topk(scores, ops.constant(1), 1, "max", "value", "i64")
    best.output(1).set_names({"label"})
    model = openvino.Model([ops.result(scores), ops.result(best.output(1))], [given], "digits")
    path = tmp_path_factory.mktemp("ir") / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def test_answers_are_openvinos_own(path: Path, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0].astype(np.float32)
    model = LOADER.load(Artifact(path))
    assert recognised(path) == "openvino"
    assert model.signature.inputs == (TensorSpec("x", "FP32", (-1, 64)),)
    assert model.signature.outputs == (TensorSpec("scores", "FP32", (-1, 10)), TensorSpec("label", "INT64", (-1, 1)))
    expected = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": images})
    for count in (1797, 3, 1):
        answer = model.infer({"x": images[:count]}, ["label", "scores"])
        np.testing.assert_allclose(answer["scores"], expected["scores"][:count], rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(answer["label"], expected["label"][:count])
    first = model.infer({"x": images[:2]}, ["scores"])["scores"].copy()
    kept = model.infer({"x": images[:2]}, ["scores"])["scores"]
    model.infer({"x": images[5:7]}, ["scores"])
    np.testing.assert_array_equal(kept, first)
    model.unload()


@pytest.mark.parametrize("kind", ["boolean", "u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f16", "f32", "f64"])
def test_every_datatype_comes_back_as_it_went(tmp_path: Path, kind: str) -> None:
    given = ops.parameter([-1, 2], getattr(openvino.Type, kind), name="x")
    openvino.save_model(
        openvino.Model([ops.result(given)], [given], "m"), tmp_path / "model.xml", compress_to_fp16=False
    )
    model = LOADER.load(Artifact(tmp_path / "model.xml"))
    (gives,) = model.signature.outputs
    tensor = np.array([[1, 0]], dtype=getattr(openvino.Type, kind).to_dtype())
    answer = model.infer({"x": tensor}, [gives.name])[gives.name]
    np.testing.assert_array_equal(answer, tensor)
    assert gives.datatype == model.signature.inputs[0].datatype


def test_strings(tmp_path: Path) -> None:
    given = ops.parameter([-1], openvino.Type.string, name="x")
    openvino.save_model(openvino.Model([ops.result(given)], [given], "m"), tmp_path / "model.xml")
    model = LOADER.load(Artifact(tmp_path / "model.xml"))
    (gives,) = model.signature.outputs
    assert gives.datatype == "BYTES"
    answer = model.infer({"x": np.array([b"a", b"\xffb"], object)}, [gives.name])[gives.name]
    assert answer.tolist() == [b"a", b"\xffb"]


def test_models_and_requests_in_fresh_threads_start_no_threads_and_nothing_is_sent(path: Path, tmp_path: Path) -> None:
    script = """
import os, socket, sys, threading
import numpy as np
from pathlib import Path
def refuse(*where):
    raise AssertionError(where)
socket.socket.connect = refuse
from loaders import loader_for
from loaders.base import Artifact
loader, threads = loader_for("openvino"), lambda: len(os.listdir("/proc/self/task"))
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
first = loader.load(Artifact(Path(sys.argv[1])))
before, after = threads(), []
def run():
    for _ in range(5):
        model = loader.load(Artifact(Path(sys.argv[1])))
        model.infer({"x": np.zeros((99, 64), np.float32)}, ["scores"])
    after.append(threads())
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert after[0] <= before + 2, (before, after)  # this one, and the one that trims malloc
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60, env=environment)
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path, path: Path) -> None:
    graph, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    for xml, bin_ in (
        (b"", weights),
        (b"<net junk", weights),
        (graph[: len(graph) // 2], weights),
        (graph, weights[:99]),
    ):
        (tmp_path / "model.xml").write_bytes(xml)
        (tmp_path / "model.bin").write_bytes(bin_)
        with pytest.raises(LoaderError, match=r"model.xml does not load with OpenVINO 20\d\d") as refusal:
            LOADER.load(Artifact(tmp_path / "model.xml"))
        assert "\n" not in str(refusal.value)
    (tmp_path / "model.xml").write_bytes(graph)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(LoaderError, match=r"model.xml does not load"):
        LOADER.load(Artifact(tmp_path / "model.xml"))
    with pytest.raises(LoaderError, match="does not exist") as missing:
        LOADER.load(Artifact(tmp_path / "absent.xml"))
    assert missing.value.retryable


def test_shapes_that_do_not_go_together_are_the_clients_fault(tmp_path: Path) -> None:
    inputs = [ops.parameter([-1, -1], np.float32, name=name) for name in ("a", "b")]
    product = ops.matmul(*inputs, False, False)
    product.output(0).set_names({"c"})
    openvino.save_model(openvino.Model([product], inputs, "m"), tmp_path / "model.xml")
    model = LOADER.load(Artifact(tmp_path / "model.xml"))
    fit, other = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    assert model.infer({"a": fit, "b": fit.T.copy()}, ["c"])["c"].tolist() == [[3, 3], [3, 3]]
    with pytest.raises(InferError) as refusal:
        model.infer({"a": fit, "b": other}, ["c"])
    assert refusal.value.bad_input
    assert model.infer({"a": fit, "b": fit.T.copy()}, ["c"])["c"].tolist() == [[3, 3], [3, 3]]


def test_concurrent_requests_get_their_own_answers(
    path: Path, digits: tuple[Tensor, Tensor], from_eight_threads: Callable[[Callable[[int], bool]], bool]
) -> None:
    images = digits[0].astype(np.float32)
    model: Any = LOADER.load(Artifact(path))
    expected = images @ WEIGHTS
    assert from_eight_threads(
        lambda i: np.allclose(
            model.infer({"x": images[i : i + 9]}, ["scores"])["scores"], expected[i : i + 9], atol=1e-3
        )
    )
    model.unload()
