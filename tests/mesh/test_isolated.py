"""Models in processes of their own, through a pod and its port: what their clients are told of their faults, and that
others notice nothing of them. Authority: docs/ARCHITECTURE.md, Errors; MLServer, "Custom Inference Runtimes"."""

from __future__ import annotations

import asyncio
import json
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from tests.mesh.client import Client
from tests.mesh.models import write_synthetic

MODEL = """
    import ctypes, numpy, os

    class Ranker:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        outputs = [{"name": "rank", "datatype": "INT64", "shape": [-1, 2]}]

        def load(self, path, parameters):
            print("weights of", parameters["tenant"])
            self.weights = numpy.loadtxt("weights.csv")

        def predict(self, inputs):
            x = inputs["x"]
            if (x == 7777).any():
                ctypes.string_at(0)
            while (x == 99).any():
                pass
            if (x < 0).any():
                raise ValueError("x below zero")
            return {"rank": numpy.argsort(x * self.weights, axis=1)}
"""


@pytest.fixture(scope="module")
def pod_settings() -> dict[str, str]:
    return {"allow_code": "python", "run_threads": "1"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write(
        root / "ranker", MODEL, implementation="model.Ranker", parameters={"extra": {"tenant": "a", "timeout_ms": 700}}
    )
    (root / "ranker" / "weights.csv").write_text("1 -1")
    write(root / "free", "def predict(inputs):\n    return {name + '!': value for name, value in inputs.items()}")
    write(root / "broken", "import numpy\n\nnumpy.gone()")
    write_synthetic(root / "other")
    return root


def write(folder: Path, source: str, **settings: object) -> None:
    folder.mkdir()
    (folder / "model.py").write_text(textwrap.dedent(source))
    if settings:
        (folder / "model-settings.json").write_text(json.dumps(settings))


def request(model: str, *values: float, name: str = "x") -> v2.ModelInferRequest:
    data = np.array(values, "<f4").tobytes()
    made = v2.ModelInferRequest(model_name=model, raw_input_contents=[data])
    made.inputs.add(name=name, datatype="FP32", shape=[len(values) // 2, 2])
    return made


async def ranks(client: Client, *values: float) -> list[int]:
    answer = await client.call("ModelInfer", request("ranker", *values))
    return [int(rank) for rank in np.frombuffer(answer.raw_output_contents[0], "<i8")]


def processes(pod: LocalPod) -> list[psutil.Process]:
    """Those of models: all are forked from one of the pod's."""
    forking = [each for each in psutil.Process(pod.pid).children() if "worker.py" in " ".join(each.cmdline())]
    return [process for each in forking for process in each.children()]


async def test_a_model_answers_and_tells_what_it_takes(client: Client, pod: LocalPod) -> None:
    assert await ranks(client, 1, 2, 3, 1) == [1, 0, 1, 0]
    told = await client.call("ModelMetadata", v2.ModelMetadataRequest(name="ranker"))
    assert (told.platform, told.inputs[0].name, list(told.inputs[0].shape)) == ("python", "x", [-1, 2])
    assert (told.outputs[0].datatype, list(told.outputs[0].shape)) == ("INT64", [-1, 2])
    assert "model ranker: weights of a\n" in pod.log.read_text()
    many = await asyncio.gather(*(ranks(client, n, n + 1) for n in range(40)))  # some of them together
    assert many == [[1, 0]] * 40


async def test_a_model_that_declares_nothing_is_handed_everything(client: Client) -> None:
    made = request("free", 1, 2)
    made.inputs.add(name="text", datatype="BYTES", shape=[1])
    made.raw_input_contents.append(b"\2\0\0\0ab")
    answer = await client.call("ModelInfer", made)
    assert [each.name for each in answer.outputs] == ["x!", "text!"]
    assert list(answer.raw_output_contents) == list(made.raw_input_contents)
    made.outputs.add(name="text!")
    assert list((await client.call("ModelInfer", made)).raw_output_contents) == [b"\2\0\0\0ab"]


@pytest.mark.parametrize(
    ("made", "status", "says"),
    [
        (request("ranker", -1, 1), "INVALID_ARGUMENT", "ValueError: x below zero (model.py, line 19)"),
        (request("ranker", 1, 2, name="y"), "INVALID_ARGUMENT", "not an input of the model: 'x'"),
        (request("broken", 1, 2), "FAILED_PRECONDITION", "has no attribute 'gone' (model.py, line 3)"),
        (request("ranker", 7777, 1), "INTERNAL", "the model's process was killed by SIGSEGV"),
    ],
)
async def test_faults_are_told(client: Client, made: v2.ModelInferRequest, status: str, says: str) -> None:
    found, message = await client.refusal("ModelInfer", made)
    assert (found, says in message) == (status, True), message
    assert await ranks(client, 1, 2) == [1, 0]  # loaded again, if it was lost


async def test_an_endless_loop_takes_nobody_elses_time_and_is_ended(client: Client, pod: LocalPod) -> None:
    endless = client.start("ModelInfer", request("ranker", 99, 1))
    waiting = [client.start("ModelInfer", request("ranker", 1, n)) for n in range(2, 5)]
    other = v2.ModelInferRequest(model_name="other", raw_input_contents=[b"1234"])
    other.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1])
    for _ in range(20):
        await client.call("ModelInfer", other)
    assert not endless.done()
    with pytest.raises(Exception, match="did not answer within 700 ms, and its process was ended"):
        await endless
    for each in waiting:  # they had not begun, and are run by the next process
        assert np.frombuffer((await each).raw_output_contents[0], "<i8").tolist() == [1, 0]
    assert "copy ranker was lost, and is given up" in pod.log.read_text()


async def test_unloading_ends_the_process(client: Client, pod: LocalPod) -> None:
    await ranks(client, 1, 2)
    before = len(processes(pod))
    await client.call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="ranker"))
    assert len(processes(pod)) == before - 1
