"""Requests that came in one turn of the loop and are run together get what each would get alone.
Authority: mesh.hits and mesh.batcher; what a request gets alone is mesh.inference's answer, and for `mlp` numpy's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from loaders.base import InferError, Signature, Tensor, TensorSpec
from mesh import hits, in_line
from mesh.driver import Driver
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.in_line import Pace
from mesh.resident import Resident
from mesh.rpc import Metadata
from placement.messages import StartLoad
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.models import mlp
from tests.mesh.pods import Loads, Mesh, until
from tests.mesh.test_metrics import scrape

INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S: Final = 30.0

Said = v2.ModelInferResponse | str
rng = np.random.default_rng(5)


class One:
    """A pod `a` in this process with the models of tests.mesh.models, and a client: what it is asked in one turn
    arrives in one read."""

    def __init__(self, mesh: Mesh, client: H2Client) -> None:
        self.mesh = mesh
        self.client = client
        self.driver: Driver

    async def infer(self, request: v2.ModelInferRequest, metadata: Metadata = (), timeout_s: float = TIMEOUT_S) -> Said:
        """The answer, or what was said instead."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        address, message = self.mesh.pods["a"].address, request.SerializeToString()
        try:
            answer, headers = await self.client.call(address, INFER, message, metadata, deadline)
        except MeshError as error:
            return f"{error.code.name}: {error}"
        assert headers["densemesh-pod"] == "a"
        return v2.ModelInferResponse.FromString(answer)

    async def together(self, *requests: v2.ModelInferRequest) -> list[Said]:
        return await asyncio.gather(*map(self.infer, requests))

    async def one_by_one(self, *requests: v2.ModelInferRequest) -> list[Said]:
        return [await self.infer(request) for request in requests]

    async def known(self, *requests: v2.ModelInferRequest) -> Resident:
        """The requests' model, which is fast with them from now on, and was tried with them together."""
        await self.one_by_one(*requests, *requests)
        model_id = requests[0].model_name
        resident = self.driver.resident(model_id)
        for request in requests:
            for count in (1, 2, 4, 8, 16):
                self.driver.in_line.pace(model_id, count * request.ByteSize()).enter()
            await self.together(request, request)
        await until(lambda: all(resident.tried.values()) or not resident.together)
        return resident

    async def runs(self, *requests: v2.ModelInferRequest) -> tuple[list[Said], int]:
        """What they get together, and in how many runs."""
        before = self.driver.batcher.sizes.counts.copy()
        answers = await self.together(*requests)
        return answers, sum(self.driver.batcher.sizes.counts) - sum(before)


