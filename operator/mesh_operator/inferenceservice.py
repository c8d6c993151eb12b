"""An InferenceService (KServe v1beta1) as a typed `Spec`, with what is wrong with it and what has no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mesh_operator.fields import Fate, told

FRAMEWORKS: Final = (
    *("sklearn", "xgboost", "tensorflow", "pytorch", "triton", "onnx", "huggingface", "pmml", "lightgbm", "paddle"),
    "mlflow",
)
"""Legacy `predictor.<framework>`, which KServe's webhook leaves alone in this mode."""
SCHEMES: Final = ("gs", "s3", "az", "pvc", "file", "https", "http", "hdfs", "webhdfs", "hf")
IDLE_UNLOAD_S: Final = 600
"""Of `minReplicas: 0` without an annotation."""

_NAME: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PARAMETERS: Final = ("bucket", "container", "name", "sha256")
_SERVING, _OURS = "serving.kserve.io/", "densemesh.io/"
_MOST: Final = {"idle-unload-s": 31_536_000, "slo-ms": 86_400_000}


@dataclass(frozen=True, slots=True)
class Spec:
    """What is to be served, and how."""

    name: str
    namespace: str
    model_name: str = ""
    """Told by an annotation; empty: made of the name."""
    format: str = ""
    version: str = ""
    path: str = ""
    storage_key: str = ""
    storage_params: Mapping[str, Any] = field(default_factory=dict)
    schema_path: str = ""
    runtime: str = ""
    protocol: str = ""
    placement: Mapping[str, Any] = field(default_factory=dict)
    """As `mesh.placement_settings` has it."""
    max_queue_delay_us: int = 0
    preferred_batch_size: int = 0
    canary_percent: int | None = None
    reload: str = ""
    stopped: bool = False

    @property
    def min_copies(self) -> int:
        return int(self.placement.get("min_copies", 0))

    @property
    def is_lazy(self) -> bool:
        """It is loaded by its first request: `minReplicas: 0`."""
        return "idle_unload_s" in self.placement and not self.min_copies


@dataclass(frozen=True, slots=True)
class Reading:
    """What a manifest says."""

    spec: Spec
    refusals: tuple[str, ...]
    """Sentences that name the field and what was expected; with any, `spec` must not be served."""
    warnings: tuple[str, ...]


