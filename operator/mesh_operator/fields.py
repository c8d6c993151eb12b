"""What becomes of each field of an InferenceService (KServe v1beta1), as one table.

Paths begin at `spec`; one that is not in the table has its parent's line, and without one it is warned about. Legacy
`predictor.<framework>` is rewritten to `predictor.model` before it is looked up (`inferenceservice`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class Fate(StrEnum):
    HONOURED = "honoured"
    WARNED = "warned"
    """The model is served without it; a condition and a Warning event say so."""
    REFUSED = "refused"
    """The model would not be what was asked for: the InferenceService is not ready."""


@dataclass(frozen=True, slots=True)
class Field:
    path: str
    fate: Fate
    note: str
    """What it becomes, or what to do instead."""


H, W, R = Fate.HONOURED, Fate.WARNED, Fate.REFUSED
_POOL: Final = "models share the mesh's pods; set it there"
_CONTAINER: Final = "models run in the mesh's pods, not in a container of their own"

FIELDS: Final = {
    field.path: field
    for field in (
        Field("predictor.model.modelFormat.name", H, "the format; it selects the runtime"),
        Field("predictor.model.modelFormat.version", H, "with the name"),
        Field("predictor.model.storageUri", H, "where the model lies"),
        Field("predictor.model.storage.key", H, "a key of the storage config, by default default_<type> or default"),
        Field("predictor.model.storage.path", H, "within the bucket of the key; exclusive with storageUri"),
        Field("predictor.model.storage.parameters.type", H, "chooses default_<type> where there is no key"),
        Field("predictor.model.storage.parameters.bucket", H, "instead of the key's own"),
        Field("predictor.model.storage.parameters.container", H, "the same on Azure"),
        Field("predictor.model.storage.parameters.name", H, "the same for a claim"),
        Field("predictor.model.storage.parameters.sha256", H, "what the file must have"),
        Field("predictor.model.storage.parameters", W, "how a store is opened is said by its storage key alone"),
        Field("predictor.model.storage.schemaPath", H, "inputs and outputs, in ModelMesh's form"),
        Field("predictor.model.protocolVersion", H, "filters runtimes; the mesh itself speaks V2"),
        Field("predictor.model.runtime", H, "pins the runtime"),
        Field("predictor.model.runtimeVersion", W, _CONTAINER),
        Field("predictor.model.image", W, _CONTAINER),
        Field("predictor.model.command", W, _CONTAINER),
        Field("predictor.model.args", W, _CONTAINER),
        Field("predictor.model.env", W, _CONTAINER),
        Field("predictor.model.envFrom", W, _CONTAINER),
        Field("predictor.model.ports", W, _CONTAINER),
        Field("predictor.model.volumeMounts", W, _CONTAINER),
        Field("predictor.model.resources", W, "a model's memory is measured, and its room is in the mesh's pods"),
        Field("predictor.model.name", H, "a container's name, without effect"),
        Field("predictor.model.confidential", R, "models in a mesh share memory: remove it or use another mode"),
        Field("predictor.model", W, _CONTAINER),
        Field("predictor.storageUris", R, "one model has one artifact: use model.storageUri"),
        Field(
            "predictor.containers", R, "custom containers cannot share a mesh: use model, or another deployment mode"
        ),
        Field("predictor.workerSpec", R, "multi-node models cannot share a mesh: use another deployment mode"),
        Field("predictor.minReplicas", H, "copies always loaded; 0: unloaded when idle for ten minutes"),
        Field("predictor.maxReplicas", H, "most copies; 0: as many as the load takes"),
        Field("predictor.scaleTarget", W, "copies follow the measured load of the pods"),
        Field("predictor.scaleMetric", W, "copies follow the measured load of the pods"),
        Field("predictor.scaleMetricType", W, "copies follow the measured load of the pods"),
        Field("predictor.autoScaling", W, "copies follow the measured load of the pods"),
        Field("predictor.containerConcurrency", W, "the mesh queues and batches per pod"),
        Field("predictor.timeout", W, "a request's deadline is the client's, or the mesh's default"),
        Field(
            "predictor.canaryTrafficPercent", H, "percent of the requests for the new model; without it, or at 100, all"
        ),
        Field("predictor.batcher.maxBatchSize", H, "rows for which no request waits any longer"),
        Field("predictor.batcher.maxLatency", H, "how long, in ms, a request may wait for others"),
        Field("predictor.batcher.timeout", W, "a request's deadline is the client's, or the mesh's default"),
        Field("predictor.logger", W, "payloads are not logged"),
        Field("predictor.serviceAccountName", W, "credentials are those of the storage key"),
        Field("predictor.labels", W, _POOL),
        Field("predictor.annotations", W, _POOL),
        Field("predictor.deploymentStrategy", W, _POOL),
        Field("predictor.nodeSelector", W, "use the annotation densemesh.io/requires with labels of the mesh's pods"),
        Field("predictor.tolerations", W, _POOL),
        Field("predictor.affinity", W, _POOL),
        Field("predictor.imagePullSecrets", W, _POOL),
        Field("predictor.volumes", W, _POOL),
        Field("predictor.name", H, "without effect"),
        Field("predictor", W, _POOL),
        Field("transformer", R, "remove it and call the transformer's own service"),
        Field("explainer", R, "remove it and call the explainer's own service"),
        Field("canary", R, "use predictor.canaryTrafficPercent"),
    )
}

ANNOTATIONS: Final = {
    "serving.kserve.io/deploymentMode": "ModelMesh: the InferenceService is ours",
    "serving.kserve.io/secretKey": "as storage.key",
    "serving.kserve.io/schemaPath": "as storage.schemaPath",
    "serving.kserve.io/servingRuntime": "as model.runtime",
    "serving.kserve.io/stop": 'with "true" the model is unloaded and not served',
    "densemesh.io/model-name": "the name that clients say, if it is not the InferenceService's",
    "densemesh.io/tenant": "`<namespace>` (the default) or `<namespace>.<part>`: whose shares and quotas count",
    "densemesh.io/priority": "high, normal or low",
    "densemesh.io/pinned": '"true": a loaded copy is never evicted',
    "densemesh.io/idle-unload-s": "seconds without a request after which copies are unloaded",
    "densemesh.io/slo-ms": "the latency that is aimed at",
    "densemesh.io/requires": "labels of pods, as in gpu=h200,zone=a",
    "densemesh.io/reload": "any text; a change of it registers the model anew, from the same place",
}
"""What is read besides `spec`."""


def told(spec: Mapping[str, Any], fate: Fate) -> Iterator[tuple[str, str]]:
    """Path and note of each field in `spec` with this fate; a field of which the table says nothing is WARNED."""
    yield from _told(spec, "", fate)


def _told(value: Mapping[str, Any], at: str, fate: Fate) -> Iterator[tuple[str, str]]:
    for name in sorted(value):
        path = f"{at}.{name}" if at else name
        inner, line = value[name], _line(path)
        if inner is None or inner in ({}, []):
            continue
        if isinstance(inner, dict) and any(known.startswith(path + ".") for known in FIELDS):
            yield from _told(inner, path, fate)
        elif line.fate is fate:
            yield f"spec.{path}", line.note


def _line(path: str) -> Field:
    while path:
        if path in FIELDS:
            return FIELDS[path]
        path = path.rpartition(".")[0]
    return Field(path, Fate.WARNED, "it is unknown")


def page() -> str:
    """The table as `docs/inferenceservice-fields.md`."""
    lines = [
        "# Fields of an InferenceService",
        "",
        "What becomes of each field of KServe's `InferenceService` (v1beta1) in a mesh. `predictor.<framework>` is",
        "`predictor.model` with that format. *Honoured*: it does what it says. *Warned*: the model is served without",
        "it, and the condition `SpecHonoured` and an event `FieldIgnored` say so, as they do of fields that are not",
        "listed here. *Refused*: `Ready` is false with `InvalidPredictorSpec`, and what already serves goes on.",
        "",
        "Made from `mesh_operator/fields.py` with `python -m mesh_operator.fields`.",
        "",
        "| Field of `spec` | | |",
        "|---|---|---|",
        *(f"| `{field.path}` | {field.fate} | {field.note} |" for field in FIELDS.values()),
        "",
        "| Annotation | |",
        "|---|---|",
        *(f"| `{name}` | {note} |" for name, note in ANNOTATIONS.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
