"""The operator as it runs: its own process, kopf on an API server, real pods, real models."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.loaders.object_server import serving
from tests.mesh.models import mlp, write_repository, write_synthetic
from tests.mesh.pods import Loads
from tests.mesh.registry.proxy import Proxy
from tests.operator.manifests import isvc
from tests.operator.rig import ISVC, Rig, fraud, rigged, runtime_manifest

BORN = ("ModelRegistered", "ModelLoaded", "InferenceServiceReady")


@pytest.fixture
async def rig(tmp_path: Path, loads: Loads) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, loads) as running:
        yield running


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Two models that load, and one that does not."""
    names = ("one", "two", "bad")
    for name in names:
        (tmp_path / name).mkdir()
    told: list[dict[str, Any]] = [{}, {}, {"fail": "the file is damaged"}]
    return [str(write_synthetic(tmp_path / name, **settings)) for name, settings in zip(names, told, strict=True)]


async def test_apply_change_fail_roll_back_delete(rig: Rig, places: list[str]) -> None:
    one, two, bad = places
    await rig.start()
    await rig.apply(fraud(one))
    await rig.ready()
    await rig.infer()
    assert await rig.active() == one
    first = rig.get()["status"]["components"]["predictor"]
    assert rig.get()["status"]["url"] == "grpc://mesh:8033"
    await rig.told(*BORN)

    await rig.apply(fraud(two))
    await rig.becomes(lambda: _seen(rig) == 2 and _settled(rig))
    assert await rig.active() == two
    second = rig.get()["status"]["components"]["predictor"]
    assert second["previousRolledoutRevision"] == first["latestRolledoutRevision"]

    await rig.apply(fraud(bad))
    await rig.becomes(lambda: rig.model_status()["transitionStatus"] == "BlockedByFailedLoad")
    assert rig.condition() == ("True", "")
    failure = rig.model_status()["lastFailureInfo"]
    assert failure["reason"] == "ModelLoadFailed"
    assert failure["location"] == "a"
    assert "the file is damaged" in failure["message"]
    await rig.infer()
    assert await rig.active() == two

    await rig.apply(fraud(two))
    await rig.becomes(lambda: _seen(rig) == 4 and _settled(rig))
    assert "lastFailureInfo" not in rig.model_status()
    assert "InferenceServiceNotReady" not in rig.reasons()

    await rig.delete()
    await rig.becomes(lambda: not rig.has())
    assert (await _mesh_status(rig)) == mm.VModelStatusInfo.NOT_FOUND
    assert rig.mesh.pods["a"].engine.view.models == {}


def _seen(rig: Rig) -> int:
    """The generation that the status tells of."""
    return int((rig.get().get("status") or {}).get("observedGeneration") or 0)


def _settled(rig: Rig) -> bool:
    return bool(rig.model_status()["transitionStatus"] == "UpToDate")


async def _mesh_status(rig: Rig) -> int:
    status = await rig.client.call("getVModelStatus", mm.GetVModelStatusRequest(vModelId="news.fraud"))
    return int(status.status)


async def test_a_canary_begins_grows_is_promoted_and_taken_back(rig: Rig, places: list[str]) -> None:
    one, two, _ = places

    def shares() -> list[int]:
        return [entry["percent"] for entry in rig.get()["status"]["components"]["predictor"]["traffic"]]

    await rig.start()
    await rig.apply(fraud(one))
    await rig.ready()
    for percent in (25, 50, 0):
        await rig.apply(fraud(two, predictor={"canaryTrafficPercent": percent}))
        await rig.becomes(lambda: shares() == [percent, 100 - percent] and _settled(rig))  # noqa: B023
        assert await rig.active() == one
    await rig.apply(fraud(two))
    await rig.becomes(lambda: shares() == [100])
    assert await rig.active() == two
    canary = ["CanaryStarted", "CanaryStarted", "CanaryRolledBack", "CanaryPromoted"]
    await rig.becomes(lambda: [reason for reason in rig.reasons() if reason.startswith("Canary")] == canary)


