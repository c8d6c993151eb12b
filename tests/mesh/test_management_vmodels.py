"""`mmesh.ModelMesh`, the calls for vmodels, on both registries. Authority: ModelMesh's
model-mesh.proto and VModelManager.java."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc.aio
import pytest

from loaders.base import LoaderError
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, request_for, until

Status = mm.ModelStatusInfo
VStatus = mm.VModelStatusInfo


def info(version: str) -> mm.ModelInfo:
    """A synthetic model whose answers carry this version."""
    return mm.ModelInfo(type="synthetic", key=json.dumps({"version": version}))


async def register(a: Client, *model_ids: str, load: bool = False) -> None:
    """Models whose version is their id."""
    for model_id in model_ids:
        request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info(model_id), loadNow=load, sync=load)
        await a.call("registerModel", request)


async def set_v(a: Client, target: str, **how: Any) -> Any:
    return await a.call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId=target, **how))


async def refusal(a: Client, target: str, **how: Any) -> str:
    status, message = await a.refusal("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId=target, **how))
    assert message
    return status


async def v_status(a: Client, owner: str = "") -> Any:
    return await a.call("getVModelStatus", mm.GetVModelStatusRequest(vModelId="v", owner=owner))


async def served_by(a: Client) -> str:
    """The model that answers a request for the vmodel."""
    answer = await a.call("ModelInfer", request_for("v"))
    assert answer.model_name == "v"
    return str(answer.model_version)


async def has(a: Client, model_id: str) -> bool:
    status = await a.call("getModelStatus", mm.GetStatusRequest(modelId=model_id))
    return bool(status.status != Status.NOT_FOUND)


async def test_a_new_vmodel_is_active_at_once_loaded_or_not(a: Client) -> None:
    await register(a, "m")
    told = await set_v(a, "m")
    assert (told.status, told.activeModelId, told.targetModelId) == (VStatus.DEFINED, "m", "m")
    assert (told.activeModelStatus.status, told.HasField("targetModelStatus")) == (Status.NOT_LOADED, False)
    assert await v_status(a) == told
    assert await served_by(a) == "m"


async def test_no_vmodel_and_no_model(a: Client) -> None:
    assert (await v_status(a)).status == VStatus.NOT_FOUND
    assert await refusal(a, "nobody") == "NOT_FOUND"
    await register(a, "m")
    assert await refusal(a, "m", updateOnly=True) == "NOT_FOUND"
    assert (await v_status(a)).status == VStatus.NOT_FOUND


async def test_model_info_registers_the_target_in_the_same_step(a: Client) -> None:
    for _ in range(2):
        assert (await set_v(a, "m", modelInfo=info("m"))).status == VStatus.DEFINED
    assert await served_by(a) == "m"
    assert await refusal(a, "m", modelInfo=info("another")) == "ALREADY_EXISTS"
    request = mm.SetVModelRequest(vModelId="v", targetModelId="bad", modelInfo=mm.ModelInfo(type="gguf"))
    assert (await a.refusal("setVModel", request))[0] == "INVALID_ARGUMENT"


async def test_expected_target(a: Client) -> None:
    await register(a, "m", "n")
    assert await refusal(a, "m", expectedTargetModelId="n") == "FAILED_PRECONDITION"
    await set_v(a, "m", expectedTargetModelId="m")  # equal to the target: when absent ...
    await set_v(a, "m", expectedTargetModelId="m")  # ... or the same already
    assert await refusal(a, "n", expectedTargetModelId="n") == "FAILED_PRECONDITION"
    assert (await set_v(a, "n", expectedTargetModelId="m")).targetModelId == "n"


async def test_an_owners_vmodel_is_nobody_elses(a: Client) -> None:
    await register(a, "m", "n")
    assert (await set_v(a, "m", owner="o")).owner == "o"
    assert await refusal(a, "n", owner="p") == "ALREADY_EXISTS"
    assert (await v_status(a, "p")).status == VStatus.NOT_FOUND
    assert (await v_status(a, "o")).activeModelId == "m"
    assert (await set_v(a, "n", owner="o")).targetModelId == "n"
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v", owner="p"))  # silently not
    assert (await v_status(a, "o")).status == VStatus.DEFINED
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v", owner="o"))
    assert (await v_status(a, "o")).status == VStatus.NOT_FOUND


async def test_a_vmodel_moves_at_once_when_its_active_model_is_not_loaded(a: Client) -> None:
    await register(a, "m", "n")
    await set_v(a, "m")
    assert (await set_v(a, "n")).activeModelId == "n"


async def test_a_vmodel_moves_at_once_when_the_target_is_loaded_too(a: Client) -> None:
    await register(a, "m", "n", load=True)
    await set_v(a, "m")
    assert (await set_v(a, "n")).activeModelId == "n"


async def test_force_moves_at_once(a: Client) -> None:
    await register(a, "m", load=True)
    await register(a, "n")
    await set_v(a, "m")
    assert (await set_v(a, "n", force=True)).activeModelId == "n"


async def test_the_old_model_serves_until_the_new_one_is_loaded(mesh: Mesh, a: Client, loads: Loads) -> None:
    gate = loads.hold("n")
    await register(a, "m", load=True)
    await register(a, "n")
    await set_v(a, "m")
    await loads.begun()
    told = await set_v(a, "n")
    assert (told.status, told.activeModelId, told.targetModelId) == (VStatus.TRANSITIONING, "m", "n")
    await loads.begun()  # by the leader
    assert (await v_status(a)).targetModelStatus.status == Status.LOADING
    assert await served_by(a) == "m"
    waiting = a.start("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="n", sync=True))
    gate.set()
    told = await waiting
    assert (told.status, told.activeModelId) == (VStatus.DEFINED, "n")
    assert await served_by(a) == "n"
    assert loads.count("n") == 1


async def test_load_now_keeps_an_active_model_that_is_not_loaded_until_the_target_is(a: Client, loads: Loads) -> None:
    gate = loads.hold("n")
    await register(a, "m", "n")
    await set_v(a, "m")
    assert (await set_v(a, "n", loadNow=True)).activeModelId == "m"
    await loads.begun()
    gate.set()
    assert (await set_v(a, "n", loadNow=True, sync=True)).activeModelId == "n"


async def test_load_now_and_sync_of_a_new_vmodel_wait_for_the_load(a: Client) -> None:
    told = await set_v(a, "m", modelInfo=info("m"), loadNow=True, sync=True)
    assert (told.status, told.activeModelStatus.status) == (VStatus.DEFINED, Status.LOADED)


async def test_a_target_that_cannot_be_loaded_blocks_and_the_old_model_serves(a: Client, loads: Loads) -> None:
    loads.failures["a/n"] = LoaderError("weights are torn")
    await register(a, "m", load=True)
    await register(a, "n", "o")
    await set_v(a, "m")
    told = await set_v(a, "n", sync=True)
    assert (told.status, told.activeModelId, told.targetModelId) == (VStatus.TRANSITION_FAILED, "m", "n")
    assert "weights are torn" in told.targetModelStatus.errors[0]
    assert (await v_status(a)).status == VStatus.TRANSITION_FAILED
    assert await served_by(a) == "m"
    told = await set_v(a, "o", sync=True)  # another target is the way out
    assert (told.status, told.activeModelId) == (VStatus.DEFINED, "o")


@pytest.mark.parametrize("existing", [False, True])
async def test_load_now_of_a_target_that_cannot_be_loaded_is_a_status(a: Client, loads: Loads, existing: bool) -> None:
    loads.failures["a/n"] = LoaderError("weights are torn")
    await register(a, "m", load=True)
    await register(a, "n")
    if existing:
        await set_v(a, "m")
    told = await set_v(a, "n", loadNow=True, sync=True)
    failed = told.targetModelStatus if existing else told.activeModelStatus
    assert told.status == (VStatus.TRANSITION_FAILED if existing else VStatus.DEFINED)
    assert failed.status == Status.LOADING_FAILED
    assert "weights are torn" in failed.errors[0]


async def test_auto_delete_models_go_with_their_last_vmodel(mesh: Mesh, a: Client) -> None:
    await set_v(a, "m", modelInfo=info("m"), autoDeleteTargetModel=True)
    await set_v(a, "n", modelInfo=info("n"), autoDeleteTargetModel=True)
    assert [await has(a, model_id) for model_id in "mn"] == [False, True]
    assert await served_by(a) == "n"
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v"))
    assert not await has(a, "n")
    await until(lambda: not mesh.pods["a"].engine.cache.copies)


async def test_a_model_without_auto_delete_stays(a: Client) -> None:
    await set_v(a, "m", modelInfo=info("m"))
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v"))
    assert await has(a, "m")


async def test_two_vmodels_count_their_model_twice(a: Client) -> None:
    await set_v(a, "m", modelInfo=info("m"), autoDeleteTargetModel=True)
    await a.call("setVModel", mm.SetVModelRequest(vModelId="w", targetModelId="m"))
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v"))
    assert await has(a, "m")
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="w"))
    assert not await has(a, "m")


async def test_a_target_given_up_in_mid_transition_is_dropped(mesh: Mesh, a: Client, loads: Loads) -> None:
    gate = loads.hold("n")
    await register(a, "m", load=True)
    await register(a, "o", load=True)
    await set_v(a, "m")
    await set_v(a, "n", modelInfo=info("n"), autoDeleteTargetModel=True)
    told = await set_v(a, "o", sync=True)
    gate.set()
    assert (told.status, told.activeModelId) == (VStatus.DEFINED, "o")
    assert not await has(a, "n")


async def test_deleting_no_vmodel_is_a_no_op(a: Client) -> None:
    await a.call("deleteVModel", mm.DeleteVModelRequest(vModelId="v"))


async def test_many_changes_at_once_leave_the_counts_right(mesh: Mesh, a: Client) -> None:
    models = [f"m{i}" for i in range(4)]
    await register(a, *models)
    changes = [
        a.start("setVModel", mm.SetVModelRequest(vModelId=f"v{i % 3}", targetModelId=models[(i * 5 + i // 3) % 4]))
        for i in range(18)
    ]
    await asyncio.gather(*changes)
    view = mesh.pods["a"].engine.view
    await until(lambda: not view.in_transition)
    pointed = [vmodel.active for vmodel in view.vmodels.values()]
    assert {model_id: view.models[model_id].refs for model_id in models} == {m: pointed.count(m) for m in models}


async def test_no_vmodel_comes_to_point_to_a_model_that_is_being_removed(mesh: Mesh, a: Client) -> None:
    async def attempt(name: str, request: Any) -> None:
        try:
            await a.call(name, request)
        except grpc.aio.AioRpcError as error:
            assert error.code().name in ("NOT_FOUND", "FAILED_PRECONDITION"), error  # noqa: PT017

    for i in range(15):
        await register(a, f"m{i}")
        await asyncio.gather(
            attempt("setVModel", mm.SetVModelRequest(vModelId=f"v{i}", targetModelId=f"m{i}")),
            attempt("unregisterModel", mm.UnregisterModelRequest(modelId=f"m{i}")),
        )
    view = mesh.pods["a"].engine.view
    assert {vmodel.active for vmodel in view.vmodels.values()} == view.models.keys()
