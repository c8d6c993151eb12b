"""The status of an InferenceService as KServe has it, from what the mesh says of its vmodel.

Pure, and told in words only: the same state gives the same status, so nothing is written where nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

OURS: Final = ("PredictorReady", "IngressReady", "Ready", "Stopped", "SpecHonoured")
"""Conditions that we write; others (TransformerReady, ...) are left as they are."""
MAX_MESSAGE_CHARS: Final = 1000

_STATES: Final = {
    "NOT_FOUND": "Pending",
    "NOT_LOADED": "Standby",
    "LOADING": "Loading",
    "LOADED": "Loaded",
    "LOADING_FAILED": "FailedToLoad",
    "UNKNOWN": "Pending",
}
"""The mesh's word for a model's state to KServe's."""


@dataclass(frozen=True, slots=True)
class Copy:
    pod_id: str
    state: str
    """As in `mmesh.ModelMesh`: LOADED, LOADING, LOADING_FAILED, ..."""
    since_ms: int


@dataclass(frozen=True, slots=True)
class Model:
    """A concrete model, as the mesh tells it."""

    model_id: str
    state: str
    errors: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, slots=True)
class VModel:
    """What the mesh says of a vmodel."""

    active: Model
    target: Model
    """The active model, unless a transition is under way or has failed."""
    failed: bool = False
    canary_percent: int | None = None
    """What the target gets of the requests while it is loaded; None: all when it is active, until then none."""

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.active,) if self.active.model_id == self.target.model_id else (self.active, self.target)


@dataclass(frozen=True, slots=True)
class Condition:
    type: str
    status: str
    """True, False or Unknown."""
    reason: str = ""
    message: str = ""
    severity: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """`lastFailureInfo`."""

    reason: str
    message: str
    model_id: str = ""
    pod_id: str = ""
    at: str = ""
    """RFC 3339; empty: not known."""


def conditions(previous: Sequence[Mapping[str, Any]], wanted: Iterable[Condition], now: str) -> list[dict[str, Any]]:
    """The conditions with ours among them, by type; one whose status stays keeps the time of its last transition."""
    known = {entry["type"]: dict(entry) for entry in previous if entry.get("type")}
    kept = {name: entry for name, entry in known.items() if name not in OURS}
    for condition in wanted:
        before = known.get(condition.type, {})
        stays = before.get("status") == condition.status
        entry = {
            "type": condition.type,
            "status": condition.status,
            "severity": condition.severity,
            "reason": condition.reason,
            "message": clipped(condition.message),
            "lastTransitionTime": before.get("lastTransitionTime", now) if stays else now,
        }
        kept[condition.type] = {name: value for name, value in entry.items() if value}
    return [kept[name] for name in sorted(kept)]


def ready(parts: Iterable[Condition]) -> Condition:
    """KServe's `Ready` (Knative's living condition set): false if a part is, else unknown if one is."""
    worst = sorted(parts, key=lambda part: ("False", "Unknown", "True").index(part.status))[0]
    return Condition("Ready", worst.status, worst.reason, worst.message)


def state_of(model: Model) -> str:
    return _STATES[model.state]


def copies(vmodel: VModel | None) -> dict[str, int]:
    """`modelStatus.copies`: those loaded, and those that failed of late."""
    states = [copy.state for model in (vmodel.models if vmodel else ()) for copy in model.copies]
    return {"failedCopies": states.count("LOADING_FAILED"), "totalCopies": states.count("LOADED")}


def failure_of(model: Model) -> Failure:
    """Of a model that did not load."""
    failed = max(
        (copy for copy in model.copies if copy.state == "LOADING_FAILED"), key=lambda copy: copy.since_ms, default=None
    )
    message = model.errors[0] if model.errors else "the model did not load"
    if failed is None:
        return Failure("ModelLoadFailed", message, model.model_id)
    at = rfc3339(datetime.fromtimestamp(failed.since_ms // 1000, UTC))
    return Failure("ModelLoadFailed", message, model.model_id, failed.pod_id, at)


def failure_info(previous: Mapping[str, Any], failure: Failure, now: str) -> dict[str, Any]:
    """`lastFailureInfo`. Its time is that of the failure; one that the mesh does not date keeps the time it had."""
    told = {
        "reason": failure.reason,
        "message": clipped(failure.message),
        "modelRevisionName": failure.model_id,
        "location": failure.pod_id,
    }
    told = {name: value for name, value in told.items() if value}
    same = all(previous.get(name) == told.get(name) for name in ("reason", "message", "modelRevisionName"))
    return {**told, "time": failure.at or (previous.get("time") if same else None) or now}


def rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clipped(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."


def predictor(previous: Mapping[str, Any], vmodel: VModel, is_ready: bool, urls: Mapping[str, str]) -> dict[str, Any]:
    """`components.predictor`: revisions are concrete models, traffic is what of a vmodel's requests each gets."""
    active, target = vmodel.active.model_id, vmodel.target.model_id
    told: dict[str, Any] = {**urls, "latestCreatedRevision": target}
    if "url" in urls:
        told["address"] = {"url": urls["url"]}
    ready_before, rolled_out = previous.get("latestReadyRevision"), previous.get("latestRolledoutRevision")
    if is_ready:
        told["latestReadyRevision"] = active
    elif ready_before:
        told["latestReadyRevision"] = ready_before
    if active == target:
        told["traffic"] = [{"revisionName": active, "latestRevision": True, "percent": 100}]
        if is_ready:
            told["latestRolledoutRevision"] = active
    else:
        is_canary = vmodel.canary_percent is not None
        percent = vmodel.canary_percent if is_canary and state_of(vmodel.target) == "Loaded" else 0
        latest = {"revisionName": target, "latestRevision": True, "percent": percent}
        told["traffic"] = [
            {**latest, "tag": "latest"} if is_canary else latest,
            {"revisionName": active, "latestRevision": False, "percent": 100 - (percent or 0), "tag": "prev"},
        ]
        if is_canary and (state_of(vmodel.target) == "Loaded" or ready_before == target):
            told["latestReadyRevision"] = target
        if is_ready:
            told["latestRolledoutRevision"] = active
    if rolled_out and "latestRolledoutRevision" not in told:
        told["latestRolledoutRevision"] = rolled_out
    before = previous.get("previousRolledoutRevision")
    if rolled_out and told.get("latestRolledoutRevision") != rolled_out:
        before = rolled_out
    if before:
        told["previousRolledoutRevision"] = before
    return told