@pytest.mark.parametrize("seed", range(3))
async def test_killed_in_the_middle_of_each_step(rig: Rig, places: list[str], seed: int) -> None:
    """Whenever it dies, its successor ends what was begun: nothing is lost, doubled or left behind."""
    one, two, bad = places
    steps = (fraud(one), fraud(two), fraud(bad), fraud(two, predictor={"minReplicas": 1}))
    await rig.start()
    for step, manifest in enumerate(steps):
        calls = rig.api.total
        generation = (await rig.apply(manifest))["metadata"]["generation"]
        await rig.becomes(lambda: rig.api.total > calls + (step + seed) % 3 or _seen(rig) == generation)  # noqa: B023
        await rig.kill()
        await rig.start()
    await rig.becomes(lambda: _seen(rig) == len(steps) and _settled(rig))
    await rig.ready()
    assert await rig.active() == two
    await rig.delete()
    await rig.kill()
    await rig.start()
    await rig.becomes(lambda: not rig.has())
    assert rig.mesh.pods["a"].engine.view.models == {}


async def test_deleted_while_no_operator_runs(rig: Rig) -> None:
    await rig.start()
    await rig.apply(fraud())
    await rig.ready()
    await rig.kill()
    await rig.delete()
    assert rig.has()
    await rig.start()
    await rig.becomes(lambda: not rig.has())
    assert rig.mesh.pods["a"].engine.view.models == {}


async def test_one_of_two_operators_works_and_the_other_takes_over(rig: Rig) -> None:
    await rig.start("1", lease=True)
    await rig.apply(fraud())
    await rig.ready()
    await rig.start("2", lease=True)
    await rig.apply(fraud(name="other"))
    await rig.ready("other")
    await rig.told(*BORN, name="other")
    await rig.kill("1")
    await rig.apply(fraud(name="third"))
    await rig.ready("third")
    await rig.start("1", lease=True)
    await rig.stop("2")  # which gives the lease up
    await rig.apply(fraud(name="fourth"))
    await rig.ready("fourth")
    for name in ("third", "fourth"):
        await rig.told(*BORN, name=name)


async def test_other_deployment_modes_are_not_touched(rig: Rig) -> None:
    config = {
        "metadata": {"name": "inferenceservice-config"},
        "data": {"deploy": '{"defaultDeploymentMode": "Standard"}'},
    }
    await rig.create("configmaps", config, "kserve")
    modes = {"serverless": "Serverless", "standard": "Standard", "silent": ""}
    made = [
        await rig.apply(fraud(name=name, annotations={"serving.kserve.io/deploymentMode": mode}))
        for name, mode in modes.items()
    ]
    await rig.start()
    await rig.apply(fraud())
    await rig.ready()
    assert [rig.get(name) for name in modes] == made
    assert not any(rig.reasons(name) for name in modes)


async def test_the_default_mode_is_that_of_kserves_configmap(rig: Rig) -> None:
    config = {
        "metadata": {"name": "inferenceservice-config"},
        "data": {"deploy": '{"defaultDeploymentMode": "ModelMesh"}'},
    }
    await rig.create("configmaps", config, "kserve")
    await rig.start()
    await rig.apply(fraud(annotations={"serving.kserve.io/deploymentMode": ""}))
    await rig.ready()
    assert rig.get()["status"]["deploymentMode"] == "ModelMesh"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "format": (fraud(), {"modelFormat": {"name": "pmml"}}, "NoSupportingRuntime", "No runtime found"),
    "runtime": (fraud(), {"runtime": "triton"}, "RuntimeNotRecognized", "Waiting for runtime"),
    "both": (fraud(), {"storage": {"key": "k", "path": "p"}}, "InvalidPredictorSpec", "are exclusive"),
    "scheme": (fraud(), {"storageUri": "ftp://a"}, "InvalidPredictorSpec", "is not supported"),
    "secret": (fraud(), {"storageUri": None, "storage": {"key": "k", "path": "p"}}, "InvalidPredictorSpec", "'k'"),
    "bucket": (fraud(), {"storageUri": "s3://nobody"}, "ModelLoadFailed", ""),
    "schema": (fraud(), {"storage": {"schemaPath": "none.json"}}, "ModelLoadFailed", "none.json"),
    "requires": (fraud(annotations={"densemesh.io/requires": "gpu"}), {}, "InvalidPredictorSpec", "expected labels"),
    "explainer": (fraud(explainer={"art": {}}), {}, "InvalidPredictorSpec", "spec.explainer is not supported"),
    "transformer": (fraud(transformer={}), {}, "InvalidPredictorSpec", "spec.transformer is not supported"),
}