class _Reader:
    def __init__(self) -> None:
        self.refusals: list[str] = []

    def refuse(self, message: str) -> None:
        self.refusals.append(message)

    def object(self, where: str, value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            self.refuse(f"{where}: expected an object")
            return {}
        return value or {}

    def text(self, where: str, value: Any, most: int = 4096) -> str:
        if value is not None and (not isinstance(value, str) or len(value) > most):
            self.refuse(f"{where}: expected a text of at most {most} characters")
            return ""
        return value or ""

    def number(self, where: str, value: Any, least: int = 0, most: int = 10_000) -> int:
        if value is not None and (type(value) is not int or not least <= value <= most):
            self.refuse(f"{where}: expected a whole number from {least} to {most}")
            return least
        return value or 0


def read(manifest: Mapping[str, Any]) -> Reading:
    """The manifest of one InferenceService; nothing is raised, whatever it holds."""
    reader = _Reader()
    metadata = manifest.get("metadata") or {}
    annotations = {str(key): str(value) for key, value in (metadata.get("annotations") or {}).items()}
    name, namespace = str(metadata.get("name", "")), str(metadata.get("namespace", ""))
    if not _NAME.fullmatch(name):
        reader.refuse(
            "metadata.name: a InferenceService name must consist of lower case alphanumeric characters or '-', and "
            f"must start with alphabetical character, found {name[:64]!r}"
        )
    whole = reader.object("spec", manifest.get("spec"))
    predictor = reader.object("spec.predictor", whole.get("predictor"))
    predictor, model = _model(reader, predictor)
    shown = {**whole, "predictor": {**predictor, "model": model}}
    reader.refusals += [f"{path} is not supported: {note}" for path, note in told(shown, Fate.REFUSED)]
    warnings = tuple(f"{path} has no effect: {note}" for path, note in told(shown, Fate.WARNED))
    where = "spec.predictor.model"
    model_format = reader.object(f"{where}.modelFormat", model.get("modelFormat"))
    format_name = reader.text(f"{where}.modelFormat.name", model_format.get("name"), 63)
    if not format_name and not reader.refusals:
        reader.refuse(f"{where}.modelFormat.name: expected the model's format")
    batcher = reader.object("spec.predictor.batcher", predictor.get("batcher"))
    at = "spec.predictor.batcher"
    percent = predictor.get("canaryTrafficPercent")
    spec = Spec(
        name,
        namespace,
        model_name=_model_name(reader, annotations),
        format=format_name,
        version=reader.text(f"{where}.modelFormat.version", model_format.get("version"), 63),
        **_storage(reader, model, annotations),
        runtime=reader.text(f"{where}.runtime", model.get("runtime"), 253)
        or annotations.get(f"{_SERVING}servingRuntime", ""),
        protocol=reader.text(f"{where}.protocolVersion", model.get("protocolVersion"), 63),
        placement=_placement(reader, predictor, annotations, namespace),
        max_queue_delay_us=1000 * reader.number(f"{at}.maxLatency", batcher.get("maxLatency")),
        preferred_batch_size=reader.number(f"{at}.maxBatchSize", batcher.get("maxBatchSize"), most=1 << 20),
        canary_percent=None
        if percent is None
        else reader.number("spec.predictor.canaryTrafficPercent", percent, most=100),
        reload=annotations.get(f"{_OURS}reload", "")[:256],
        stopped=annotations.get(f"{_SERVING}stop", "") == "true",
    )
    return Reading(spec, tuple(reader.refusals), warnings)


def _model(reader: _Reader, predictor: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The predictor without its implementation, and the implementation as `model`."""
    names = [name for name in ("model", *FRAMEWORKS) if predictor.get(name) is not None]
    if len(names) > 1 or (names and predictor.get("containers")):
        expected = ", ".join(("model", *FRAMEWORKS, "containers"))
        reader.refuse(f"spec.predictor: Exactly one of [{expected}] must be specified")
    if not names:
        if not predictor.get("containers"):
            reader.refuse("spec.predictor.model: expected the model that is to be served")
        return predictor, {}
    name = names[0]
    model = reader.object(f"spec.predictor.{name}", predictor[name])
    if name != "model":
        model = {**model, "modelFormat": {"name": name}}
    return {key: value for key, value in predictor.items() if key not in names}, model


def _storage(reader: _Reader, model: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
    where = "spec.predictor.model"
    uri = reader.text(f"{where}.storageUri", model.get("storageUri"))
    storage = reader.object(f"{where}.storage", model.get("storage"))
    parameters = reader.object(f"{where}.storage.parameters", storage.get("parameters"))
    for name, value in parameters.items():
        reader.text(f"{where}.storage.parameters.{name}", value)
    key = reader.text(f"{where}.storage.key", storage.get("key"), 253)
    key = key or annotations.get(f"{_SERVING}secretKey", "")
    path = reader.text(f"{where}.storage.path", storage.get("path"))
    if uri and storage.get("path"):
        reader.refuse(f"{where}: storageUri and storage.path are exclusive: keep one")
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] not in SCHEMES:
        reader.refuse(
            f"storageUri, must be one of: [{', '.join(f'{known}://' for known in SCHEMES)}] or match "
            "https://{}.blob.core.windows.net/{}/{} or be an absolute or relative local path. "
            f"StorageUri [{uri[:256]}] is not supported"
        )
    if not uri and not path and model:
        reader.refuse(f"{where}.storageUri: expected where the model lies, there or in {where}.storage.path")
    if path and not key:
        key = f"default_{parameters['type']}" if parameters.get("type") else "default"
    schema = reader.text(f"{where}.storage.schemaPath", storage.get("schemaPath"))
    return {
        "path": uri or path,
        "storage_key": key,
        "storage_params": {name: parameters[name] for name in _PARAMETERS if name in parameters},
        "schema_path": schema or annotations.get(f"{_SERVING}schemaPath", ""),
    }


def _placement(
    reader: _Reader, predictor: Mapping[str, Any], annotations: Mapping[str, str], namespace: str
) -> dict[str, Any]:
    where = "spec.predictor"
    least = reader.number(f"{where}.minReplicas", predictor.get("minReplicas"))
    most = reader.number(f"{where}.maxReplicas", predictor.get("maxReplicas"))
    if most and least > most:
        reader.refuse(f"{where}.minReplicas: 'MinReplicas' cannot be greater than MaxReplicas")
    placement: dict[str, Any] = {"tenant": _tenant(reader, annotations, namespace)}
    if predictor.get("minReplicas") == 0:
        placement["idle_unload_s"] = IDLE_UNLOAD_S
    for name, most_of_it in _MOST.items():
        told_of_it = annotations.get(_OURS + name)
        if told_of_it is not None:
            if not told_of_it.isascii() or not told_of_it.isdigit() or int(told_of_it) > most_of_it:
                reader.refuse(f"annotation {_OURS}{name}: expected a whole number from 0 to {most_of_it}")
            else:
                placement[name.replace("-", "_")] = int(told_of_it)
    placement |= {name: value for name, value in (("min_copies", least), ("max_copies", most)) if value}
    if (pinned := annotations.get(f"{_OURS}pinned", "false")) not in ("true", "false"):
        reader.refuse(f"annotation {_OURS}pinned: expected true or false")
    elif pinned == "true":
        placement["pinned"] = True
    if (priority := annotations.get(f"{_OURS}priority", "normal")) not in ("high", "normal", "low"):
        reader.refuse(f"annotation {_OURS}priority: expected high, normal or low")
    elif priority != "normal":
        placement["priority"] = priority
    if requires := annotations.get(f"{_OURS}requires", ""):
        labels = [label.partition("=") for label in requires.split(",")]
        if not all(name and value and " " not in name + value for name, _, value in labels):
            reader.refuse(f"annotation {_OURS}requires: expected labels as in gpu=h200,zone=a")
        else:
            placement["requires"] = {name: value for name, _, value in labels}
    return placement


def _tenant(reader: _Reader, annotations: Mapping[str, str], namespace: str) -> str:
    """A namespace cannot name another's tenant: its quota and its shares would be used up."""
    tenant = annotations.get(f"{_OURS}tenant", namespace)
    if tenant != namespace and (not tenant.startswith(f"{namespace}.") or not _MODEL_NAME.fullmatch(tenant)):
        reader.refuse(f"annotation {_OURS}tenant: expected the namespace {namespace!r}, or {namespace}.<part>")
    elif len(tenant) > 63:
        reader.refuse(f"annotation {_OURS}tenant: expected at most 63 characters")
    return tenant


def _model_name(reader: _Reader, annotations: Mapping[str, str]) -> str:
    name = annotations.get(f"{_OURS}model-name", "")
    if name and (not _MODEL_NAME.fullmatch(name) or "__isvc-" in name):
        reader.refuse(f"annotation {_OURS}model-name: expected up to 253 letters, digits, dots, dashes, underscores")
    return name
