"""Manifests as users write them, and what the mesh says of their models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mesh_operator.runtimes import Runtime, SupportedFormat
from mesh_operator.status import Copy, Model

RUNTIME: Final = Runtime(
    "densemesh",
    multi_model=True,
    in_process=True,
    protocols=("v2", "grpc-v2"),
    formats=tuple(SupportedFormat(name, auto_select=True) for name in ("sklearn", "onnx", "synthetic", "pytorch")),
)


def isvc(
    predictor: Mapping[str, Any] | None = None,
    *,
    name: str = "fraud",
    namespace: str = "news",
    annotations: Mapping[str, str] | None = None,
    status: Mapping[str, Any] | None = None,
    finalizers: tuple[str, ...] = ("densemesh.io/unregister",),
    **spec: Any,
) -> dict[str, Any]:
    """An InferenceService of the mesh; `predictor` over one with a model of scikit-learn in a bucket."""
    told = {"serving.kserve.io/deploymentMode": "ModelMesh", **(annotations or {})}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-{name}",
        "generation": 1,
        "annotations": {key: value for key, value in told.items() if value},
        "finalizers": list(finalizers),
    }
    manifest: dict[str, Any] = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": model() if predictor is None else dict(predictor), **spec},
    }
    return manifest if status is None else {**manifest, "status": dict(status)}


def model(**fields: Any) -> dict[str, Any]:
    """A predictor with the fields in its model; None takes one away."""
    told = {"modelFormat": {"name": "sklearn"}, "storageUri": "s3://models/fraud", **fields}
    return {"model": {name: value for name, value in told.items() if value is not None}}


def said(model_id: str, state: str, *errors: str, pod: str = "pod-1", since_ms: int = 1_000) -> Model:
    """What the mesh says of a model with one copy, if its state is a copy's."""
    copies = () if state in ("NOT_LOADED", "NOT_FOUND") else (Copy(pod, state, since_ms),)
    return Model(model_id, state, errors, copies)