async def test_bad_manifests_are_told_and_cost_little(rig: Rig, places: list[str]) -> None:
    """KServe's reason words, a message that says what to change, and no calls in circles."""
    await rig.create("secrets", {"metadata": {"name": "storage-config"}, "data": {"j": "e30="}})
    await rig.start("1", "--storage-config", "news/storage-config")
    for name, (manifest, fields, _, _) in BAD.items():
        model = manifest["spec"]["predictor"]["model"]
        predictor = {"model": {key: value for key, value in {**model, **fields}.items() if value is not None}}
        spec = {**manifest["spec"], "predictor": predictor}
        if name == "transformer":
            spec["transformer"] = {"containers": [{"name": "t"}]}
        if name == "schema":
            predictor["model"]["storageUri"] = places[0]
        await rig.apply({**manifest, "metadata": {**manifest["metadata"], "name": name}, "spec": spec})
    for name, (_, _, reason, message) in BAD.items():
        await rig.ready(name, "False")
        assert rig.condition("Ready", name) == rig.condition("PredictorReady", name) == ("False", reason), name
        assert message in rig.model_status(name)["lastFailureInfo"]["message"]
        await rig.becomes(lambda: rig.reasons(name).count(reason) == 1)  # noqa: B023
    await rig.apply(fraud(places[0]))
    await rig.ready()
    assert rig.api.calls[("PATCH", "inferenceservices")] <= 4 * (len(BAD) + 1)
    assert rig.api.calls[("GET", "secrets")] == 1
    # What was wrong is put right.
    await rig.create("clusterservingruntimes", runtime_manifest("triton"))
    await rig.becomes(lambda: rig.condition("Ready", "runtime")[0] != "False")


async def test_an_api_server_in_trouble(rig: Rig, places: list[str]) -> None:
    """Conflicts, too many requests, failures, lost watches and compactions: all is as wanted in the end."""
    api = rig.api
    await rig.start()
    api.fault("PATCH", "/inferenceservices/", 409, times=2)
    api.fault("PATCH", "/status", 429, Retry_After="1")
    api.fault("POST", "/events", 500)
    await rig.apply(fraud(places[0]))
    await rig.ready()
    for trouble in (410, 500, 0):
        watches = api.calls[("WATCH", "inferenceservices")]
        if trouble == 410:
            api.objects.compact()
        elif trouble:
            api.fault("WATCH", "/inferenceservices", trouble, times=2)
        api.drop_watches()
        place = places[1] if trouble == 500 else places[0]
        generation = (await rig.apply(fraud(place, predictor={"minReplicas": trouble % 3})))["metadata"]["generation"]
        await rig.becomes(lambda: _seen(rig) == generation and _settled(rig))  # noqa: B023
        assert await rig.active() == place
        assert api.calls[("WATCH", "inferenceservices")] > watches
    assert [fault.times for fault in api.faults] == [0] * len(api.faults)


