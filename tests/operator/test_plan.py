"""What the operator decides. Authority: KServe's status (conditions, modelStatus, traffic), ModelMesh's controller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mesh_operator.inferenceservice import read
from mesh_operator.plan import decide
from mesh_operator.registration import mark_of, registration
from mesh_operator.runtimes import Runtime, SupportedFormat
from mesh_operator.status import Copy, Model, VModel
from mesh_operator.world import (
    DeleteVModel,
    EnsureLoaded,
    Plan,
    Problem,
    Seen,
    Settings,
    SetVModel,
    Trouble,
)
from tests.operator.manifests import RUNTIME, isvc, model, said

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = Settings(grpc_url="grpc://mesh:8033")
OWNER = "news/fraud"


def call_for(manifest: Mapping[str, Any], runtime: Runtime = RUNTIME) -> SetVModel:
    return registration(read(manifest).spec, runtime, "news.fraud", OWNER)


def seen(manifest: Mapping[str, Any], vmodel: VModel | None = None, **fields: Any) -> Seen:
    """As the operator sees it when it has registered what the manifest says."""
    told = {"applied": mark_of(call_for(manifest)), **fields} if vmodel else fields
    return Seen(manifest, (RUNTIME,), NOW, vmodel, **told)


def one(state: str, *errors: str, manifest: Mapping[str, Any] | None = None, **fields: Any) -> VModel:
    """The vmodel of a manifest, whose model is in this state."""
    told = said(call_for(manifest or isvc()).model_id, state, *errors, **fields)
    return VModel(told, told)


def two(active: str, target: str, manifest: Mapping[str, Any], *errors: str, failed: bool = False) -> VModel:
    return VModel(said("news.fraud__isvc-0", active), said(call_for(manifest).model_id, target, *errors), failed)


def after(plan: Plan, manifest: Mapping[str, Any], **metadata: Any) -> dict[str, Any]:
    """The manifest with the plan's status."""
    return {**manifest, "metadata": {**manifest["metadata"], **metadata}, "status": plan.status}


def condition(plan: Plan, name: str) -> tuple[str, str]:
    assert plan.status is not None
    found = next(entry for entry in plan.status["conditions"] if entry["type"] == name)
    return found["status"], found.get("reason", "")


def model_status(plan: Plan) -> tuple[str, str, str]:
    assert plan.status is not None
    told = plan.status["modelStatus"]
    return told["transitionStatus"], told["states"]["activeModelState"], told["states"]["targetModelState"]


def reasons(plan: Plan) -> list[str]:
    return [event.reason for event in plan.events]


def test_the_finalizer_comes_before_the_registration() -> None:
    plan = decide(seen(isvc(finalizers=("other",))), SETTINGS)
    assert plan == Plan(finalizer=True, requeue_s=0)


def test_a_registration_as_modelmesh_makes_it() -> None:
    manifest = isvc({**model(storageUri=None, storage={"key": "k", "path": "a"}), "minReplicas": 1})
    [call] = decide(seen(manifest), SETTINGS).calls
    assert isinstance(call, SetVModel)
    assert (call.vmodel_id, call.owner, call.type, call.path) == ("news.fraud", OWNER, "mt:sklearn", "a")
    assert call.model_id.startswith("news.fraud__isvc-")
    assert len(call.model_id.rpartition("-")[2]) == 10
    assert json.loads(call.key) == {"storage_key": "k", "placement": {"tenant": "news", "min_copies": 1}}
    assert call.load_now


def test_a_server_beside_the_pods_is_named() -> None:
    triton = Runtime("triton", multi_model=True, formats=(SupportedFormat("onnx", "1", True),))
    call = call_for(isvc(model(modelFormat={"name": "onnx", "version": "1"})), triton)
    assert call.type == "rt:triton"
    assert json.loads(call.key)["model_type"] == {"name": "onnx", "version": "1"}


