"""An unmodified `tritonclient.grpc` against a pod process with real models; `seen` is what it saw, by scene of
triton_script.py. Authority: Open Inference Protocol (gRPC), and Triton's protocol extensions where a test says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.local_cluster import LocalPod
from tests.mesh.models import KINDS

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(pod: LocalPod) -> Seen:
    script = Path(__file__).with_name("triton_script.py")
    command = [sys.executable, str(script), pod.address]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told: Seen = json.loads(done.stdout)
    return told


def test_the_server_is_live_and_ready_and_tells_its_extensions(seen: Seen) -> None:
    live, ready, name, extensions = seen["server"]
    assert live
    assert ready
    assert name == "densemesh"
    assert "model_repository" in extensions


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_comes_back_as_it_went(seen: Seen, datatype: str) -> None:
    # Tensor Data Types; FP16 and BF16 only as raw contents, which tritonclient always sends
    assert seen["datatypes"][datatype]


def test_id_model_and_version_are_told_and_parameters_accepted(seen: Seen) -> None:
    told = {"id": "r-1", "model": "addsub", "version": "3", "outputs": ["OUTPUT0", "OUTPUT1"], "right": True}
    assert seen["echo"] == told


def test_outputs_are_those_asked_for_in_that_order_or_all(seen: Seen) -> None:
    assert seen["selection"] == [["OUTPUT1"], ["OUTPUT1", "OUTPUT0"], ["OUTPUT0", "OUTPUT1"]]


def test_async_infer_of_many_at_once(seen: Seen) -> None:
    assert seen["many_at_once"] == 40


def test_large_messages_and_compressed_ones(seen: Seen) -> None:
    assert seen["large"] == [True] * 3


def test_tritonclient_on_asyncio(seen: Seen) -> None:
    assert seen["on_asyncio"] == [20, ["0", "1", "2"], "StatusCode.NOT_FOUND"]


def test_model_metadata(seen: Seen) -> None:
    tensors = [{"datatype": "FP32", "shape": ["-1", "4"]}]
    assert seen["metadata"] == {
        "name": "addsub",
        "versions": ["3"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": name, **tensors[0]} for name in ("INPUT0", "INPUT1")],
        "outputs": [{"name": name, **tensors[0]} for name in ("OUTPUT0", "OUTPUT1")],
    }


def test_models_are_ready_when_they_can_be_served(seen: Seen) -> None:
    assert seen["ready"] == [True, True, False, False]


def test_repository_loads_unloads_and_tells(seen: Seen) -> None:
    # Triton, Model Repository Extension: READY and UNAVAILABLE
    assert seen["repository"] == ["READY", "UNAVAILABLE", "READY"]


def test_a_streams_errors_stay_in_band_and_the_stream_goes_on(seen: Seen) -> None:
    # Triton, ModelStreamInferResponse.error_message
    first, missing, unknown, last = seen["stream"]
    assert first == "ok 1"
    assert "missing 'INPUT1'" in missing
    assert "'nobody' is not registered" in unknown
    assert last == "ok 4"


@pytest.mark.parametrize(
    ("case", "status", "says"),
    [
        ("unknown model", "NOT_FOUND", "'nobody'"),
        ("unknown version", "NOT_FOUND", "has version '3', not '9'"),
        ("missing input", "INVALID_ARGUMENT", "missing 'INPUT1'"),
        ("unknown input", "INVALID_ARGUMENT", "'INPUT2'"),
        ("datatype", "INVALID_ARGUMENT", "datatype is INT32, expected FP32"),
        ("shape", "INVALID_ARGUMENT", "shape is [1, 2], expected [-1, 8]"),
        ("batch", "INVALID_ARGUMENT", "batch of 9, expected at most 8"),
        ("output", "INVALID_ARGUMENT", "'OUTPUT7'"),
        ("classification", "UNIMPLEMENTED", "classification"),
        ("metadata of unknown", "NOT_FOUND", "'nobody'"),
        ("load of unknown", "NOT_FOUND", "'nobody'"),
        ("config", "UNIMPLEMENTED", ""),
        ("statistics", "UNIMPLEMENTED", ""),
        ("shared memory", "UNIMPLEMENTED", ""),
        ("deadline", "DEADLINE_EXCEEDED", ""),
    ],
)
def test_errors(seen: Seen, case: str, status: str, says: str) -> None:
    # docs/ARCHITECTURE.md, Errors: one status for each case
    found, message = seen["errors"][case]
    assert found == f"StatusCode.{status}", message
    assert says in message


def test_a_model_named_in_a_header_only_is_the_responses_model_name(seen: Seen) -> None:
    assert seen["by_header"] == "addsub"
