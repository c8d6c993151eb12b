"""What an InferenceService's owner is told: its status, and events where that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mesh_operator.inferenceservice import Reading
from mesh_operator.runtimes import Runtime
from mesh_operator.status import Condition, Failure, conditions, copies, failure_info, predictor, ready, rfc3339
from mesh_operator.world import MODE, Event, Plan, Problem, Seen, Settings, before

POLL_S: Final = 1.0
"""How often a transition is looked at (ModelMesh: 1 s) ..."""
RESYNC_S: Final = 60.0
"""... and what is settled."""

_WRITTEN: Final = (
    *("url", "address", "conditions", "modelStatus", "components", "observedGeneration"),
    *("servingRuntimeName", "clusterServingRuntimeName"),
)
"""Members of the status that are ours."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the status is made of."""

    available: Condition
    transition: str
    active_state: str
    target_state: str = ""
    failure: Failure | None = None
    requeue_s: float = RESYNC_S
    runtime: Runtime | None = None


def telling(seen: Seen, reading: Reading, settings: Settings, situation: Situation) -> Plan:
    """The plan that makes no calls: status and events."""
    old, now = before(seen.manifest), rfc3339(seen.now)
    ingress = Condition("IngressReady", "True")
    wanted = [situation.available, ingress, ready([situation.available, ingress])]
    if reading.spec.stopped or _condition(old, "Stopped"):
        wanted.append(Condition("Stopped", "True" if reading.spec.stopped else "False"))
    if reading.warnings:
        wanted.append(Condition("SpecHonoured", "False", "FieldIgnored", "; ".join(reading.warnings), severity="Info"))
    model_status: dict[str, Any] = {
        "transitionStatus": situation.transition,
        "states": {"activeModelState": situation.active_state, "targetModelState": situation.target_state},
        "copies": copies(seen.vmodel),
    }
    if situation.failure is not None:
        failed = before(seen.manifest, "modelStatus", "lastFailureInfo")
        model_status["lastFailureInfo"] = failure_info(failed, situation.failure, now)
    status: dict[str, Any] = {
        **{name: value for name, value in old.items() if name not in _WRITTEN},
        "deploymentMode": MODE,
        "conditions": conditions(old.get("conditions") or (), wanted, now),
        "modelStatus": model_status,
    }
    if generation := seen.manifest["metadata"].get("generation"):
        status["observedGeneration"] = generation
    if situation.runtime is not None:
        name = "servingRuntimeName" if situation.runtime.namespace else "clusterServingRuntimeName"
        status[name] = situation.runtime.name
    components = {name: value for name, value in (old.get("components") or {}).items() if name != "predictor"}
    if seen.vmodel is not None:
        urls = {
            "url": settings.rest_url or settings.grpc_url,
            "grpcUrl": settings.grpc_url,
            "restUrl": settings.rest_url,
        }
        urls = {name: url for name, url in urls.items() if url}
        was = before(seen.manifest, "components", "predictor")
        components["predictor"] = predictor(was, seen.vmodel, situation.available.status == "True", urls)
        if urls:
            status |= {"url": urls["url"], "address": {"url": urls["url"]}}
    if components:
        status["components"] = components
    return Plan(status=status, events=_events(seen, status), requeue_s=situation.requeue_s)


def unreachable(seen: Seen, problem: Problem) -> Plan:
    """The mesh does not answer: what was known of the model is left as it is."""
    old = before(seen.manifest)
    part = _as_it_was(old, "PredictorReady") or Condition("PredictorReady", "Unknown")
    ingress = Condition("IngressReady", "Unknown", "MeshUnreachable", problem.message)
    others = filter(None, (_as_it_was(old, name) for name in ("Stopped", "SpecHonoured")))
    wanted = [part, ingress, ready([part, ingress]), *others]
    told = conditions(old.get("conditions") or (), wanted, rfc3339(seen.now))
    status = {**old, "deploymentMode": MODE, "conditions": told}
    return Plan(status=status, events=_events(seen, status), requeue_s=2 * POLL_S)


def _events(seen: Seen, status: Mapping[str, Any]) -> tuple[Event, ...]:
    """What has changed since the status that is there."""
    old, name = before(seen.manifest), seen.manifest["metadata"]["name"]
    events: list[Event] = []
    new_status = {"status": status}
    failed, failed_before = (
        {**before(of, "modelStatus", "lastFailureInfo"), "location": ""} for of in (new_status, seen.manifest)
    )
    if "reason" in failed and failed != failed_before:
        events.append(Event("Warning", failed["reason"], failed["message"]))
    ignored = _condition(status, "SpecHonoured").get("message")
    if ignored and ignored != _condition(old, "SpecHonoured").get("message"):
        events.append(Event("Warning", "FieldIgnored", ignored))
    told, told_before = (before(of, "components", "predictor") for of in (new_status, seen.manifest))
    for revision, reason, what in (
        ("latestCreatedRevision", "ModelRegistered", "is registered"),
        ("latestReadyRevision", "ModelLoaded", "serves"),
    ):
        if told.get(revision) not in (None, told_before.get(revision)):
            events.append(Event("Normal", reason, f"model {told[revision]} {what}"))
    events += _canary_events(told, told_before)
    now, then = _condition(status, "Ready"), _condition(old, "Ready")
    if now["status"] == "True" != then.get("status"):
        events.append(Event("Normal", "InferenceServiceReady", f"InferenceService [{name}] is Ready"))
    elif then.get("status") == "True" != now["status"]:
        message = f"InferenceService [{name}] is no longer Ready because of: {now.get('reason', now['status'])}"
        events.append(Event("Warning", "InferenceServiceNotReady", message))
    return tuple(events)


def _canary_events(told: Mapping[str, Any], told_before: Mapping[str, Any]) -> list[Event]:
    (name, percent), (name_before, percent_before) = _canary(told), _canary(told_before)
    if name and (name, percent) != (name_before, percent_before) and percent is not None:
        if percent:
            return [Event("Normal", "CanaryStarted", f"{percent} percent of the requests go to model {name}")]
        if percent_before and name == name_before:
            return [Event("Normal", "CanaryRolledBack", f"no requests go to model {name}")]
    if name_before and not name:
        if told.get("latestCreatedRevision") == name_before:
            return [Event("Normal", "CanaryPromoted", f"model {name_before} is to take all requests")]
        return [Event("Normal", "CanaryRolledBack", f"model {name_before} is gone")]
    return []


def _canary(predictor: Mapping[str, Any]) -> tuple[str, int | None]:
    """The model that is tried, and its share."""
    for entry in predictor.get("traffic") or ():
        if entry.get("tag") == "latest":
            return entry["revisionName"], entry["percent"]
    return "", None


def _condition(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((entry for entry in status.get("conditions") or () if entry["type"] == name), {})


def _as_it_was(status: Mapping[str, Any], name: str) -> Condition | None:
    was = _condition(status, name)
    if not was:
        return None
    told = (was.get(member, "") for member in ("reason", "message", "severity"))
    return Condition(name, was["status"], *told)