@pytest.mark.parametrize(
    ("changed", "is_new"),
    [
        (isvc(model(storageUri="s3://models/other")), True),
        (isvc(annotations={"densemesh.io/reload": "2"}), True),
        (isvc(annotations={"densemesh.io/tenant": "news.ads"}), True),
        (isvc({**model(), "minReplicas": 2}), False),
        (isvc(annotations={"densemesh.io/priority": "high"}), False),
        (isvc({**model(), "timeout": 5}), False),
    ],
)
def test_what_makes_a_new_model(changed: dict[str, Any], is_new: bool) -> None:
    assert (call_for(changed).model_id != call_for(isvc()).model_id) is is_new


def test_names_without_namespaces_are_modelmeshs() -> None:
    [call] = decide(seen(isvc()), replace(SETTINGS, namespaced=False)).calls
    assert isinstance(call, SetVModel)
    assert call.vmodel_id == "fraud"


LOADED_AT = "2026-11-21T12:00:00Z"


def test_all_columns_and_members_of_a_loaded_model() -> None:
    plan = decide(seen(isvc(), one("LOADED")), SETTINGS)
    revision = call_for(isvc()).model_id
    assert plan.status == {
        "observedGeneration": 1,
        "deploymentMode": "ModelMesh",
        "clusterServingRuntimeName": "densemesh",
        "url": "grpc://mesh:8033",
        "address": {"url": "grpc://mesh:8033"},
        "conditions": [
            {"type": name, "status": "True", "lastTransitionTime": LOADED_AT}
            for name in ("IngressReady", "PredictorReady", "Ready")
        ],
        "modelStatus": {
            "transitionStatus": "UpToDate",
            "states": {"activeModelState": "Loaded", "targetModelState": ""},
            "copies": {"failedCopies": 0, "totalCopies": 1},
        },
        "components": {
            "predictor": {
                "url": "grpc://mesh:8033",
                "grpcUrl": "grpc://mesh:8033",
                "address": {"url": "grpc://mesh:8033"},
                "latestCreatedRevision": revision,
                "latestReadyRevision": revision,
                "latestRolledoutRevision": revision,
                "traffic": [{"revisionName": revision, "latestRevision": True, "percent": 100}],
            }
        },
    }
    assert reasons(plan) == ["ModelRegistered", "ModelLoaded", "InferenceServiceReady"]


@pytest.mark.parametrize("state", ["LOADED", "LOADING", "LOADING_FAILED"])
def test_nothing_is_told_twice(state: str) -> None:
    """A status that is there already gives the same status, and no event."""
    first = decide(seen(isvc(), one(state)), SETTINGS)
    later = replace(seen(after(first, isvc()), one(state)), now=NOW + timedelta(seconds=90))
    again = decide(later, SETTINGS)
    assert again.status == first.status
    assert again.events == ()


@pytest.mark.parametrize(
    ("vmodel", "ready", "told"),
    [
        (one("LOADED"), ("True", ""), ("UpToDate", "Loaded", "")),
        (one("LOADING"), ("Unknown", "ModelLoading"), ("UpToDate", "Loading", "")),
        (one("LOADING_FAILED", "no such file"), ("False", "ModelLoadFailed"), ("UpToDate", "FailedToLoad", "")),
    ],
)
def test_states_of_the_first_model(vmodel: VModel, ready: tuple[str, str], told: tuple[str, str, str]) -> None:
    plan = decide(seen(isvc(), vmodel), SETTINGS)
    assert condition(plan, "PredictorReady") == condition(plan, "Ready") == ready
    assert condition(plan, "IngressReady") == ("True", "")
    assert model_status(plan) == told


def test_a_failure_is_told_with_all_that_is_known() -> None:
    plan = decide(
        seen(isvc(), one("LOADING_FAILED", "no such file", pod="pod-7", since_ms=1_700_000_000_000)), SETTINGS
    )
    assert plan.status is not None
    assert plan.status["modelStatus"]["lastFailureInfo"] == {
        "reason": "ModelLoadFailed",
        "message": "no such file",
        "modelRevisionName": call_for(isvc()).model_id,
        "location": "pod-7",
        "time": "2023-11-14T22:13:20Z",
    }
    assert plan.status["modelStatus"]["copies"] == {"failedCopies": 1, "totalCopies": 0}
    assert reasons(plan) == ["ModelLoadFailed", "ModelRegistered"]


