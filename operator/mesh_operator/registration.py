"""An InferenceService's model as the mesh is told of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from mesh_operator.inferenceservice import Spec
from mesh_operator.runtimes import Runtime
from mesh_operator.world import SetVModel, before

_INFIX: Final = "__isvc-"


def registration(spec: Spec, runtime: Runtime, vmodel_id: str, owner: str) -> SetVModel:
    """The call that registers the model. Its id has a hash of what the model is, as in ModelMesh, and not of how it is
    placed: a change of that is none of the model."""
    key: dict[str, Any] = {}
    if spec.storage_key:
        key["storage_key"] = spec.storage_key
    if spec.storage_params:
        key["storage_params"] = dict(spec.storage_params)
    if spec.schema_path:
        key["schema_path"] = spec.schema_path
    if spec.max_queue_delay_us:
        key["max_queue_delay_us"] = spec.max_queue_delay_us
    if spec.preferred_batch_size:
        key["preferred_batch_sizes"] = [spec.preferred_batch_size]
    if runtime.in_process:
        version = f":{spec.version}" if spec.version else ""
        model_type = f"mt:{spec.format}{version}"
    else:
        model_type = f"rt:{runtime.name}"
        key["model_type"] = {"name": spec.format, **({"version": spec.version} if spec.version else {})}
    what = [model_type, spec.path, key, spec.placement.get("tenant", ""), spec.reload]
    digest = hashlib.sha1(_json(what).encode(), usedforsecurity=False).hexdigest()[:10]
    key["placement"] = dict(spec.placement)
    model_id = f"{vmodel_id}{_INFIX}{digest}"
    percent = None if spec.canary_percent == 100 else spec.canary_percent
    return SetVModel(vmodel_id, model_id, owner, model_type, spec.path, _json(key), not spec.is_lazy, percent)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def mark_of(call: SetVModel) -> str:
    """Equal for registrations that say the same of the same model."""
    return _json([call.model_id, call.key, call.canary_percent])


def registered_as(manifest: Mapping[str, Any]) -> str:
    """The vmodel that the status tells of; empty: none."""
    told = before(manifest, "components", "predictor").get("latestCreatedRevision") or ""
    return str(told).rpartition(_INFIX)[0]