async def test_a_conflicting_writer(rig: Rig) -> None:
    """KServe's controller writes the same status: neither's members are lost."""
    await rig.start()
    made = await rig.apply(fraud())
    theirs = {"type": "TransformerReady", "status": "True"}
    await rig.becomes(lambda: bool(rig.get().get("status")))
    told = rig.get()["status"].get("conditions", [])
    body = {"status": {"conditions": [*told, theirs], "components": {"transformer": {"url": "x"}}}}
    rig.api.objects.patch(ISVC, "news", "fraud", "merge-patch", body, "status")
    await rig.api.notify()
    await rig.ready()
    status = rig.get()["status"]
    assert theirs in status["conditions"]
    assert status["components"]["transformer"] == {"url": "x"}
    assert rig.get()["metadata"]["uid"] == made["metadata"]["uid"]


async def test_a_name_that_is_taken(rig: Rig) -> None:
    """Another owner's vmodel is not taken over."""
    await rig.client.call(
        "setVModel",
        mm.SetVModelRequest(
            vModelId="news.fraud", targetModelId="m", owner="them", modelInfo=mm.ModelInfo(type="synthetic")
        ),
    )
    await rig.start()
    await rig.apply(fraud())
    await rig.ready(status="False")
    assert "densemesh.io/model-name" in rig.model_status()["lastFailureInfo"]["message"]
    await rig.apply(fraud(annotations={"densemesh.io/model-name": "fraud-2"}))
    await rig.ready()
    await rig.infer("fraud-2")


async def test_a_mesh_that_comes_late(rig: Rig) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    await rig.start("1", "--mesh", f"127.0.0.1:{port}")
    await rig.apply(fraud())
    await rig.ready(status="Unknown")
    assert rig.condition("IngressReady") == ("Unknown", "MeshUnreachable")
    async with Proxy(int(rig.target.rpartition(":")[2]), port):
        await rig.ready()
        await rig.stop()


async def test_a_model_of_a_bucket(tmp_path: Path, loads: Loads) -> None:
    """A real model behind a storage key, as ModelMesh's users have them."""
    write_repository(tmp_path / "models")
    with serving() as server:
        server.objects["models/mlp/model.onnx"] = (tmp_path / "models" / "mlp" / "model.onnx").read_bytes()
        key = {"type": "s3", "access_key_id": "a", "secret_access_key": "hidden", "endpoint_url": server.url}
        (tmp_path / "storage.json").write_text(json.dumps({"minio": key}))
        settings = {"storage_config": str(tmp_path / "storage.json"), "cache_dir": str(tmp_path / "cache")}
        async with rigged(tmp_path, loads, **settings) as rig:
            await rig.start()
            storage = {"key": "minio", "path": "models/mlp", "parameters": {"bucket": "b"}}
            model = {"modelFormat": {"name": "onnx"}, "storage": storage}
            await rig.apply(isvc({"model": model}, finalizers=()))
            await rig.ready()
            x = np.ones((2, 8), np.float32)
            request = v2.ModelInferRequest(model_name="news.fraud", raw_input_contents=[x.tobytes()])
            signature = await rig.client.call("ModelMetadata", v2.ModelMetadataRequest(name="news.fraud"))
            request.inputs.add(name=signature.inputs[0].name, datatype="FP32", shape=x.shape)
            answer = await rig.client.call("ModelInfer", request)
            found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
            np.testing.assert_allclose(found, mlp(x), rtol=1e-4)


async def test_names_without_namespaces(rig: Rig) -> None:
    """One namespace: clients say the InferenceService's name, as they did to ModelMesh."""
    await rig.start("1", "--namespace", "news")
    await rig.apply(fraud())
    await rig.apply(isvc(fraud()["spec"]["predictor"], name="elsewhere", namespace="sports", finalizers=()))
    await rig.ready()
    await rig.infer("fraud")
    assert rig.get("elsewhere", "sports").get("status") is None
    await asyncio.gather(*(rig.infer("fraud") for _ in range(3)))