def test_a_model_that_nobody_loads_is_asked_for_and_waits_in_the_mesh_s_words() -> None:
    vmodel = one("NOT_LOADED", "no pod has gpu=h200")
    first = seen(isvc(), vmodel)
    [call] = decide(first, SETTINGS).calls
    assert isinstance(call, EnsureLoaded)
    plan = decide(replace(first, asked=True), SETTINGS)
    assert condition(plan, "Ready") == ("Unknown", "ModelLoading")
    assert model_status(plan)[1] == "Pending"
    assert "no pod has gpu=h200" in str(plan.status)


def test_what_has_served_is_ready_though_it_is_evicted() -> None:
    """ModelMesh: Standby is available."""
    loaded = decide(seen(isvc(), one("LOADED")), SETTINGS)
    for state in ("NOT_LOADED", "LOADING"):
        plan = decide(seen(after(loaded, isvc()), one(state)), SETTINGS)
        assert condition(plan, "Ready") == ("True", "")
        assert plan.events == ()


def test_a_lazy_model_is_ready_without_a_copy() -> None:
    manifest = isvc({**model(), "minReplicas": 0})
    assert not call_for(manifest).load_now
    plan = decide(seen(manifest, one("NOT_LOADED", manifest=manifest)), SETTINGS)
    assert condition(plan, "Ready") == ("True", "")
    assert model_status(plan) == ("UpToDate", "Standby", "")


def test_a_failed_first_load_is_tried_again_and_shown_failed_until_then() -> None:
    """The mesh forgets a failed copy after a minute; the status does not."""
    at_ms = int(NOW.timestamp() * 1000)
    failed = decide(seen(isvc(), one("LOADING_FAILED", "no such file", since_ms=at_ms)), SETTINGS)
    forgotten = seen(after(failed, isvc()), one("NOT_LOADED"))
    plan = decide(replace(forgotten, now=NOW + timedelta(seconds=120)), SETTINGS)
    assert condition(plan, "Ready") == ("False", "ModelLoadFailed")
    assert plan.events == ()
    [call] = decide(replace(forgotten, now=NOW + timedelta(seconds=301)), SETTINGS).calls
    assert isinstance(call, EnsureLoaded)


def test_blue_green() -> None:
    """The old model serves until the new one does; traffic and revisions tell of both."""
    manifest = isvc(model(storageUri="s3://models/2"))
    old = {
        "components": {
            "predictor": {"latestReadyRevision": "news.fraud__isvc-0", "latestRolledoutRevision": "news.fraud__isvc-0"}
        }
    }
    manifest["status"] = old
    before = VModel(said("news.fraud__isvc-0", "LOADED"), said("news.fraud__isvc-0", "LOADED"))
    [call] = decide(seen(manifest, before), SETTINGS).calls
    assert isinstance(call, SetVModel)
    moving = decide(seen(manifest, two("LOADED", "LOADING", manifest)), SETTINGS)
    assert model_status(moving) == ("InProgress", "Loaded", "Loading")
    assert condition(moving, "Ready") == ("True", "")
    assert moving.status is not None
    assert moving.status["components"]["predictor"]["traffic"] == [
        {"revisionName": call.model_id, "latestRevision": True, "percent": 0},
        {"revisionName": "news.fraud__isvc-0", "latestRevision": False, "percent": 100, "tag": "prev"},
    ]
    assert moving.requeue_s == 1
    done = decide(seen(after(moving, manifest), one("LOADED", manifest=manifest)), SETTINGS)
    assert model_status(done) == ("UpToDate", "Loaded", "")
    assert done.status is not None
    told = done.status["components"]["predictor"]
    assert (told["latestReadyRevision"], told["previousRolledoutRevision"]) == (call.model_id, "news.fraud__isvc-0")
    assert reasons(done) == ["ModelLoaded"]


