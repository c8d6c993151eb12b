"""Models of a server beside the pod, over a real pod, a real server process and a real V2 client. Authority:
ModelMesh's runtime SPI (mmesh.ModelRuntime) and what its sidecar did about servers' quirks; issue 5, `remote`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from mesh.pod import CannotStart
from mesh.runtime import runtime as under_test
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.fake_runtime import FakeRuntime
from tests.mesh.pods import Loads, Mesh, request_for, running, until
from tests.mesh.test_metrics import scrape

Status = mm.ModelStatusInfo
X = np.array([[1, 2, 3]], np.float32)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[FakeRuntime]:
    with FakeRuntime(tmp_path) as started:
        yield started


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_POLL_S", 0.02)


def settings(runtime: FakeRuntime, **more: Any) -> dict[str, Any]:
    return {"runtime": f"fake={runtime.address}", "runtime_formats": "tensorflow,pmml", **more}


async def register(
    mesh: Mesh, model_id: str, kind: str = "mt:tensorflow:1", path: str = "/m", pod_id: str = "a", **parameters: Any
) -> mm.ModelStatusInfo:
    key = json.dumps({"parameters": parameters})
    info = mm.ModelInfo(type=kind, path=path, key=key)
    request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
    status = await mesh.clients[pod_id].call("registerModel", request)
    assert isinstance(status, mm.ModelStatusInfo)
    return status


async def infer(mesh: Mesh, model_id: str, pod_id: str = "a", **how: Any) -> Any:
    request = v2.ModelInferRequest(model_name=model_id, id="7", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=X.shape)
    answer = await mesh.clients[pod_id].call("ModelInfer", request, **how)
    assert (answer.model_name, answer.id) == (model_id, "7")
    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(X.shape)


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_a_model_is_loaded_serves_is_evicted_and_comes_back(runtime: FakeRuntime, frontend: str) -> None:
    async with running("a", Loads(), frontend=frontend, **settings(runtime, capacity="2500B")) as mesh:
        assert (await register(mesh, "m", scale=2, size_bytes=2000)).status == Status.LOADED
        np.testing.assert_array_equal(await infer(mesh, "m"), 2 * X)
        assert mesh.pods["a"].engine.cache.copies["m"].size_bytes == 2000
        assert (await register(mesh, "n", scale=3, size_bytes=2000)).status == Status.LOADED
        assert mesh.holders("m") == []
        np.testing.assert_array_equal(await infer(mesh, "m"), 2 * X)
        told = await mesh.clients["a"].call("ModelMetadata", v2.ModelMetadataRequest(name="m"))
        assert (told.platform, told.inputs[0].name, told.outputs[0].datatype) == ("fake", "INPUT0", "FP32")
    changes = [" ".join(call.split()[:2]) for call in runtime.calls if "load" in call]
    assert changes == ["loadModel m", "unloadModel m", "loadModel n", "unloadModel n", "loadModel m", "unloadModel m"]


async def test_the_server_is_told_what_its_adapters_expect(runtime: FakeRuntime, tmp_path: Path) -> None:
    """ModelMesh's puller: a local path, the key without the store and with the bytes on disk, the type as it came."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "weights").write_bytes(bytes(800))
    async with running("a", Loads(), **settings(runtime)) as mesh:
        await register(mesh, "m", path=str(tmp_path / "saved"))
        (told,) = [call.split(maxsplit=4) for call in runtime.calls if call.startswith("loadModel")]
        assert told[1:4] == ["m", "mt:tensorflow:1", str(tmp_path / "saved")]
        assert json.loads(told[4]) == {"parameters": {}, "model_type": {"name": "tensorflow"}, "disk_size_bytes": 800}


async def test_a_server_that_fetches_is_told_what_was_registered(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), runtime_pulls=True, **settings(runtime)) as mesh:
        key = {"storage_key": "minio", "storage_params": {"bucket": "b"}, "model_type": {"name": "x"}, "parameters": {}}
        info = mm.ModelInfo(type="rt:fake", path="in/bucket", key=json.dumps(key))
        request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
        assert (await mesh.clients["a"].call("registerModel", request)).status == Status.LOADED
        (told,) = [call.split(maxsplit=4) for call in runtime.calls if call.startswith("loadModel")]
        assert told[1:4] == ["m", "rt:fake", "in/bucket"]
        assert json.loads(told[4]) == key


