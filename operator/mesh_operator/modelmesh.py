"""What ModelMesh's objects become: InferenceServices, Predictors, ServingRuntimes, `storage-config`, its configuration.

Pure. Manifests are as `kubectl get -o yaml` prints them, and may hold anything; of Secrets, no value is kept or told.
"""

from __future__ import annotations

import base64
import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from mesh_operator.fields import ANNOTATIONS, Fate, told
from mesh_operator.inferenceservice import FRAMEWORKS, read

Manifest = dict[str, Any]

KSERVE: Final = "serving.kserve.io"
MODE: Final = f"{KSERVE}/deploymentMode"
MODEL_NAME: Final = "densemesh.io/model-name"
_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"

_PREDICTOR: Final = {"modelType", "path", "schemaPath", "storage", "runtime", "protocolVersion", "gpu"}
_PREDICTOR_STORAGE: Final = {"key", "secretKey", "path", "schemaPath", "parameters", "s3", "persistentVolumeClaim"}

_SETTINGS: Final[Mapping[str, str]] = {
    "podsPerRuntime": "replicas of the StatefulSet; one set of pods serves all formats",
    "inferenceServiceName": "the alias for the old Service's name",
    "inferenceServicePort": "the Services' port",
    "headlessService": "the Service densemesh-pods is headless, densemesh is not",
    "grpcMaxMessageSizeBytes": "DENSEMESH_MAX_MESSAGE",
    "metrics.enabled": "metrics are always served",
    "metrics.port": "DENSEMESH_METRICS_PORT",
    "metrics.disablePrometheusOperatorSupport": "leave components/monitoring out",
    "tls.secretName": "components/tls; or mount this Secret where it mounts its own",
    "tls.clientAuth": "DENSEMESH_TLS_CLIENT_CA, for mutual TLS",
    "storageSecretName": "the Secret that the StatefulSet mounts",
    "allowAnyPVC": "claims are mounted in the pods, below --pvc-root/<claim>",
    "runtimePodLabels": "a patch of the StatefulSet",
    "runtimePodAnnotations": "a patch of the StatefulSet",
    "imagePullSecrets": "a patch of the StatefulSet",
    "serviceAccountName": "annotations of the ServiceAccount densemesh",
    "modelMeshResources": "nothing: there is one container, with components' settings for its resources",
    "storageHelperResources": "nothing: the pod fetches models itself",
    "modelMeshImage": "nothing: there is one image",
    "storageHelperImage": "nothing: the pod fetches models itself",
}
"""Of ConfigMap `model-serving-config`: what takes each one's place."""
_NO_SETTINGS: Final[Mapping[str, str]] = {
    "restProxy": "the mesh serves gRPC; REST is still to come",
    "scaleToZero": "pods stay, or are scaled by components/autoscaling; models can go when idle (idle_unload_s)",
    "payloadProcessors": "payloads are not handed on",
    "enableAccessLogging": "requests are counted, not logged",
    "metrics.scheme": "metrics are plain HTTP",
    "metrics": "there is no such setting",
    "internalModelMeshEnvVars": "tuning of ModelMesh's own code",
}

_NO_STORAGE: Final[Mapping[str, str]] = {
    "connection_string": "use account_name with account_key or sas_key",
    "cabundle_configmap": "use certificate, with the PEM text",
    "client_certificate": "client certificates are for HDFS only",
    "client_key": "client certificates are for HDFS only",
    "kerberos_principal": "Kerberos is not spoken",
}
"""Fields of storage keys that have no effect."""


@dataclass(frozen=True, slots=True)
class Line:
    """What becomes of one field; `fate` is HONOURED also where it is told in another way."""

    path: str
    fate: Fate
    note: str


@dataclass(slots=True)
class Entry:
    """What becomes of one object."""

    kind: str
    namespace: str
    name: str
    lines: list[Line] = field(default_factory=list)
    skipped: str = ""
    """Why it is not looked at."""

    def say(self, fate: Fate, path: str, note: str) -> None:
        self.lines.append(Line(path, fate, note))

    @property
    def is_refused(self) -> bool:
        return any(line.fate is Fate.REFUSED for line in self.lines)


@dataclass(slots=True)
class Migration:
    """All of it: what is said, and what is to be applied."""

    entries: list[Entry] = field(default_factory=list)
    inference_services: list[Manifest] = field(default_factory=list)
    aliases: list[Manifest] = field(default_factory=list)
    """Services under ModelMesh's names, for clients that are to stay as they are."""
    settings: dict[str, str] = field(default_factory=dict)
    """For the ConfigMap `densemesh`."""
    service: str = "modelmesh-serving"
    """What clients call."""


