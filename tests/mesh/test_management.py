"""`mmesh.ModelMesh`, the calls for models, on both registries. Authority: ModelMesh's
model-mesh.proto and its comments."""

from __future__ import annotations

import time
from typing import Any

import pytest

from loaders.base import LoaderError
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, until

Status = mm.ModelStatusInfo
HOUR_MS = 3_600_000


def registration(model_id: str = "m", *, path: str = "", key: str = "", **how: Any) -> mm.RegisterModelRequest:
    return mm.RegisterModelRequest(
        modelId=model_id, modelInfo=mm.ModelInfo(type="synthetic", path=path, key=key), **how
    )


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def test_registering_again_alike_changes_nothing(mesh: Mesh, a: Client) -> None:
    for _ in range(2):
        assert (await a.call("registerModel", registration())).status == Status.NOT_LOADED
    before = mesh.pods["a"].engine.view.models["m"].revision
    await a.call("registerModel", registration(lastUsedTime=5))
    assert mesh.pods["a"].engine.view.models["m"].revision == before


@pytest.mark.parametrize("other", [{"path": "/elsewhere"}, {"key": '{"parameters":{"infer_ms":1}}'}])
async def test_registering_with_other_attributes_already_exists(a: Client, other: dict[str, str]) -> None:
    await a.call("registerModel", registration())
    status, message = await a.refusal("registerModel", registration(**other))
    assert status == "ALREADY_EXISTS"
    assert "'m'" in message


@pytest.mark.parametrize(
    ("asked_ms", "load_now", "age_ms"),
    [(0, False, 6 * HOUR_MS), (0, True, HOUR_MS), (1_000, False, None), ((1 << 64) - 1, False, 0)],
    ids=["default", "default with loadNow", "as asked", "a future time counts as now"],
)
async def test_last_used_time(mesh: Mesh, a: Client, asked_ms: int, load_now: bool, age_ms: int | None) -> None:
    before = now_ms()
    await a.call("registerModel", registration(lastUsedTime=asked_ms, loadNow=load_now))
    found = mesh.pods["a"].engine.view.models["m"].last_used_ms
    if age_ms is None:
        assert found == asked_ms
    else:
        assert before - age_ms <= found <= now_ms() - age_ms


async def test_load_now_starts_a_load_and_sync_waits_for_it(mesh: Mesh, a: Client, loads: Loads) -> None:
    gate = loads.hold("m")
    assert (await a.call("registerModel", registration(loadNow=True))).status in (
        Status.NOT_LOADED,
        Status.LOADING,
    )
    await loads.begun()
    assert (await mesh.status("m")).status == Status.LOADING
    gate.set()
    told = await a.call("registerModel", registration(loadNow=True, sync=True))
    assert told.status == Status.LOADED
    assert [(copy.location, copy.copyStatus) for copy in told.modelCopyInfos] == [("a", Status.LOADED)]
    assert abs(told.modelCopyInfos[0].time - now_ms()) < 60_000
    assert loads.count("m") == 1


async def test_sync_without_load_now_does_not_load(a: Client) -> None:
    assert (await a.call("registerModel", registration(sync=True))).status == Status.NOT_LOADED


async def test_a_failed_load_is_a_status_with_the_loaders_reason(mesh: Mesh, a: Client, loads: Loads) -> None:
    loads.failures["a"] = LoaderError("no such thing")
    told = await a.call("registerModel", registration(loadNow=True, sync=True))
    assert told.status == Status.LOADING_FAILED
    assert "no such thing" in told.errors[0]
    told = await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="m", sync=True))
    assert (told.status, loads.count("m")) == (Status.LOADING_FAILED, 1)
    assert "no such thing" in told.errors[0]
    told = await mesh.status("m")
    assert (told.status, told.modelCopyInfos[0].copyStatus) == (Status.LOADING_FAILED, Status.LOADING_FAILED)


async def test_the_status_of_no_model_is_not_found(mesh: Mesh) -> None:
    assert (await mesh.status("nobody")).status == Status.NOT_FOUND


