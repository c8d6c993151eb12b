"""Has the plan of each InferenceService carried out: what is seen, what is to be done, what is told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from prometheus_client import Counter, Gauge

from mesh_operator.kube import KubeClient, KubeError, merge_patch, path_of
from mesh_operator.mesh import MeshClient, MeshError
from mesh_operator.plan import decide
from mesh_operator.queue import WorkQueue
from mesh_operator.runtimes import Runtime
from mesh_operator.status import rfc3339
from mesh_operator.world import FINALIZER, MODE_ANNOTATION, Event, Plan, Seen, Settings, is_marked, is_ours, vmodel_of

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name."""
Manifest = Mapping[str, Any]

TURNS: Final = Counter("densemesh_operator_turns", "Turns of InferenceServices, by how they ended.", ["end"])
CALLS: Final = Counter("densemesh_operator_mesh_calls", "Changes asked of the mesh.", ["call"])
QUEUED: Final = Gauge("densemesh_operator_queued", "InferenceServices that wait for a turn, or have it.")
KNOWN: Final = Gauge(
    "densemesh_operator_inferenceservices", "InferenceServices that are watched, of any deployment mode."
)
LEADS: Final = Gauge("densemesh_operator_leads", "1: this operator works; 0: it only watches.")

_ROUNDS: Final = 5
"""Of calls in one turn; the next turn goes on."""
_CACHED_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Places:
    """What is looked up in the cluster besides, as `namespace/name`; empty: it is not."""

    storage_config: str = ""
    """The secret with the storage keys, of which only the names are looked at."""
    kserve_config: str = "kserve/inferenceservice-config"
    """KServe's ConfigMap, which has the default deployment mode."""