def migrate(manifests: Iterable[Any], formats: Collection[str]) -> Migration:
    """Everything that is in `manifests`; `formats` are those that the mesh's own loaders serve."""
    found = [each for manifest in manifests for each in _unlisted(manifest)]
    migration = Migration()
    runtimes = {
        _name(manifest)[2]: sorted(_formats(manifest) - set(formats))
        for manifest in found
        if manifest.get("kind") in ("ServingRuntime", "ClusterServingRuntime") and not _unused(manifest)
    }
    for manifest in found:
        entry = Entry(*_name(manifest))
        migration.entries.append(entry)
        how = _KINDS.get((str(manifest.get("apiVersion", "")).partition("/")[0], entry.kind))
        if how is None:
            entry.skipped = "not one of ModelMesh's"
        else:
            how(_Step(migration, entry, manifest, formats, runtimes))
    _name_models(migration)
    migration.aliases = [
        _alias(migration.service, namespace)
        for namespace in sorted({isvc["metadata"].get("namespace", "") for isvc in migration.inference_services})
    ]
    return migration


@dataclass(frozen=True, slots=True)
class _Step:
    migration: Migration
    entry: Entry
    manifest: Manifest
    formats: Collection[str]
    runtimes: Mapping[str, list[str]]
    """Formats that only this runtime has, by its name."""

    @property
    def spec(self) -> Manifest:
        return _object(self.manifest.get("spec"))


def _inference_service(step: _Step) -> None:
    metadata = _object(step.manifest.get("metadata"))
    mode = _object(step.manifest.get("status")).get("deploymentMode") or _object(metadata.get("annotations")).get(MODE)
    if mode != "ModelMesh":
        step.entry.skipped = f"its deployment mode is {mode or 'not told'}, not ModelMesh"
        return
    _take(step, _cleaned(step.manifest, f"{KSERVE}/v1beta1", "InferenceService", step.spec))


def _predictor(step: _Step) -> None:
    """Predictor v1alpha1 says the same in other words."""
    spec, entry = step.spec, step.entry
    model_type, storage = _object(spec.get("modelType")), _object(spec.get("storage"))
    s3, claim = _object(storage.get("s3")), _object(storage.get("persistentVolumeClaim"))
    parameters = dict(_object(storage.get("parameters")))
    if s3.get("bucket"):
        parameters["bucket"] = s3["bucket"]
    if claim:
        parameters |= {"type": "pvc", "name": claim.get("claimName", "")}
    told_storage = {
        "key": storage.get("key") or storage.get("secretKey") or s3.get("secretKey"),
        "path": storage.get("path") or spec.get("path"),
        "schemaPath": storage.get("schemaPath") or spec.get("schemaPath"),
        "parameters": parameters,
    }
    model = {
        "modelFormat": model_type,
        "storage": {name: value for name, value in told_storage.items() if value},
        "runtime": _object(spec.get("runtime")).get("name"),
        "protocolVersion": spec.get("protocolVersion"),
    }
    for name in sorted(spec.keys() - _PREDICTOR):
        entry.say(Fate.WARNED, f"spec.{name}", "it is unknown")
    for name in sorted(storage.keys() - _PREDICTOR_STORAGE):
        entry.say(Fate.WARNED, f"spec.storage.{name}", "it is unknown")
    if spec.get("gpu"):
        entry.say(Fate.WARNED, "spec.gpu", "use the annotation densemesh.io/requires with labels of the mesh's pods")
    entry.say(Fate.HONOURED, "kind", "becomes an InferenceService")
    new = {"predictor": {"model": {name: value for name, value in model.items() if value}}}
    _take(step, _cleaned(step.manifest, f"{KSERVE}/v1beta1", "InferenceService", new))