async def test_unregister_unloads_and_is_a_no_op_for_no_model(mesh: Mesh, a: Client) -> None:
    await mesh.register("m", load=True)
    for _ in range(2):
        await mesh.unregister("m")
        assert (await mesh.status("m")).status == Status.NOT_FOUND
    assert (await a.refusal("ensureLoaded", mm.EnsureLoadedRequest(modelId="m", sync=True)))[0] == "NOT_FOUND"
    await until(lambda: not mesh.pods["a"].engine.cache.copies)


async def test_a_model_that_a_vmodel_points_to_is_not_unregistered(mesh: Mesh, a: Client) -> None:
    await mesh.register("m")
    await a.call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="m"))
    status, message = await a.refusal("unregisterModel", mm.UnregisterModelRequest(modelId="m"))
    assert (status, "has referents" in message) == ("FAILED_PRECONDITION", True)
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v"))
    await mesh.unregister("m")


async def test_ensure_loaded_loads_and_touches(mesh: Mesh, a: Client, loads: Loads) -> None:
    await mesh.register("m")
    await mesh.register("n", load=True)
    policy = mesh.pods["a"].engine.cache.policy
    assert (await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="m", sync=True))).status == Status.LOADED
    assert list(policy.coldest(0)) == ["n", "m"]  # n was used an hour ago, m now
    await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="n", sync=True))
    assert list(policy.coldest(0)) == ["m", "n"]
    assert [model for _, model in loads.seen] == ["n", "m"]


async def test_ensure_loaded_without_sync_answers_at_once(mesh: Mesh, a: Client, loads: Loads) -> None:
    await mesh.register("m")
    gate = loads.hold("m")
    assert (await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="m"))).status != Status.LOADED
    await loads.begun()
    gate.set()
    told = await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="m", sync=True))
    assert (told.status, loads.count("m")) == (Status.LOADED, 1)


async def test_ensure_loaded_with_a_time_long_ago_pushes_nobody_out(mesh: Mesh, a: Client) -> None:
    await mesh.register("old")
    await mesh.register("m", load=True)
    await a.call("ensureLoaded", mm.EnsureLoadedRequest(modelId="old", lastUsedTime=1_000, sync=True))
    assert list(mesh.pods["a"].engine.cache.policy.coldest(0)) == ["old", "m"]


@pytest.mark.parametrize("kind", ["mt:synthetic", "mt:synthetic:1", "mt:synthetic|pv:grpc-v2"])
async def test_the_controllers_model_types_are_understood(a: Client, kind: str) -> None:
    # ModelMesh's controller: ModelInfo.type as the ModelMesh controller writes it
    info = mm.ModelInfo(type=kind, path="", key='{"disk_size_bytes":4,"storage_key":"s"}')
    request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
    assert (await a.call("registerModel", request)).status == Status.LOADED


async def test_a_type_that_names_a_runtime_takes_the_format_from_the_key(a: Client) -> None:
    # ModelMesh's controller: "rt:<runtime>" with the model's type in the key
    key = '{"model_type":{"name":"synthetic","version":"1"}}'
    request = mm.RegisterModelRequest(modelId="m", modelInfo=mm.ModelInfo(type="rt:triton-2.x", key=key), loadNow=True)
    request.sync = True
    assert (await a.call("registerModel", request)).status == Status.LOADED
    request.modelInfo.key = ""
    code, says = await a.refusal("registerModel", mm.RegisterModelRequest(modelId="n", modelInfo=request.modelInfo))
    assert code == "INVALID_ARGUMENT"
    assert "modelInfo.type 'rt:triton-2.x'" in says


async def test_the_state_lists_pods_models_and_fates(mesh: Mesh, a: Client) -> None:
    await mesh.register("m", load=True, size_bytes=1000)
    await mesh.register("n")
    await mesh.infer("m")
    state = await a.call("GetState", mm.GetStateRequest(models=True))
    (pod,) = state.pods
    assert (state.pod_id, pod.pod_id, pod.models_loaded, pod.used_bytes) == ("a", "a", 1, 1000)
    assert [(model.model_id, model.status.status) for model in state.models] == [
        ("m", Status.LOADED),
        ("n", Status.NOT_LOADED),
    ]
    assert (state.models_registered, state.fates.loads, state.fates.hits >= 1) == (2, 1, True)