def test_a_successor_that_fails_leaves_the_old_one_serving_until_it_is_tried_again() -> None:
    manifest = isvc(model(storageUri="s3://models/2"))
    manifest["status"] = {"components": {"predictor": {"latestReadyRevision": "news.fraud__isvc-0"}}}
    vmodel = two("LOADED", "LOADING_FAILED", manifest, "bad file", failed=True)
    vmodel = replace(
        vmodel, target=replace(vmodel.target, copies=(Copy("p", "LOADING_FAILED", int(NOW.timestamp()) * 1000),))
    )
    plan = decide(seen(manifest, vmodel), SETTINGS)
    assert model_status(plan) == ("BlockedByFailedLoad", "Loaded", "FailedToLoad")
    assert condition(plan, "Ready") == ("True", "")
    assert "ModelLoadFailed" in reasons(plan)
    told = seen(after(plan, manifest), vmodel)
    assert decide(told, SETTINGS).calls == ()
    [retried] = decide(replace(told, now=NOW + timedelta(seconds=301)), SETTINGS).calls
    assert isinstance(retried, SetVModel)
    assert retried.load_now
    # Rollback: the old spec is the active model again.
    before = isvc(status=after(plan, manifest)["status"])
    [back] = decide(seen(before, vmodel), SETTINGS).calls
    assert isinstance(back, SetVModel)
    assert back.model_id == call_for(isvc()).model_id


def test_placement_changes_without_a_load() -> None:
    manifest = isvc({**model(), "minReplicas": 2})
    [call] = decide(seen(manifest, one("LOADED"), applied=mark_of(call_for(isvc()))), SETTINGS).calls
    assert isinstance(call, SetVModel)
    assert not call.load_now
    assert json.loads(call.key)["placement"]["min_copies"] == 2


@pytest.mark.parametrize(
    ("manifest", "fields", "reason", "message"),
    [
        (isvc(model(modelFormat={"name": "pmml"})), {}, "NoSupportingRuntime", "No runtime found"),
        (isvc(model(runtime="triton")), {}, "RuntimeNotRecognized", "Waiting for runtime"),
        (isvc(explainer={"art": {}}), {}, "InvalidPredictorSpec", "spec.explainer is not supported"),
        (
            isvc(annotations={"serving.kserve.io/secretKey": "k"}),
            {"storage_keys": frozenset("j")},
            "InvalidPredictorSpec",
            "'k'",
        ),
        (isvc(), {"problem": Problem(Trouble.REFUSED, "modelInfo.type: x")}, "InvalidPredictorSpec", "modelInfo.type"),
        (isvc(), {"problem": Problem(Trouble.TAKEN, "belongs to another")}, "InvalidPredictorSpec", "model-name"),
        (isvc(), {"problem": Problem(Trouble.QUOTA, "max_models")}, "ModelLoadFailed", "max_models"),
    ],
)
def test_bad_input_is_told_and_not_tried_again_at_once(
    manifest: dict[str, Any], fields: dict[str, Any], reason: str, message: str
) -> None:
    plan = decide(Seen(manifest, (RUNTIME,), NOW, **fields), SETTINGS)
    assert plan.calls == ()
    assert condition(plan, "Ready") == condition(plan, "PredictorReady") == ("False", reason)
    assert plan.status is not None
    failure = plan.status["modelStatus"]["lastFailureInfo"]
    assert failure["reason"] == reason
    assert message in failure["message"]
    assert reasons(plan) == [reason]
    assert (plan.requeue_s or 0) >= 30


def test_a_bad_change_leaves_what_serves() -> None:
    loaded = decide(seen(isvc(), one("LOADED")), SETTINGS)
    bad = after(loaded, isvc(model(modelFormat={"name": "pmml"})), generation=2)
    plan = decide(Seen(bad, (RUNTIME,), NOW, one("LOADED")), SETTINGS)
    assert model_status(plan) == ("InvalidSpec", "Loaded", "FailedToLoad")
    assert condition(plan, "Ready") == ("True", "")
    assert reasons(plan) == ["NoSupportingRuntime"]