def _take(step: _Step, isvc: Manifest) -> None:
    """Fit an InferenceService to the mesh's runtimes, and say what becomes of its fields."""
    entry, migration = step.entry, step.migration
    isvc["metadata"].setdefault("annotations", {})[MODE] = "ModelMesh"
    predictor = _object(isvc["spec"].get("predictor"))
    for framework in FRAMEWORKS:
        if "model" not in predictor and isinstance(predictor.get(framework), dict):
            predictor["model"] = {"modelFormat": {"name": framework}, **predictor.pop(framework)}
            entry.say(Fate.HONOURED, f"spec.predictor.{framework}", "becomes spec.predictor.model")
    model = _object(predictor.get("model"))
    annotations = isvc["metadata"]["annotations"]
    for annotation in sorted(annotations):
        if annotation.startswith(f"{KSERVE}/") and annotation not in ANNOTATIONS:
            entry.say(Fate.WARNED, f"metadata.annotations.{annotation}", "it has no effect")
    name = read(isvc).spec.format
    runtime = read(isvc).spec.runtime
    if name in step.formats and runtime:
        model.pop("runtime", None)
        annotations.pop(f"{KSERVE}/servingRuntime", None)
        note = f"left out: the mesh serves {name} in place of {runtime}"
        entry.say(Fate.HONOURED, "spec.predictor.model.runtime", note)
    elif name and name not in step.formats and not any(name in only for only in step.runtimes.values()):
        entry.say(Fate.REFUSED, "spec.predictor.model.modelFormat", f"nothing here serves {name}")
    if name in step.formats and _object(model.get("modelFormat")).pop("version", None):
        entry.say(Fate.HONOURED, "spec.predictor.model.modelFormat.version", "left out: the mesh serves any")
    reading = read(isvc)
    for path, note in told(isvc["spec"], Fate.HONOURED):
        entry.say(Fate.HONOURED, path, note)
    for sentence in reading.warnings:
        path, _, note = sentence.partition(" has no effect: ")
        entry.say(Fate.WARNED, path, note)
    for sentence in reading.refusals:
        path, _, note = sentence.partition(": ")
        entry.say(Fate.REFUSED, path, note)
    if any(_name(there) == _name(isvc) for there in migration.inference_services):
        entry.say(Fate.REFUSED, "metadata.name", "there is another model of this name: rename one")
    if not entry.is_refused:
        migration.inference_services.append(isvc)


def _runtime(step: _Step) -> None:
    entry, spec = step.entry, step.spec
    entry.skipped = _unused(step.manifest)
    if entry.skipped:
        return
    for name in sorted(_formats(step.manifest) & set(step.formats)):
        entry.say(Fate.HONOURED, f"supportedModelFormats {name}", "served by the mesh itself")
    if only := step.runtimes[entry.name]:
        pulls = " --runtime-pulls true" if _object(spec.get("storageHelper")).get("disabled") is True else ""
        data = f" --runtime-data {spec['grpcDataEndpoint']}" if spec.get("grpcDataEndpoint") else ""
        entry.say(
            Fate.WARNED,
            f"supportedModelFormats {', '.join(only)}",
            "only this runtime serves them: run it, with its adapter, beside the pods, which need "
            f"--runtime {entry.name}={spec.get('grpcEndpoint') or 'port:8085'}{data} "
            f"--runtime-formats {','.join(only)}{pulls}",
        )
    else:
        entry.say(Fate.HONOURED, "containers", "not needed any more")


def _secret(step: _Step) -> None:
    if step.entry.name != "storage-config":
        step.entry.skipped = "only storage-config is looked at"
        return
    encoded, plain = _object(step.manifest.get("data")), _object(step.manifest.get("stringData"))
    for key in sorted(encoded.keys() | plain.keys()):
        value = _parsed(plain[key] if key in plain else encoded[key], decode=key not in plain)
        if value is None:
            step.entry.say(Fate.REFUSED, key, "expected a JSON object")
            continue
        step.entry.say(Fate.HONOURED, key, "copy it to the Secret storage-config beside the mesh")
        for name in sorted(value.keys() & _NO_STORAGE.keys()):
            step.entry.say(Fate.WARNED, f"{key}.{name}", _NO_STORAGE[name])
    for other in step.migration.entries:
        if other is step.entry or (other.kind, other.name) != ("Secret", "storage-config"):
            continue
        for key in sorted({line.path for line in other.lines} & (encoded.keys() | plain.keys())):
            step.entry.say(Fate.WARNED, key, f"also in namespace {other.namespace}: a mesh has one of each name")


