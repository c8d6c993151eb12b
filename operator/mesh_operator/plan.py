"""What to do about one InferenceService: pure, from all that is known of it.

`decide` is asked again with what the calls have brought, until there are none. Whatever was done before a crash is then
found done, and the same state of the world always gives the same plan.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from mesh_operator.inferenceservice import Reading, read
from mesh_operator.registration import mark_of, registered_as, registration
from mesh_operator.runtimes import NoRuntime, Runtime, select
from mesh_operator.status import Condition, Failure, Model, VModel, clipped, failure_of, state_of
from mesh_operator.telling import POLL_S, RESYNC_S, Situation, telling, unreachable
from mesh_operator.world import (
    DeleteVModel,
    EnsureLoaded,
    Event,
    Plan,
    Problem,
    Seen,
    Settings,
    SetVModel,
    Trouble,
    before,
    is_marked,
    is_ours,
    vmodel_of,
)

RETRY_S: Final = 300.0
"""After this long a load that failed is asked for again."""
GIVE_UP_DELETING_S: Final = 60.0
"""A mesh that does not answer holds up a deletion for so long."""

_FAILED_S: Final = 15.0
_PREDICTOR_READY: Final = Condition("PredictorReady", "True")


def decide(seen: Seen, settings: Settings) -> Plan:
    """What to do next; it never raises for what a manifest holds."""
    manifest = seen.manifest
    vmodel_id, owner = vmodel_of(manifest, settings)
    if manifest["metadata"].get("deletionTimestamp") or not is_ours(manifest, seen.default_mode):
        return _leaving(seen, vmodel_id, owner)
    if not is_marked(manifest):
        return Plan(finalizer=True, requeue_s=0)  # before anything is registered that would have to be removed
    if seen.problem is not None and seen.problem.trouble is Trouble.UNREACHABLE:
        return unreachable(seen, seen.problem)
    reading = read(manifest)
    earlier = registered_as(manifest)
    if earlier not in ("", vmodel_id) and not seen.asked:  # it was called otherwise before
        return Plan(calls=(DeleteVModel(earlier, owner),))
    if reading.spec.stopped and not reading.refusals:
        if seen.vmodel is not None:
            return Plan(calls=(DeleteVModel(vmodel_id, owner),))
        stopped = Condition("PredictorReady", "False", "Stopped", "the InferenceService is stopped")
        return telling(seen, reading, settings, Situation(stopped, "UpToDate", "Pending"))
    failure = _refusal(seen, reading)
    if failure is not None:
        return telling(seen, reading, settings, _invalid(seen, failure))
    try:
        runtime = select(reading.spec, seen.runtimes)
    except NoRuntime as error:
        return telling(seen, reading, settings, _invalid(seen, Failure(error.reason, str(error))))
    return _served(seen, reading, settings, registration(reading.spec, runtime, vmodel_id, owner), runtime)


def _refusal(seen: Seen, reading: Reading) -> Failure | None:
    if reading.refusals:
        return Failure("InvalidPredictorSpec", "; ".join(reading.refusals))
    key = reading.spec.storage_key
    if key and seen.storage_keys is not None and key not in seen.storage_keys:
        message = f"storage key {key!r} is not in the storage config: add it there or name another"
        return Failure("InvalidPredictorSpec", message)
    return None


def _leaving(seen: Seen, vmodel_id: str, owner: str) -> Plan:
    """It goes, or is not ours any more."""
    if not is_marked(seen.manifest):
        return Plan()
    if seen.problem is not None:
        since = seen.manifest["metadata"].get("deletionTimestamp")
        if not since or (seen.now - datetime.fromisoformat(since)).total_seconds() < GIVE_UP_DELETING_S:
            return Plan(requeue_s=5 * POLL_S)
        event = Event("Warning", "UnregisterFailed", clipped(f"the mesh could not be told: {seen.problem.message}"))
        return Plan(finalizer=False, events=(event,))
    if not seen.asked:
        names = dict.fromkeys(filter(None, (vmodel_id, registered_as(seen.manifest))))
        return Plan(calls=tuple(DeleteVModel(name, owner) for name in names))
    return Plan(finalizer=False)


def _served(seen: Seen, reading: Reading, settings: Settings, call: SetVModel, runtime: Runtime) -> Plan:
    """A model that is asked for rightly."""
    if seen.problem is not None:
        return telling(seen, reading, settings, _refused(seen, seen.problem))
    vmodel, mark = seen.vmodel, mark_of(call)
    if vmodel is None or vmodel.target.model_id != call.model_id:
        return Plan(calls=(call,), applied=mark)
    if vmodel.failed and not seen.asked and (_failed_s(seen, call.model_id) or 0) > RETRY_S:
        return Plan(calls=(call,), applied=mark)  # once more
    if seen.applied != mark and not vmodel.failed:  # its placement or share may be another; else nothing is changed
        return Plan(calls=(replace(call, load_now=False),), applied=mark)
    situation = _transition(seen, vmodel) if len(vmodel.models) > 1 else _alone(seen, vmodel.active, call.load_now)
    if situation is None:
        return Plan(calls=(EnsureLoaded(call.vmodel_id, call.owner, call.model_id),), applied=mark)
    return replace(telling(seen, reading, settings, replace(situation, runtime=runtime)), applied=mark)


def _alone(seen: Seen, model: Model, load_now: bool) -> Situation | None:
    """All requests are the model's. None: it is to be loaded, and nobody does."""
    state = state_of(model)
    served = state == "Loaded" or (state in ("Standby", "Loading") and (not load_now or _was_ready(seen, model)))
    if served:
        return Situation(_PREDICTOR_READY, "UpToDate", state, requeue_s=RESYNC_S if state != "Loading" else POLL_S)
    failed_s = _failed_s(seen, model.model_id)
    if state == "FailedToLoad" or (state == "Standby" and failed_s is not None and failed_s < RETRY_S):
        failure = failure_of(model) if state == "FailedToLoad" else _last_failure(seen)
        available = Condition("PredictorReady", "False", failure.reason, failure.message)
        return Situation(available, "UpToDate", "FailedToLoad", failure=failure, requeue_s=_FAILED_S)
    if state == "Standby" and not seen.asked:
        return None
    message = model.errors[0] if model.errors else f"model {model.model_id} is being loaded"
    available = Condition("PredictorReady", "Unknown", "ModelLoading", message)
    shown = "Loading" if state == "Loading" else "Pending"
    return Situation(available, "UpToDate", shown, requeue_s=POLL_S if shown == "Loading" or not model.errors else 5.0)