def test_what_is_not_honoured_is_told_once() -> None:
    manifest = isvc({**model(env=[{"name": "A"}]), "timeout": 5})
    plan = decide(seen(manifest, one("LOADED", manifest=manifest)), SETTINGS)
    assert condition(plan, "SpecHonoured") == ("False", "FieldIgnored")
    assert condition(plan, "Ready") == ("True", "")
    assert reasons(plan)[0] == "FieldIgnored"
    again = decide(seen(after(plan, manifest), one("LOADED", manifest=manifest)), SETTINGS)
    assert again.events == ()
    better = decide(seen(after(plan, isvc()), one("LOADED")), SETTINGS)
    assert "SpecHonoured" not in str(better.status)


def test_a_mesh_that_does_not_answer() -> None:
    loaded = decide(seen(isvc(), one("LOADED")), SETTINGS)
    gone = seen(after(loaded, isvc()), None, problem=Problem(Trouble.UNREACHABLE, "connection refused"))
    plan = decide(gone, SETTINGS)
    assert condition(plan, "IngressReady") == condition(plan, "Ready") == ("Unknown", "MeshUnreachable")
    assert condition(plan, "PredictorReady") == ("True", "")
    assert loaded.status is not None
    assert plan.status is not None
    assert plan.status["modelStatus"] == loaded.status["modelStatus"]
    assert reasons(plan) == ["InferenceServiceNotReady"]


def test_others_conditions_and_members_stay() -> None:
    theirs = {"type": "TransformerReady", "status": "True"}
    manifest = isvc(status={"conditions": [theirs], "components": {"transformer": {"url": "x"}}, "extra": 1})
    plan = decide(seen(manifest, one("LOADED")), SETTINGS)
    assert plan.status is not None
    assert theirs in plan.status["conditions"]
    assert plan.status["components"]["transformer"] == {"url": "x"}
    assert plan.status["extra"] == 1


def test_stop_and_start() -> None:
    stopped = isvc(annotations={"serving.kserve.io/stop": "true"})
    assert decide(seen(stopped, one("LOADED")), SETTINGS).calls == (DeleteVModel("news.fraud", OWNER),)
    plan = decide(Seen(stopped, (RUNTIME,), NOW), SETTINGS)
    assert condition(plan, "Stopped") == ("True", "")
    assert condition(plan, "Ready") == ("False", "Stopped")
    started = decide(seen(after(plan, isvc()), one("LOADED")), SETTINGS)
    assert condition(started, "Stopped") == ("False", "")
    assert condition(started, "Ready") == ("True", "")


def test_another_name_takes_the_old_one_away() -> None:
    loaded = decide(seen(isvc(), one("LOADED")), SETTINGS)
    renamed = after(loaded, isvc(annotations={"densemesh.io/model-name": "f"}))
    assert decide(Seen(renamed, (RUNTIME,), NOW), SETTINGS).calls == (DeleteVModel("news.fraud", OWNER),)
    [call] = decide(Seen(renamed, (RUNTIME,), NOW, asked=True), SETTINGS).calls
    assert isinstance(call, SetVModel)
    assert call.vmodel_id == "f"


def test_deletion() -> None:
    going = isvc()
    going["metadata"]["deletionTimestamp"] = "2026-11-21T11:59:30Z"
    first = seen(going)
    assert decide(first, SETTINGS).calls == (DeleteVModel("news.fraud", OWNER),)
    assert decide(replace(first, asked=True), SETTINGS) == Plan(finalizer=False)
    silent = replace(first, problem=Problem(Trouble.UNREACHABLE, "refused"))
    assert decide(silent, SETTINGS) == Plan(requeue_s=5)
    late = decide(replace(silent, now=NOW + timedelta(seconds=40)), SETTINGS)
    assert late.finalizer is False
    assert reasons(late) == ["UnregisterFailed"]
    assert decide(seen({**going, "metadata": {**going["metadata"], "finalizers": []}}), SETTINGS) == Plan()


