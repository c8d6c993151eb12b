"""What a registration may say of placement, and that it is no part of what the model is (issue 4, items 5 and 8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import InvalidRequest
from mesh.placement_settings import NAMES, fields_of
from mesh.pod import Pod
from mesh.registration import registration
from mesh.repository import scan
from mesh.settings import from_key, to_key
from placement.records import ModelRecord, Priority
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, request_for, running, until

ALL: dict[str, Any] = {
    "tenant": "news",
    "min_copies": 1,
    "max_copies": 4,
    "pinned": True,
    "idle_unload_s": 600,
    "requires": {"gpu": "h200", "example.com/disk": "fast"},
    "priority": "high",
    "slo_ms": 100,
    "stopped": True,
}


def info(placement: Any = None, **rest: Any) -> mm.ModelInfo:
    told = {} if placement is None else {"placement": placement}
    return mm.ModelInfo(type="synthetic", key=json.dumps(rest | told) if rest or told else "")


def request(placement: Any = None, **rest: Any) -> mm.RegisterModelRequest:
    return mm.RegisterModelRequest(modelId="m", modelInfo=info(placement, **rest))


def model(mesh: Mesh) -> ModelRecord:
    return mesh.pods["a"].engine.view.models["m"]


def test_every_setting_goes_into_the_record_and_out_of_the_key() -> None:
    asked = registration("m", info(ALL, parameters={"infer_ms": 1}), 0)
    record = asked.record
    assert asked.tells_placement
    assert record.key == '{"parameters":{"infer_ms":1}}'
    assert {name: getattr(record, name) for name in NAMES} == {
        **ALL,
        "requires": "example.com/disk=fast,gpu=h200",
        "priority": Priority.HIGH,
    }
    assert registration("m", info(ALL), 0).record.key == ""
    assert not registration("m", info(), 0).tells_placement


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"min_copies": -1}, "placement.min_copies: expected a whole number from 0 to 10000"),
        ({"min_copies": True}, "placement.min_copies: expected a whole number"),
        ({"max_copies": 1.5}, "placement.max_copies: expected a whole number"),
        ({"max_copies": 10_001}, "placement.max_copies: expected a whole number from 0 to 10000"),
        ({"min_copies": 3, "max_copies": 2}, "placement.min_copies: expected at most max_copies, which is 2, found 3"),
        ({"idle_unload_s": 31_536_001}, "placement.idle_unload_s: expected a whole number from 0 to 31536000"),
        ({"slo_ms": "fast"}, "placement.slo_ms: expected a whole number from 0 to 86400000"),
        ({"pinned": "yes"}, "placement.pinned: expected true or false"),
        ({"stopped": 1}, "placement.stopped: expected true or false"),
        ({"priority": "highest"}, "placement.priority: expected one of high, normal, low"),
        ({"priority": ["high"]}, "placement.priority: expected one of high, normal, low"),
        ({"tenant": "a/b"}, "placement.tenant: expected up to 63 letters"),
        ({"requires": "gpu=h200"}, "placement.requires: expected an object of labels and their values"),
        ({"requires": {"gpu": 1}}, "placement.requires: expected an object of labels and their values"),
        ({"requires": {"no spaces": "x"}}, "placement.requires: label 'no spaces=x': expected key=value"),
        ({"requires": {"a": "1,b=2"}}, "placement.requires: a comma or space is in no label"),
        ({"requires": {f"l{i}": "" for i in range(65)}}, "placement.requires: 65 labels, expected at most 64"),
        ({"copies": 2}, "placement.copies: expected one of tenant, min_copies"),
        ([1], "key: placement is not a JSON object"),
    ],
)
def test_a_bad_setting_is_refused_in_a_sentence_that_names_it(told: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        registration("m", info(told), 0)
    assert str(refused.value).startswith("modelInfo.")
    assert sentence in str(refused.value)


async def test_other_placement_changes_the_record_and_reloads_nothing(mesh: Mesh, a: Client, loads: Loads) -> None:
    """Compare-and-set in place: the copy that is loaded goes on serving."""
    await mesh.register("m", load=True)
    copy = mesh.pods["a"].engine.cache.copies["m"]
    before = model(mesh)
    await a.call("registerModel", request({"min_copies": 1, "slo_ms": 50}))
    assert (model(mesh).min_copies, model(mesh).slo_ms, model(mesh).created) == (1, 50, before.created)
    await a.call("registerModel", request({"max_copies": 3}))
    assert (model(mesh).min_copies, model(mesh).max_copies) == (0, 3), "a placement is told as a whole"
    revision = model(mesh).revision
    for silent in (request(), request({}), request({"max_copies": 3})):
        await a.call("registerModel", silent)
    assert model(mesh).revision == revision, "who tells nothing, or the same, changes nothing"
    assert await mesh.infer("m") == "a"
    assert mesh.pods["a"].engine.cache.copies["m"] is copy
    assert loads.count("m") == 1


async def test_other_contents_still_already_exist(mesh: Mesh, a: Client) -> None:
    await a.call("registerModel", request({"min_copies": 1}, parameters={"infer_ms": 1}))
    status, _ = await a.refusal("registerModel", request({"min_copies": 1}, parameters={"infer_ms": 2}))
    assert status == "ALREADY_EXISTS"
    spaced = mm.ModelInfo(type="synthetic", key='{ "parameters" : {"infer_ms": 1} }')
    await a.call("registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=spaced))
    assert model(mesh).min_copies == 1


async def test_a_tenants_model_is_not_taken_over(mesh: Mesh, a: Client) -> None:
    await a.call("registerModel", request({"tenant": "news"}))
    status, message = await a.refusal("registerModel", request({"tenant": "sport"}))
    assert (status, "belongs to another tenant" in message) == ("ALREADY_EXISTS", True)
    await a.call("registerModel", request({"min_copies": 1}))
    assert (model(mesh).tenant, model(mesh).min_copies) == ("news", 1)


async def test_a_vmodels_target_is_placed_as_its_model_info_tells(mesh: Mesh, a: Client) -> None:
    """ModelMesh's controller repeats SetVModel with the whole ModelInfo at every change."""
    for number in (1, 2):
        told = info({"min_copies": number})
        await a.call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=told))
        assert (model(mesh).min_copies, model(mesh).refs) == (number, 1)