class Reconciler:
    """Knows the InferenceServices and runtimes that a watch brings, and brings the mesh and their status in line.

    Whatever fails is tried again from the start, later and later; nothing has to be undone.
    """

    def __init__(self, kube: KubeClient, mesh: MeshClient, settings: Settings, places: Places) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self.leads = asyncio.Event()
        """Set: this operator works; else it only watches."""
        self._kube = kube
        self._mesh = mesh
        self._settings = settings
        self._places = places
        self._known: dict[Key, Manifest] = {}
        self._runtimes: dict[Key, Runtime] = {}
        self._applied: dict[Key, str] = {}
        self._cached: dict[str, tuple[float, Any]] = {}
        self._looking = asyncio.Lock()
        QUEUED.set_function(lambda: len(self.queue))
        KNOWN.set_function(lambda: len(self._known))
        LEADS.set_function(lambda: float(self.leads.is_set()))

    # What the watch brings

    def seen(self, manifest: Manifest) -> None:
        """An InferenceService as it is now. What our own patches have told already is no news."""
        key = _key(manifest)
        known = self._known.get(key)
        if known is not None and not _is_newer(manifest, known):
            return
        self._known[key] = manifest
        self.queue.add(key)

    def gone(self, manifest: Manifest) -> None:
        key = _key(manifest)
        self._known.pop(key, None)
        self._applied.pop(key, None)

    def runtime_seen(self, runtime: Runtime) -> None:
        key = (runtime.namespace, runtime.name)
        if self._runtimes.get(key) != runtime:
            self._runtimes[key] = runtime
            self._look_at(runtime.namespace)

    def runtime_gone(self, namespace: str, name: str) -> None:
        if self._runtimes.pop((namespace, name), None) is not None:
            self._look_at(namespace)

    def _look_at(self, namespace: str) -> None:
        for key in self._known:
            if namespace in ("", key[0]):
                self.queue.add(key)

    def resume(self) -> None:
        """Work from now on: another operator may have done so until now."""
        self._applied.clear()
        for key in self._known:
            self.queue.add(key)
        self.leads.set()

    def pause(self) -> None:
        self.leads.clear()

    # Work

    async def work(self) -> None:
        """Work on what is queued, until cancelled."""
        while True:
            key = await self.queue.take()
            await self.leads.wait()
            try:
                after_s = await self.reconcile(key)
                self.queue.succeeded(key)
                TURNS.labels("done").inc()
                if after_s is not None:
                    self.queue.add_later(key, after_s)
            except KubeError as error:
                TURNS.labels("conflict" if error.status == 409 else "kubernetes").inc()
                if error.status != 409:  # somebody else has changed it, and the watch will say what
                    log.warning("%s/%s: %s", *key, error)
                self.queue.failed(key)
            except Exception:
                TURNS.labels("bug").inc()
                log.exception("%s/%s: a bug of the operator", *key)
                self.queue.failed(key)
            finally:
                self.queue.done(key)

    async def reconcile(self, key: Key) -> float | None:
        """One turn; seconds until the next one is due if nothing changes, None: never.

        Raises:
            KubeError
        """
        manifest = self._known.get(key)
        if manifest is None:
            return None
        default_mode = await self._default_mode(manifest)
        if not is_marked(manifest) and not is_ours(manifest, default_mode):
            return None
        plan, seen = await self._carried_out(manifest, default_mode)
        if plan.status is not None:
            manifest = await self._tell(manifest, plan.status)
        for event in plan.events:
            await self._post(manifest, event, seen.now)
        if plan.finalizer is not None:
            await self._mark(manifest, plan.finalizer)
        return plan.requeue_s

    async def _carried_out(self, manifest: Manifest, default_mode: str) -> tuple[Plan, Seen]:
        """The plan that is left when all calls have been made."""
        key = _key(manifest)
        seen = Seen(
            manifest,
            tuple(self._runtimes.values()),
            datetime.now(UTC),
            applied=self._applied.get(key, ""),
            storage_keys=await self._storage_keys(),
            default_mode=default_mode,
        )
        if is_marked(manifest):
            try:
                seen = replace(seen, vmodel=await self._mesh.vmodel(*vmodel_of(manifest, self._settings)))
            except MeshError as error:
                seen = replace(seen, problem=error.problem)
        plan = decide(seen, self._settings)
        for _ in range(_ROUNDS):
            if not plan.calls:
                return plan, seen
            seen = replace(seen, asked=True, applied=plan.applied or seen.applied)
            try:
                for call in plan.calls:
                    CALLS.labels(type(call).__name__).inc()
                    seen = replace(seen, vmodel=await self._mesh.carry_out(call))
                self._applied[key] = seen.applied
            except MeshError as error:
                seen = replace(seen, problem=error.problem)
            plan = decide(seen, self._settings)
        return Plan(requeue_s=1.0), seen

    async def _tell(self, manifest: Manifest, status: Mapping[str, Any]) -> Manifest:
        patch = merge_patch(manifest.get("status") or {}, status)
        if not patch:
            return manifest
        body = {"metadata": {"resourceVersion": _version(manifest)}, "status": patch}
        return self._patched(await self._kube.patch(path_of(*_key(manifest), "status"), body))

    async def _mark(self, manifest: Manifest, marked: bool) -> None:
        others = [name for name in manifest["metadata"].get("finalizers") or () if name != FINALIZER]
        metadata = {
            "resourceVersion": _version(manifest),
            "finalizers": [*others, FINALIZER] if marked else others or None,
        }
        try:
            self._patched(await self._kube.patch(path_of(*_key(manifest)), {"metadata": metadata}))
        except KubeError as error:
            if error.status != 404:
                raise

    def _patched(self, manifest: Manifest) -> Manifest:
        """What the server has made of our patch; the watch brings it once more."""
        key = _key(manifest)
        if key in self._known:
            self._known[key] = manifest
        return manifest

    async def _post(self, manifest: Manifest, event: Event, now: datetime) -> None:
        """An event of an InferenceService; it is told once, and lost if the server does not take it."""
        metadata, at = manifest["metadata"], rfc3339(now)
        about = {
            "apiVersion": manifest.get("apiVersion", "serving.kserve.io/v1beta1"),
            "kind": "InferenceService",
            **{name: metadata[name] for name in ("namespace", "name", "uid", "resourceVersion") if name in metadata},
        }
        body = {
            "metadata": {"generateName": f"{metadata['name']}-", "namespace": metadata["namespace"]},
            "involvedObject": about,
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "source": {"component": "densemesh-operator"},
            "reportingComponent": "densemesh-operator",
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
        try:
            await self._kube.create(f"/api/v1/namespaces/{metadata['namespace']}/events", body)
        except KubeError as error:
            log.warning("%s/%s: event %s: %s", *_key(manifest), event.reason, error)

    # What else is looked up

    async def _default_mode(self, manifest: Manifest) -> str:
        """Where the InferenceService does not say; "": it is nobody's."""
        annotations = manifest["metadata"].get("annotations") or {}
        if (manifest.get("status") or {}).get("deploymentMode") or annotations.get(MODE_ANNOTATION):
            return ""
        return str(await self._lookup("configmaps", self._places.kserve_config, _default_mode_in) or "")

    async def _storage_keys(self) -> frozenset[str] | None:
        found = await self._lookup(
            "secrets", self._places.storage_config, lambda told: frozenset(told.get("data") or ())
        )
        return None if found is None else frozenset(found)

    async def _lookup(self, kind: str, place: str, read: Callable[[Mapping[str, Any]], Any]) -> Any:
        """What is read of an object, or of an empty one if there is none, for a while; None: we are not to know."""
        if not place:
            return None
        async with self._looking:
            now, (until, value) = asyncio.get_running_loop().time(), self._cached.get(place, (0.0, None))
            if now < until:
                return value
            namespace, _, name = place.partition("/")
            try:
                value = read(await self._kube.get(f"/api/v1/namespaces/{namespace}/{kind}/{name}") or {})
            except KubeError as error:
                if error.status != 403:
                    raise
                log.warning("%s %s: %s", kind, place, error)
                value = None
            self._cached[place] = (now + _CACHED_S, value)
            return value


def _default_mode_in(config: Mapping[str, Any]) -> str:
    """`deploy.defaultDeploymentMode` of KServe's ConfigMap."""

    try:
        return str(json.loads((config.get("data") or {}).get("deploy", "{}")).get("defaultDeploymentMode", ""))
    except (ValueError, AttributeError):
        return ""


def _key(manifest: Manifest) -> Key:
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]


def _is_newer(manifest: Manifest, known: Manifest) -> bool:
    """Versions of one object are numbers that grow (KEP-5504); whatever else they may be, another one is newer."""
    version, old = _version(manifest), _version(known)
    return int(version) > int(old) if version.isdigit() and old.isdigit() else version != old


def _version(manifest: Manifest) -> str:
    return str(manifest["metadata"].get("resourceVersion", ""))