def _configuration(step: _Step) -> None:
    if step.entry.name not in ("model-serving-config", "model-serving-config-defaults"):
        step.entry.skipped = "only model-serving-config is looked at"
        return
    try:
        told_of_it = yaml.safe_load(_object(step.manifest.get("data")).get("config.yaml") or "{}")
    except (yaml.YAMLError, AttributeError, RecursionError):
        told_of_it = None
    if not isinstance(told_of_it, dict):
        step.entry.say(Fate.REFUSED, "data.config.yaml", "expected a YAML mapping")
        return
    for path, value in _flat(told_of_it):
        note = _SETTINGS.get(path)
        if note is not None:
            step.entry.say(Fate.HONOURED, path, note)
        else:
            lost = _NO_SETTINGS.get(path) or _NO_SETTINGS.get(path.partition(".")[0]) or "it is unknown"
            step.entry.say(Fate.WARNED, path, lost)
        if path == "grpcMaxMessageSizeBytes" and type(value) is int:
            step.migration.settings["DENSEMESH_MAX_MESSAGE"] = str(value)
        elif path == "metrics.port" and type(value) is int and value != 2112:
            step.migration.settings["DENSEMESH_METRICS_PORT"] = str(value)
        elif path == "inferenceServiceName" and isinstance(value, str):
            step.migration.service = value


_KINDS: Final[Mapping[tuple[str, str], Callable[[_Step], None]]] = {
    (KSERVE, "InferenceService"): _inference_service,
    (KSERVE, "Predictor"): _predictor,
    (KSERVE, "ServingRuntime"): _runtime,
    (KSERVE, "ClusterServingRuntime"): _runtime,
    ("v1", "Secret"): _secret,
    ("v1", "ConfigMap"): _configuration,
}


def _name_models(migration: Migration) -> None:
    """Clients go on to say the InferenceService's name, where no two namespaces have it."""
    names = Counter(isvc["metadata"]["name"] for isvc in migration.inference_services)
    entries = {(entry.namespace, entry.name): entry for entry in migration.entries}
    for isvc in migration.inference_services:
        _, namespace, name = _name(isvc)
        if names[name] == 1:
            isvc["metadata"]["annotations"].setdefault(MODEL_NAME, name)
        else:
            note = f"another namespace has it too: clients must say {namespace}.{name}, or set {MODEL_NAME}"
            entries[namespace, name].say(Fate.WARNED, "metadata.name", note)


def _alias(name: str, namespace: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, **({"namespace": namespace} if namespace else {})},
        "spec": {"type": "ExternalName", "externalName": "densemesh.densemesh.svc.cluster.local"},
    }


def _cleaned(manifest: Manifest, version: str, kind: str, spec: Manifest) -> Manifest:
    """Without what the API server and kubectl added."""
    old = _object(manifest.get("metadata"))
    metadata: Manifest = {name: old[name] for name in ("name", "namespace", "labels") if old.get(name)}
    annotations = {name: value for name, value in _object(old.get("annotations")).items() if name != _APPLIED}
    metadata["annotations"] = annotations
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": copy.deepcopy(spec)}


def _unused(manifest: Manifest) -> str:
    """Why ModelMesh does not use a runtime; empty: it does."""
    spec = _object(manifest.get("spec"))
    if spec.get("multiModel") is not True:
        return "it is not for several models"
    return "it is disabled" if spec.get("disabled") is True else ""


def _formats(manifest: Manifest) -> set[str]:
    entries = _object(manifest.get("spec")).get("supportedModelFormats")
    return {str(_object(entry).get("name")) for entry in (entries if isinstance(entries, list) else ())}


def _unlisted(manifest: Any) -> list[Manifest]:
    """The items of a List; what is no object is none."""
    found = _object(manifest)
    items = found.get("items") if str(found.get("kind", "")).endswith("List") else [found]
    return [item for item in (items if isinstance(items, list) else ()) if isinstance(item, dict) and item]


def _name(manifest: Manifest) -> tuple[str, str, str]:
    metadata = _object(manifest.get("metadata"))
    return str(manifest.get("kind", "")), str(metadata.get("namespace", "")), str(metadata.get("name", ""))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Mapping[str, Any], at: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves by path; what the tables name as a whole is one."""
    for name in sorted(value, key=str):
        path = f"{at}{name}"
        inner = value[name]
        if isinstance(inner, dict) and any(known.startswith(f"{path}.") for known in (*_SETTINGS, *_NO_SETTINGS)):
            yield from _flat(inner, f"{path}.")
        else:
            yield path, inner


def _parsed(value: Any, decode: bool) -> dict[str, Any] | None:
    """A storage key's JSON object; None: it is none."""
    try:
        found = json.loads(base64.b64decode(value, validate=True) if decode else value)
    except (TypeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