async def test_pods_say_what_they_are(loads: Loads) -> None:
    async with running("a", loads, labels="zone=z1,node=n1") as mesh:
        await until(lambda: mesh.pods["a"].engine.view.pods["a"].labels == "zone=z1,node=n1")


async def test_a_repository_tells_placement_in_model_settings(tmp_path: Path, loads: Loads) -> None:
    write(tmp_path / "good", {"min_copies": 0, "max_copies": 2})
    write(tmp_path / "bad", {"max_copies": -2})
    models, problems = scan(tmp_path)
    assert [model.placement for model in models] == [{"min_copies": 0, "max_copies": 2}]
    assert "parameters: placement.max_copies: expected a whole number" in problems[0][1]
    assert from_key(to_key(models[0])).placement == models[0].placement
    async with running("a", loads, models=str(tmp_path)) as mesh:
        pod: Pod = mesh.pods["a"]
        assert pod.engine.view.models["good"].max_copies == 2
        assert "placement" not in pod.engine.view.models["good"].key


def write(folder: Path, placement: Any) -> None:
    folder.mkdir()
    (folder / "model.synthetic.json").write_text("{}")
    settings = {"parameters": {"uri": "model.synthetic.json", "placement": placement}}
    (folder / "model-settings.json").write_text(json.dumps(settings))


def test_what_is_left_out_has_its_default() -> None:
    nothing = ModelRecord("m", "synthetic", "")
    assert fields_of({}) == {name: getattr(nothing, name) for name in NAMES}


# Stopped (serving.kserve.io/stop)


async def test_a_stopped_model_is_unloaded_and_refused_until_it_is_started(loads: Loads) -> None:
    async with running("ab", loads) as mesh:
        a, b = mesh.clients["a"], mesh.clients["b"]
        await a.call("registerModel", request({"min_copies": 2}))
        await until(lambda: len(mesh.holders("m")) == 2)
        told = await a.call("registerModel", request({"min_copies": 2, "stopped": True}))
        await until(lambda: not any(pod.engine.cache.copies for pod in mesh.pods.values()))
        assert told.status in (mm.ModelStatusInfo.LOADED, mm.ModelStatusInfo.NOT_LOADED)  # as its copies go
        for client in (a, b):
            status, said = await client.refusal("ModelInfer", request_for("m"))
            assert (status, said) == (
                "FAILED_PRECONDITION",
                "model 'm' is stopped by its registration (placement.stopped)",
            )
        ensured = mm.EnsureLoadedRequest(modelId="m", sync=True)
        assert (await a.refusal("ensureLoaded", ensured))[0] == "FAILED_PRECONDITION"
        assert not (await a.call("ModelReady", v2.ModelReadyRequest(name="m"))).ready
        assert list((await a.call("Explain", mm.ExplainRequest(model_id="m"))).reasons) == [
            "not loaded: stopped by its registration (placement.stopped)"
        ]
        await a.call("registerModel", request({"min_copies": 2, "stopped": False}))
        await until(lambda: len(mesh.holders("m")) == 2)
        assert await mesh.infer("m") in ("a", "b")


async def test_a_vmodels_target_that_is_stopped_says_so(mesh: Mesh, a: Client) -> None:
    await mesh.register("old", load=True)
    await a.call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="old"))
    moving = mm.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=info({"stopped": True}), sync=True)
    told = await a.call("setVModel", moving)
    assert (told.status, told.activeModelId) == (mm.VModelStatusInfo.TRANSITION_FAILED, "old")
    assert told.targetModelStatus.errors == ["stopped by its registration (placement.stopped)"]
    moving.modelInfo.CopyFrom(info({"stopped": False}))
    await a.call("setVModel", moving)
    await until(lambda: mesh.pods["a"].engine.view.vmodels["v"].active == "m")


async def test_an_idle_vmodel_is_unloaded_on_both_sides_and_comes_back(mesh: Mesh, a: Client) -> None:
    """min_copies 0 and idle_unload_s, with a canary: nothing keeps loading what nobody asks for."""
    for model_id in ("old", "new"):
        told = mm.SetVModelRequest(
            vModelId="v", targetModelId=model_id, modelInfo=info({"idle_unload_s": 1}), loadNow=True, sync=True
        )
        told.canary_percent = 50
        await a.call("setVModel", told)
    copies = mesh.pods["a"].engine.cache.copies
    await until(lambda: not copies)
    await a.call("ModelInfer", request_for("v"))
    assert "old" in copies
    await until(lambda: "new" in copies)