@pytest.fixture
async def one(loads: Loads, repository: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[One]:
    mesh, client = Mesh(loads), H2Client()
    pod = One(mesh, client)
    load_model = Driver._load_model

    def load(driver: Driver, action: StartLoad) -> Any:
        pod.driver = driver
        return load_model(driver, action)

    monkeypatch.setattr(Driver, "_load_model", load)
    monkeypatch.setattr(Pace, "measured", lambda pace, elapsed_s: None)  # nothing here depends on the machine's mood
    monkeypatch.setattr(in_line, "TURN_S", 3_600.0)
    try:
        await mesh.start("a", models=str(repository), capacity="256MiB")
        yield pod
        await until(lambda: mesh.pins() == 0)
    finally:
        await client.close()
        await mesh.close()


def request(
    model: str, given: Mapping[str, Tensor], outputs: Sequence[str] = (), **fields: Any
) -> v2.ModelInferRequest:
    """Raw numbers, or strings."""
    message = v2.ModelInferRequest(model_name=model, **fields)
    kinds = {"float32": "FP32", "int64": "INT64", "float64": "FP64", "object": "BYTES"}
    for name, tensor in given.items():
        message.inputs.add(name=name, datatype=kinds[tensor.dtype.name], shape=tensor.shape)
        raw = tensor.tobytes()
        if tensor.dtype.hasobject:
            raw = b"".join(len(item).to_bytes(4, "little") + item for item in tensor.ravel())
        message.raw_input_contents.append(raw)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def rows(count: int, width: int = 8) -> Tensor:
    return rng.standard_normal((count, width)).astype(np.float32)


def answer(said: Said, output: int = 0) -> Tensor:
    assert isinstance(said, v2.ModelInferResponse), said
    found = np.frombuffer(said.raw_output_contents[output], np.float32)
    return found.reshape(list(said.outputs[output].shape))


async def test_requests_of_one_turn_are_one_run(one: One) -> None:
    """Each gets its own rows, in any number of them, and its own id."""
    await one.known(request("mlp", {"x": rows(1)}, id="n"))
    given = [rows(1) for _ in range(7)]
    answers, runs = await one.runs(*(request("mlp", {"x": x}, id=f"{n}") for n, x in enumerate(given)))
    assert runs == 1
    for n, (said, x) in enumerate(zip(answers, given, strict=True)):
        assert isinstance(said, v2.ModelInferResponse)
        assert (said.id, said.model_name) == (f"{n}", "mlp")
        np.testing.assert_allclose(answer(said), mlp(x), rtol=1e-4, atol=1e-5)
    seen = await scrape(one.mesh, "a")
    assert seen["densemesh_batch_size_sum", ""] > seen["densemesh_batch_size_count", ""]
    assert seen["densemesh_hits_total", ""] == seen["densemesh_request_seconds_count", "OK,ModelInfer"] - 1  # a load


async def test_all_kinds_of_requests_in_one_turn(one: One) -> None:
    """Of several models, with other shapes, outputs and forms, right and wrong ones: as one by one."""
    two = {"INPUT0": rows(2, 4), "INPUT1": rows(2, 4)}
    typed = v2.ModelInferRequest(model_name="mlp", id="typed")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 8]).contents.fp32_contents.extend(range(8))
    requests = [
        request("mlp", {"x": rows(1)}),
        request("mlp", {"x": rows(3)}, id="three"),
        request("mlp", {"x": rows(0)}, id="none"),
        request("mlp", {"x": rows(9)}),  # more than its max_batch_size
        request("mlp", {"x": rows(1, 7)}),
        request("mlp", {"x": rows(1)}, ["y"], id="named"),
        request("mlp", {"x": rows(1)}, ["z"]),
        request("mlp", {"y": rows(1)}),
        typed,
        request("addsub", two),
        request("addsub", two, ["OUTPUT1"]),
        request("addsub", two, ["OUTPUT1", "OUTPUT0"], id="turned"),
        request("addsub", {"INPUT0": rows(2, 4), "INPUT1": rows(1, 4)}),
        request("identity_bytes", {"INPUT0": np.array([[b"a", b"", b"\xc3\xa9"]], object)}),
        request("identity_bytes", {"INPUT0": np.array([[b"\xff"]], object)}),
        request("identity_int64", {"INPUT0": np.array([[1, 2], [3, 4]])}),
        request("identity_int64", {"INPUT0": np.array([[1, 2]])[:0]}),
        request("classifier", {"whatever": np.array([[5.0, 3.0]])}),
        request("classifier", {"input-0": np.array([[5.0, 3.0], [6, 2]])}, ["predict_proba", "predict"]),
        request("classifier", {"input-0": np.array([[5.0, np.nan]])}),
        request("nobody", {"x": rows(1)}),
    ]
    for model in ("mlp", "addsub", "identity_bytes", "identity_int64", "classifier"):
        await one.known(*(each for each in requests if each.model_name == model))
    expected = await one.one_by_one(*requests)
    for _ in range(3):
        order = rng.permutation(np.repeat(np.arange(len(requests)), 3))
        answers = await one.together(*(requests[n] for n in order))
        for n, said in zip(order, answers, strict=True):
            alone = expected[n]
            if isinstance(alone, v2.ModelInferResponse) and alone.outputs and alone.outputs[0].datatype == "FP32":
                assert isinstance(said, v2.ModelInferResponse), said
                for output in range(len(alone.raw_output_contents)):
                    np.testing.assert_allclose(answer(said, output), answer(alone, output), rtol=1e-4, atol=1e-5)
                said.ClearField("raw_output_contents")
                alone = v2.ModelInferResponse.FromString(alone.SerializeToString())
                alone.ClearField("raw_output_contents")
            assert said == alone