@pytest.mark.parametrize("predicts", [True, False])
async def test_sizes_are_predicted_and_then_told(tmp_path: Path, predicts: bool) -> None:
    """predictModelSize is optional, and asked no more if it is UNIMPLEMENTED; modelSize is for loads that tell none."""
    with FakeRuntime(tmp_path, predicts=predicts) as runtime:
        async with running("a", Loads(), **settings(runtime)) as mesh:
            await register(mesh, "m", size_bytes=700, size_later=True)
            await register(mesh, "n", size_bytes=800)
            copies = mesh.pods["a"].engine.cache.copies
            assert (copies["m"].size_bytes, copies["n"].size_bytes) == (700, 800)
            assert runtime.count("predictModelSize") == (2 if predicts else 1)


async def test_the_pods_limits_are_the_servers(tmp_path: Path) -> None:
    with FakeRuntime(tmp_path, capacity_bytes=4096, max_loading=1, load_timeout_ms=200_000) as runtime:
        async with running("a", Loads(), labels="gpu=h200", **settings(runtime)) as mesh:
            limits = mesh.pods["a"].engine.limits
            assert (limits.capacity_bytes, limits.load_slots, limits.load_timeout_ms) == (4096, 1, 200_000)
            assert limits.labels == "gpu=h200,runtime=fake,runtime.tensorflow=yes,runtime.pmml=yes"
            status = await register(mesh, "m", size_bytes=5000)
            assert "needs 5000 bytes" in status.errors[0]


async def test_a_pod_waits_for_its_server(tmp_path: Path) -> None:
    runtime = FakeRuntime(tmp_path)
    starting = asyncio.create_task(_run(tmp_path, settings(runtime)))
    try:
        await asyncio.sleep(0.1)  # so that it meets no server at first
        await asyncio.to_thread(runtime.start, starting=2)
        await starting
        assert runtime.count("runtimeStatus") == 3
    finally:
        runtime.kill()


async def _run(tmp_path: Path, how: dict[str, Any]) -> None:
    async with running("a", Loads(), **how) as mesh:
        assert (await register(mesh, "m")).status == Status.LOADED


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"starting": 10_000}, "was not ready in 0 s"),
        ({"methods": ["tensorflow.serving.PredictionService/Predict"]}, "does not serve V2 gRPC"),
    ],
)
async def test_a_server_that_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(under_test, "START_S", 0.3)
    with FakeRuntime(tmp_path, **how) as runtime, pytest.raises(CannotStart, match=says):
        async with running("a", Loads(), **settings(runtime)):
            pass


@pytest.mark.parametrize(
    ("code", "may_pass", "unloads"),
    [
        ("INVALID_ARGUMENT", False, 0),
        ("FAILED_PRECONDITION", False, 0),
        ("INTERNAL", False, 1),
        ("UNAVAILABLE", True, 1),
        ("NOT_FOUND", True, 1),
    ],
)
async def test_a_failed_load_is_told_in_the_servers_words(
    runtime: FakeRuntime, code: str, may_pass: bool, unloads: int
) -> None:
    """SPI: after INVALID_ARGUMENT and FAILED_PRECONDITION nothing was attempted; after others unloadModel follows."""
    async with running("a", Loads(), **settings(runtime)) as mesh:
        status = await register(mesh, "m", fail_load=code)
        assert status.status == Status.LOADING_FAILED
        assert "model server fake: " in status.errors[0]
        assert "no m today" in status.errors[0]
        assert runtime.count("unloadModel m") == unloads
        answered, _ = await mesh.clients["a"].refusal("ModelInfer", request_for("m"))
        assert answered == ("UNAVAILABLE" if may_pass else "FAILED_PRECONDITION")


async def test_a_load_ends_at_the_servers_own_limit(tmp_path: Path) -> None:
    """modelLoadingTimeoutMs; the load is cancelled, and unloadModel follows."""
    with FakeRuntime(tmp_path, load_timeout_ms=200) as runtime:
        async with running("a", Loads(), **settings(runtime)) as mesh:
            status = await register(mesh, "m", load_s=60)
            assert status.status == Status.LOADING_FAILED
            assert "deadline" in status.errors[0].lower()
            await until(lambda: runtime.calls[-2:] == ["cancelled m", "unloadModel m"])


async def test_a_pod_that_stops_ends_its_loads(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), **settings(runtime)) as mesh:
        info = mm.ModelInfo(type="pmml", path="/m", key='{"parameters": {"load_s": 60}}')
        await mesh.clients["a"].call(
            "registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True)
        )
        await until(lambda: runtime.count("loadModel m") == 1)
        await mesh.stop("a")
        await until(lambda: sorted(runtime.calls[-2:]) == ["cancelled m", "unloadModel m"])


