"""What is known of one InferenceService, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from mesh_operator.inferenceservice import read
from mesh_operator.runtimes import Runtime
from mesh_operator.status import VModel

FINALIZER: Final = "densemesh.io/unregister"
MODE: Final = "ModelMesh"
MODE_ANNOTATION: Final = "serving.kserve.io/deploymentMode"


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all InferenceServices."""

    namespaced: bool = True
    """Models are called `<namespace>.<name>`; else, as in ModelMesh, `<name>`."""
    grpc_url: str = ""
    """What clients are told, e.g. grpc://mesh.serving:8033; empty: nothing."""
    rest_url: str = ""


@dataclass(frozen=True, slots=True)
class SetVModel:
    vmodel_id: str
    model_id: str
    owner: str
    type: str
    path: str
    key: str
    load_now: bool
    canary_percent: int | None = None
    """None: the model becomes the active one when it is loaded."""


@dataclass(frozen=True, slots=True)
class EnsureLoaded:
    vmodel_id: str
    owner: str
    model_id: str


@dataclass(frozen=True, slots=True)
class DeleteVModel:
    vmodel_id: str
    owner: str


Call = SetVModel | EnsureLoaded | DeleteVModel


class Trouble(StrEnum):
    """Why a call to the mesh failed."""

    REFUSED = "refused"
    """The request is not what the mesh takes: nothing is gained by repeating it."""
    TAKEN = "taken"
    """The name is somebody else's."""
    QUOTA = "quota"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Problem:
    trouble: Trouble
    message: str


@dataclass(frozen=True, slots=True)
class Seen:
    """All that is known of an InferenceService."""

    manifest: Mapping[str, Any]
    runtimes: Sequence[Runtime]
    now: datetime
    vmodel: VModel | None = None
    """None: the mesh has none that is ours."""
    problem: Problem | None = None
    """Of the last call."""
    applied: str = ""
    """`fingerprint` of the registration that was made last."""
    storage_keys: frozenset[str] | None = None
    """Keys of the storage config; None: not known."""
    asked: bool = False
    """Calls were made since it was last waited."""
    default_mode: str = ""
    """Of an InferenceService that says nothing of its deployment mode."""


@dataclass(frozen=True, slots=True)
class Event:
    type: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    calls: tuple[Call, ...] = ()
    """With any, nothing else is to be done before they are made and `decide` is asked again."""
    status: Mapping[str, Any] | None = None
    """The whole status that is to be; None: as it is."""
    events: tuple[Event, ...] = ()
    finalizer: bool | None = None
    """Whether it is to have ours; None: as it is."""
    applied: str = ""
    requeue_s: float | None = None
    """When to look again; None: when something changes."""


def is_ours(manifest: Mapping[str, Any], default_mode: str) -> bool:
    """Whether an InferenceService is the mesh's: KServe's rule for the deployment mode."""
    mode = (manifest.get("status") or {}).get("deploymentMode")
    mode = mode or (manifest["metadata"].get("annotations") or {}).get(MODE_ANNOTATION) or default_mode
    return bool(mode == MODE)


def is_marked(manifest: Mapping[str, Any]) -> bool:
    """Whether it has our finalizer: we may have registered it."""
    return FINALIZER in (manifest["metadata"].get("finalizers") or ())


def vmodel_of(manifest: Mapping[str, Any], settings: Settings) -> tuple[str, str]:
    """Name of an InferenceService's vmodel, and its owner."""
    metadata = manifest["metadata"]
    name, namespace = metadata["name"], metadata["namespace"]
    told = read(manifest).spec.model_name
    return told or (f"{namespace}.{name}" if settings.namespaced else name), f"{namespace}/{name}"


def before(manifest: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """An object in the status as it is."""
    found = manifest.get("status") or {}
    for name in path:
        found = found.get(name) or {}
    return found