class Picky:
    """Gives back what it gets; refuses 13, and breaks on 14."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),), "test")
    size_bytes = 1
    waits = 0

    def __init__(self) -> None:
        self.runs: list[int] = []

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        x = inputs["x"]
        self.runs.append(len(x))
        if 13 in x:
            raise InferError("thirteen", bad_input=True)
        if 14 in x:
            raise ZeroDivisionError("fourteen")
        return self.answer(x)

    def answer(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x}

    def unload(self) -> None: ...


class Averaging(Picky):
    def answer(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x - x.mean(axis=0)}


class Fixed(Picky):
    signature = Signature((TensorSpec("x", "FP32", (1, 1)),), (TensorSpec("y", "FP32", (1, 1)),), "test")


async def loaded(one: One, monkeypatch: pytest.MonkeyPatch, model: Picky, key: str = "") -> Picky:
    """The model, registered as `p`."""
    monkeypatch.setattr("loaders.synthetic.SyntheticLoader.load", lambda loader, artifact: model)
    info = mm.ModelInfo(type="synthetic", path="", key=key)
    registration = mm.RegisterModelRequest(modelId="p", modelInfo=info, loadNow=True, sync=True)
    await one.mesh.clients["a"].call("registerModel", registration)
    return model


def number(value: float) -> v2.ModelInferRequest:
    return request("p", {"x": np.array([[value]], np.float32)})


async def test_a_bad_request_fails_alone(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    model = await loaded(one, monkeypatch, Picky())
    await one.known(number(1))
    answers, _ = await one.runs(*map(number, (1, 13, 2, 14, 3)))
    assert [said if isinstance(said, str) else answer(said).item() for said in answers] == [
        1,
        "INVALID_ARGUMENT: thirteen",
        2,
        "INTERNAL: the model broke: ZeroDivisionError: fourteen",
        3,
    ]
    assert 5 in model.runs
    seen = await scrape(one.mesh, "a")
    assert seen["densemesh_request_seconds_count", "INVALID_ARGUMENT,ModelInfer"] == 1
    assert seen["densemesh_request_seconds_count", "INTERNAL,ModelInfer"] == 1


@pytest.mark.parametrize(
    ("model", "key"),
    [(Averaging(), ""), (Fixed(), ""), (Picky(), '{"one_by_one": true}')],
    ids=["mixing", "fixed", "told"],
)
async def test_models_that_are_never_batched(one: One, monkeypatch: pytest.MonkeyPatch, model: Picky, key: str) -> None:
    """Found to mix rows, without a free batch dimension, or told so in its settings."""
    await loaded(one, monkeypatch, model, key)
    resident = await one.known(number(1))
    assert not resident.together
    model.runs.clear()
    answers = await one.together(*map(number, range(9)))
    assert model.runs == [1] * 9
    expected = [0] * 9 if isinstance(model, Averaging) else list(range(9))
    assert [answer(said).item() for said in answers] == expected


async def test_a_bug_leaves_no_request_waiting(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the handler's then."""
    await one.known(request("mlp", {"x": rows(1)}))

    broke: list[Any] = []

    def broken(*arguments: Any) -> None:
        broke.append(arguments)
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(hits, "answered_together", broken)
    x = rows(1)
    for said in await one.together(*[request("mlp", {"x": x})] * 5):
        np.testing.assert_allclose(answer(said), mlp(x), rtol=1e-4, atol=1e-5)
    assert broke


async def test_headers_name_the_model(one: One) -> None:
    """ModelMesh's headers, and those between pods, count for each request."""
    for model in ("mlp", "identity_fp32"):
        key = {"x" if model == "mlp" else "INPUT0": rows(1)}
        await one.known(request(model, key))
    x = rows(1)
    plain = request("identity_fp32", {"INPUT0": x})
    told = await asyncio.gather(
        one.infer(plain),
        one.infer(plain, (("mm-model-id", "mlp"),)),
        one.infer(plain, (("densemesh-hop", "hit"), ("densemesh-model-bin", b"identity_fp32"))),
        one.infer(plain, (("densemesh-hop", "hit"), ("densemesh-model-bin", b"identity_fp64"))),
        one.infer(plain, (("mm-model-id", "identity_fp32"), ("mm-vmodel-id", "v"))),
        one.infer(plain, (("mm-vmodel-id-bin", b"\xff"),)),
    )
    for said in (told[0], told[2]):
        np.testing.assert_array_equal(answer(said), x)
    assert told[1].startswith("INVALID_ARGUMENT: inputs[0] 'INPUT0': not an input") if isinstance(told[1], str) else 0
    assert "is not here" in str(told[3])
    assert str(told[4]).startswith("INVALID_ARGUMENT: headers mm-model-id and mm-vmodel-id")
    assert str(told[5]) == "INVALID_ARGUMENT: header mm-vmodel-id-bin is not UTF-8"


async def test_a_deadline_that_has_passed(one: One) -> None:
    await one.known(request("mlp", {"x": rows(1)}))
    late, right = await asyncio.gather(
        one.infer(request("mlp", {"x": rows(1)}), timeout_s=1e-9), one.infer(request("mlp", {"x": rows(1)}))
    )
    assert str(late).startswith("DEADLINE_EXCEEDED")
    assert answer(right).shape == (1, 3)