def _transition(seen: Seen, vmodel: VModel) -> Situation:
    """The active model serves until its successor does."""
    available, active_state = _active(seen, vmodel)
    if vmodel.failed:
        failure = failure_of(vmodel.target)
        return Situation(
            available, "BlockedByFailedLoad", active_state, "FailedToLoad", failure=failure, requeue_s=_FAILED_S
        )
    state = state_of(vmodel.target)
    target_state = {"Standby": "Pending", "Loaded": "Loaded"}.get(state, state)
    if vmodel.canary_percent is not None and (state == "Loaded" or (vmodel.canary_percent == 0 and state == "Standby")):
        return Situation(available, "UpToDate", active_state, state)  # as it is asked for
    return Situation(available, "InProgress", active_state, target_state, requeue_s=POLL_S)


def _active(seen: Seen, vmodel: VModel | None) -> tuple[Condition, str]:
    """Whether what serves does, whatever its successor may be."""
    if vmodel is None:
        return Condition("PredictorReady", "False", "NotRegistered", "no model is registered"), "Pending"
    state = state_of(vmodel.active)
    if state == "Loaded" or (state in ("Standby", "Loading") and _was_ready(seen, vmodel.active)):
        return _PREDICTOR_READY, state
    failure = failure_of(vmodel.active)
    return Condition("PredictorReady", "False", failure.reason, failure.message), state


def _invalid(seen: Seen, failure: Failure) -> Situation:
    """Nothing can be made of the manifest; what serves goes on."""
    available, active_state = _active(seen, seen.vmodel)
    if available.status != "True":
        available = Condition("PredictorReady", "False", failure.reason, failure.message)
    return Situation(available, "InvalidSpec", active_state, "FailedToLoad" if seen.vmodel else "", failure=failure)


def _refused(seen: Seen, problem: Problem) -> Situation:
    """The mesh does not take it."""
    if problem.trouble is Trouble.QUOTA:
        failure = Failure("ModelLoadFailed", problem.message)
        return replace(_invalid(seen, failure), transition="BlockedByFailedLoad", requeue_s=RESYNC_S / 2)
    advice = (
        ": choose another name with the annotation densemesh.io/model-name" if problem.trouble is Trouble.TAKEN else ""
    )
    return _invalid(seen, Failure("InvalidPredictorSpec", problem.message + advice))


def _was_ready(seen: Seen, model: Model) -> bool:
    told = before(seen.manifest, "components", "predictor")
    return model.model_id in (told.get("latestReadyRevision"), told.get("latestRolledoutRevision"))


def _last_failure(seen: Seen) -> Failure:
    told = before(seen.manifest, "modelStatus", "lastFailureInfo")
    return Failure(told["reason"], told["message"], told["modelRevisionName"], told.get("location", ""), told["time"])


def _failed_s(seen: Seen, model_id: str) -> float | None:
    """Since when, in seconds, it has been told that the model failed; None: it has not."""
    told = before(seen.manifest, "modelStatus", "lastFailureInfo")
    if told.get("modelRevisionName") != model_id or not told.get("time"):
        return None
    return (seen.now - datetime.fromisoformat(told["time"])).total_seconds()