@pytest.mark.parametrize("quirk", ["NOT_FOUND", "triton", "mlserver"])
async def test_a_model_that_the_server_forgot_is_loaded_again_within_the_request(tmp_path: Path, quirk: str) -> None:
    """SidecarModelMesh: each server has its own way to say that a model is not there."""
    with FakeRuntime(tmp_path, quirk=quirk) as runtime:
        async with running("a", Loads(), **settings(runtime)) as mesh:
            await register(mesh, "m", scale=2)
            runtime.tell(forget="m")
            np.testing.assert_array_equal(await infer(mesh, "m"), 2 * X)
            assert runtime.count("loadModel m") == 2


@pytest.mark.parametrize(
    "code",
    ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNIMPLEMENTED", "ABORTED"],
)
async def test_what_the_server_answers_is_the_clients_to_hear(runtime: FakeRuntime, code: str) -> None:
    """Its own code and words; a model that it has is not loaded again for them."""
    async with running("a", Loads(), **settings(runtime)) as mesh:
        await mesh.start("b")
        await mesh.together()
        await register(mesh, "m", fail_infer=code)
        await mesh.seen_by_all("m", "a")
        for pod_id in "ab":
            answered, said = await mesh.clients[pod_id].refusal("ModelInfer", request_for("m"))
            assert answered == code
            assert "the server's own words: not found" in said
        assert runtime.count("loadModel m") == 1
        assert mesh.holders("m") == ["a"]


@pytest.mark.parametrize("frontend", ["h2", "grpcio"])
async def test_a_server_that_dies_takes_its_models_and_not_the_pod(runtime: FakeRuntime, frontend: str) -> None:
    async with running("a", Loads(), frontend=frontend, **settings(runtime)) as mesh:
        for model_id in ("m", "n"):
            await register(mesh, model_id, scale=2)
        assert (await mesh.register("own", load=True)).status == Status.LOADED
        assert (await scrape(mesh, "a"))["densemesh_model_server_up", "fake"] == 1
        runtime.kill()
        answered, said = await mesh.clients["a"].refusal("ModelInfer", request_for("m"))
        assert answered == "UNAVAILABLE"
        assert "model server fake" in said
        await until(lambda: not mesh.holders("n") and not mesh.holders("m"))
        assert await mesh.infer("own") == "a"
        status = await register(mesh, "o")
        assert "does not answer" in status.errors[0]
        assert (await scrape(mesh, "a"))["densemesh_model_server_up", "fake"] == 0
        await asyncio.to_thread(runtime.start)
        await until(lambda: runtime.count("runtimeStatus") >= 2)
        await mesh.unregister("m")  # with its failure
        assert (await register(mesh, "m", scale=2)).status == Status.LOADED
        np.testing.assert_array_equal(await infer(mesh, "m"), 2 * X)


async def test_only_the_pod_with_the_server_loads_its_models(runtime: FakeRuntime) -> None:
    async with running("b", Loads()) as mesh:
        info = mm.ModelInfo(type="pmml", path="/m")
        refused = await mesh.clients["b"].refusal("registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=info))
        assert refused[0] == "INVALID_ARGUMENT"
        assert "what a pod's --runtime has" in refused[1]
        await mesh.start("a", **settings(runtime))
        await mesh.together()
        for model_id in ("m", "n", "o", "p"):
            assert (await register(mesh, model_id, pod_id="b", scale=2)).status == Status.LOADED
            assert mesh.holders(model_id) == ["a"]
            np.testing.assert_array_equal(await infer(mesh, model_id, "b"), 2 * X)
        runtime.tell(forget="m")
        np.testing.assert_array_equal(await infer(mesh, "m", "b"), 2 * X)
        await mesh.stop("a")
        await until(lambda: "a" not in mesh.pods["b"].engine.view.pods)
        again = mm.RegisterModelRequest(
            modelId="m", modelInfo=mm.ModelInfo(type="mt:tensorflow:1", path="/m", key='{"parameters": {"scale": 2}}')
        )
        await mesh.clients["b"].call("registerModel", again)  # it is registered alike, and waits for such a pod
        status = await mesh.status("m", "b")
        assert "no pod has the labels runtime.tensorflow=yes" in status.errors[0]


async def test_deadlines_and_cancellations_reach_the_server(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), **settings(runtime)) as mesh:
        await register(mesh, "m", infer_s=60)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await infer(mesh, "m", timeout_s=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: runtime.count("infer cancelled") == 1)
        going = mesh.clients["a"].start("ModelInfer", request_for("m"))
        await until(lambda: mesh.pins() > 0)
        await asyncio.sleep(0.05)  # it is on its way to the server
        going.cancel()
        await until(lambda: runtime.count("infer cancelled") == 2)