def test_other_deployment_modes_are_left_alone() -> None:
    theirs = isvc(annotations={"serving.kserve.io/deploymentMode": "Standard"}, finalizers=())
    assert decide(seen(theirs), SETTINGS) == Plan()
    settled = isvc(status={"deploymentMode": "Standard"}, finalizers=())  # which KServe does not let change
    assert decide(seen(settled), SETTINGS) == Plan()
    silent = isvc(annotations={"serving.kserve.io/deploymentMode": ""}, finalizers=())
    assert decide(seen(silent, default_mode="Serverless"), SETTINGS) == Plan()
    assert decide(seen(silent, default_mode="ModelMesh"), SETTINGS).finalizer


def test_copies_of_both_models_are_counted() -> None:
    manifest = isvc(model(storageUri="s3://models/2"))
    active = Model("old", "LOADED", (), tuple(Copy(pod, "LOADED", 1) for pod in "ab"))
    target = Model(
        call_for(manifest).model_id, "LOADING", (), (Copy("a", "LOADING", 2), Copy("b", "LOADING_FAILED", 2))
    )
    plan = decide(seen(manifest, VModel(active, target)), SETTINGS)
    assert plan.status is not None
    assert plan.status["modelStatus"]["copies"] == {"failedCopies": 1, "totalCopies": 2}


def canary(manifest: dict[str, Any], percent: int, state: str = "LOADED") -> VModel:
    return replace(two("LOADED", state, manifest), canary_percent=percent)


def test_a_canary() -> None:
    """Knative's canary: traffic by revision, `latest` and `prev`; 0 is the way back, without it is the promotion."""
    old = {"components": {"predictor": {"latestReadyRevision": "news.fraud__isvc-0"}}}
    manifest = isvc({**model(storageUri="s3://models/2"), "canaryTrafficPercent": 10}, status=old)
    new = call_for(manifest).model_id
    [call] = decide(
        seen(manifest, VModel(said("news.fraud__isvc-0", "LOADED"), said("news.fraud__isvc-0", "LOADED"))), SETTINGS
    ).calls
    assert isinstance(call, SetVModel)
    assert call.canary_percent == 10
    loading = decide(seen(manifest, canary(manifest, 10, "LOADING")), SETTINGS)
    assert model_status(loading) == ("InProgress", "Loaded", "Loading")
    assert "CanaryStarted" not in reasons(loading)
    begun = decide(seen(after(loading, manifest), canary(manifest, 10)), SETTINGS)
    assert model_status(begun) == ("UpToDate", "Loaded", "Loaded")
    assert reasons(begun) == ["ModelLoaded", "CanaryStarted"]
    assert begun.status is not None
    assert begun.status["components"]["predictor"]["traffic"] == [
        {"revisionName": new, "latestRevision": True, "percent": 10, "tag": "latest"},
        {"revisionName": "news.fraud__isvc-0", "latestRevision": False, "percent": 90, "tag": "prev"},
    ]
    more = after(begun, isvc({**model(storageUri="s3://models/2"), "canaryTrafficPercent": 0}))
    [call] = decide(seen(more, canary(manifest, 10), applied=mark_of(call_for(manifest))), SETTINGS).calls
    assert isinstance(call, SetVModel)
    assert (call.canary_percent, call.model_id) == (0, new)
    back = decide(seen(more, canary(manifest, 0)), SETTINGS)
    assert reasons(back) == ["CanaryRolledBack"]
    assert model_status(back) == ("UpToDate", "Loaded", "Loaded")
    promoted = after(begun, isvc(model(storageUri="s3://models/2")))
    [call] = decide(seen(promoted, canary(manifest, 10), applied=mark_of(call_for(manifest))), SETTINGS).calls
    assert isinstance(call, SetVModel)
    assert call.canary_percent is None
    done = decide(seen(promoted, one("LOADED", manifest=manifest)), SETTINGS)
    assert reasons(done) == ["CanaryPromoted"]
    assert done.status is not None
    assert done.status["components"]["predictor"]["previousRolledoutRevision"] == "news.fraud__isvc-0"
