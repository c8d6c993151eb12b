"""Which ServingRuntime serves a model, by KServe's rules (`predictor_model.go`), in its words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mesh_operator.inferenceservice import Spec

IN_PROCESS: Final = "densemesh.io/in-process"
"""Annotation of the runtimes that are the mesh's own loaders: no server beside the pods."""


@dataclass(frozen=True, slots=True)
class SupportedFormat:
    name: str
    version: str = ""
    auto_select: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """A ServingRuntime, or without a namespace a ClusterServingRuntime."""

    name: str
    namespace: str = ""
    created: str = ""
    disabled: bool = False
    multi_model: bool = False
    in_process: bool = False
    protocols: tuple[str, ...] = ()
    formats: tuple[SupportedFormat, ...] = ()


class NoRuntime(Exception):
    """No runtime serves the model; `reason` is one of `lastFailureInfo`'s."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def runtime_of(manifest: Mapping[str, Any]) -> Runtime:
    """A (Cluster)ServingRuntime's manifest; the CRD's schema holds, as it comes from the API server."""
    metadata, spec = manifest["metadata"], manifest.get("spec") or {}
    formats = tuple(
        SupportedFormat(
            entry["name"], entry.get("version") or "", bool(entry.get("autoSelect")), int(entry.get("priority") or 0)
        )
        for entry in spec.get("supportedModelFormats") or ()
    )
    return Runtime(
        metadata["name"],
        metadata.get("namespace") or "",
        metadata.get("creationTimestamp") or "",
        bool(spec.get("disabled")),
        bool(spec.get("multiModel")),
        (metadata.get("annotations") or {}).get(IN_PROCESS) == "true",
        tuple(spec.get("protocolVersions") or ()),
        formats,
    )


def select(spec: Spec, runtimes: Iterable[Runtime]) -> Runtime:
    """The runtime for the model: the namespace's before the cluster's, by priority, the newest first.

    Raises:
        NoRuntime
    """
    within = [runtime for runtime in runtimes if runtime.namespace in (spec.namespace, "")]
    if spec.runtime:
        return _named(spec, within)
    fitting = [
        runtime
        for runtime in within
        if not runtime.disabled and runtime.multi_model and _speaks(runtime, spec) and _matching(runtime, spec, True)
    ]
    if not fitting:
        version = f":{spec.version}" if spec.version else ""
        protocol = f" with protocol version {spec.protocol}" if spec.protocol else ""
        raise NoRuntime(
            "NoSupportingRuntime",
            f"No runtime found to support specified framework/version: {spec.format}{version}{protocol}",
        )
    fitting.sort(key=lambda runtime: runtime.name)
    fitting.sort(key=lambda runtime: runtime.created, reverse=True)
    fitting.sort(key=lambda runtime: -max(entry.priority for entry in _matching(runtime, spec, True)))
    fitting.sort(key=lambda runtime: not runtime.namespace)
    return fitting[0]


def _named(spec: Spec, runtimes: Sequence[Runtime]) -> Runtime:
    named = sorted((runtime for runtime in runtimes if runtime.name == spec.runtime), key=lambda r: not r.namespace)
    if not named:
        raise NoRuntime(
            "RuntimeNotRecognized",
            f"Waiting for runtime to become available: there is no ServingRuntime or ClusterServingRuntime "
            f"{spec.runtime!r}",
        )
    runtime = named[0]
    if runtime.disabled:
        raise NoRuntime("RuntimeDisabled", f"Specified runtime is disabled: {runtime.name}")
    if not runtime.multi_model:
        raise NoRuntime(
            "NoSupportingRuntime", f"Specified runtime is not for several models (multiModel): {runtime.name}"
        )
    if not _speaks(runtime, spec):
        raise NoRuntime(
            "NoSupportingRuntime",
            f"Specified runtime does not support specified protocol version: {runtime.name}, {spec.protocol}",
        )
    if not _matching(runtime, spec, False):
        version = f":{spec.version}" if spec.version else ""
        raise NoRuntime(
            "NoSupportingRuntime",
            f"Specified runtime does not support specified framework/version: {runtime.name}, {spec.format}{version}",
        )
    return runtime


def _speaks(runtime: Runtime, spec: Spec) -> bool:
    return not spec.protocol or not runtime.protocols or spec.protocol in runtime.protocols


def _matching(runtime: Runtime, spec: Spec, automatically: bool) -> list[SupportedFormat]:
    """A model without a version fits any; one with a version fits only that."""
    return [
        entry
        for entry in runtime.formats
        if entry.name == spec.format
        and (not spec.version or entry.version == spec.version)
        and (entry.auto_select or not automatically)
    ]