async def test_a_model_gets_no_more_requests_at_once_than_it_takes(tmp_path: Path) -> None:
    """limitModelConcurrency, maxConcurrency; at most 16 or 8 times as many wait (ModelMesh)."""
    with FakeRuntime(tmp_path, limits=True) as runtime:
        async with running("a", Loads(), **settings(runtime)) as mesh:
            await register(mesh, "m", infer_s=0.02, max_concurrency=2)
            start = mesh.clients["a"].start
            answers = await asyncio.gather(*(start("ModelInfer", request_for("m")) for _ in range(16)))
            assert max(answer.parameters["most"].int64_param for answer in answers) == 2
            results = await asyncio.gather(
                *(start("ModelInfer", request_for("m")) for _ in range(30)), return_exceptions=True
            )
            refused = [each.code() for each in results if isinstance(each, grpc.aio.AioRpcError)]
            assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_what_is_not_unloaded_is_tried_again_before_it_is_loaded(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "_UNLOAD_PAUSES_S", (0.0, 0.01))
    monkeypatch.setattr(under_test, "_AGAIN_S", 3600.0)
    unload = v2.RepositoryModelUnloadRequest(model_name="m")
    async with running("a", Loads(), **settings(runtime)) as mesh:
        await register(mesh, "m")
        runtime.tell(freeze=True)
        await mesh.clients["a"].call("RepositoryModelUnload", unload)
        assert runtime.count("unloadModel m") == 2
        assert (await register(mesh, "m")).status == Status.LOADED
        tried = [call.split()[0] for call in runtime.calls[-4:]]
        assert tried == ["unloadModel", "predictModelSize", "unloadModel", "loadModel"]
        await mesh.clients["a"].call("RepositoryModelUnload", unload)
        runtime.tell(freeze=False)
        monkeypatch.setattr(under_test, "_AGAIN_S", 0.0)
        tries = runtime.count("unloadModel m")
        await until(lambda: runtime.count("unloadModel m") == tries + 1)


async def test_the_signature_is_the_servers_or_what_is_declared(tmp_path: Path) -> None:
    with FakeRuntime(tmp_path, metadata=False) as runtime:
        async with running("a", Loads(), **settings(runtime)) as mesh:
            specs = [{"name": name, "datatype": "FP32", "shape": [-1, 3]} for name in "xyz"]
            key = {"inputs": specs[:2], "outputs": specs[2:], "warmup": 2}
            info = mm.ModelInfo(type="pmml", path="/m", key=json.dumps(key))
            request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
            assert (await mesh.clients["a"].call("registerModel", request)).status == Status.LOADED
            told = await mesh.clients["a"].call("ModelMetadata", v2.ModelMetadataRequest(name="m"))
            assert [each.name for each in (*told.inputs, *told.outputs)] == ["x", "y", "z"]


async def test_a_declaration_that_contradicts_the_server_fails_the_load(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), **settings(runtime)) as mesh:
        key = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]}
        info = mm.ModelInfo(type="pmml", path="/m", key=json.dumps(key))
        request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
        status = await mesh.clients["a"].call("registerModel", request)
        assert "declared input x FP32 [-1, 3] is none of the model's" in status.errors[0]
        assert runtime.calls[-1] == "unloadModel m"


async def test_an_answer_that_is_none_is_the_servers_fault(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), **settings(runtime)) as mesh:
        await register(mesh, "m", garbage=True)
        answered, said = await mesh.clients["a"].refusal("ModelInfer", request_for("m"))
        assert (answered, "malformed message" in said) == ("INTERNAL", True)


async def test_versions_are_the_registrations(runtime: FakeRuntime) -> None:
    async with running("a", Loads(), **settings(runtime)) as mesh:
        info = mm.ModelInfo(type="pmml", path="/m", key='{"version": "3", "parameters": {}}')
        await mesh.clients["a"].call("registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=info))
        request = request_for("m")
        request.model_version = "3"
        assert (await mesh.clients["a"].call("ModelInfer", request)).model_version == "3"
        request.model_version = "1"
        assert (await mesh.clients["a"].refusal("ModelInfer", request))[0] == "NOT_FOUND"
