"""A Kubernetes API server's objects: versions, generations, finalizers, subresources, and what watches are told."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tests.operator.fake_api.patches import patched

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


RESOURCES: Final = (
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "events", "Event"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource("serving.kserve.io", "v1beta1", "inferenceservices", "InferenceService", has_status=True),
    Resource("serving.kserve.io", "v1alpha1", "servingruntimes", "ServingRuntime", has_status=True),
    Resource("serving.kserve.io", "v1alpha1", "clusterservingruntimes", "ClusterServingRuntime", False, True),
)


class Refused(Exception):
    """An answer that is no success (apimachinery's `Status`)."""

    def __init__(self, code: int, reason: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.headers = headers

    def body(self) -> Object:
        told = {"status": "Failure", "code": self.code, "reason": self.reason, "message": str(self)}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, **told}


@dataclass(frozen=True, slots=True)
class Change:
    version: int
    type: str
    resource: Resource
    object: Object


class Objects:
    """All objects, and the changes that watches can still be told of."""

    def __init__(self) -> None:
        self._objects: dict[Resource, dict[tuple[str, str], Object]] = {resource: {} for resource in RESOURCES}
        self.version = 1
        self.changes: list[Change] = []
        self.oldest = 0
        """Watches from versions before this one are Gone."""
        self.changed = asyncio.Condition()

    def list(self, resource: Resource, namespace: str = "") -> list[Object]:
        found = self._objects[resource]
        return [found[key] for key in sorted(found) if namespace in ("", key[0])]

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource][(namespace, name)]
        except KeyError:
            raise Refused(404, "NotFound", f"{resource.plural} {name!r} not found") from None

    def create(self, resource: Resource, namespace: str, body: Mapping[str, Any]) -> Object:
        made = copy.deepcopy(dict(body))
        metadata = made.setdefault("metadata", {})
        name = metadata.get("name") or f"{metadata.pop('generateName', '')}{uuid.uuid4().hex[:5]}"
        if (namespace, name) in self._objects[resource]:
            raise Refused(409, "AlreadyExists", f"{resource.plural} {name!r} already exists")
        if resource.has_status:
            made.pop("status", None)
        if resource.namespaced:
            metadata["namespace"] = namespace
        metadata |= {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
        made = {"apiVersion": resource.api_version, "kind": resource.kind, **made}
        return self._put(resource, "ADDED", made)

    def replace(self, resource: Resource, namespace: str, name: str, body: Object, part: str = "") -> Object:
        return self._update(resource, self.get(resource, namespace, name), copy.deepcopy(body), part)

    def patch(self, resource: Resource, namespace: str, name: str, how: str, body: Any, part: str = "") -> Object:
        """`how`: the content type; a server-side apply makes what is not there."""
        if "apply-patch" in how and (namespace, name) not in self._objects[resource]:
            return self.create(resource, namespace, {**body, "metadata": {**body.get("metadata", {}), "name": name}})
        old = self.get(resource, namespace, name)
        try:
            new = patched(old, how, body)
        except ValueError as error:
            raise Refused(422, "Invalid", str(error)) from None
        return self._update(resource, old, new, part)

    def delete(self, resource: Resource, namespace: str, name: str) -> Object:
        old = self.get(resource, namespace, name)
        if not old["metadata"].get("finalizers"):
            return self._remove(resource, old)
        if old["metadata"].get("deletionTimestamp"):
            return old
        going = copy.deepcopy(old)
        going["metadata"] |= {
            "deletionTimestamp": _now(),
            "deletionGracePeriodSeconds": 0,
            "generation": old["metadata"]["generation"] + 1,
        }
        return self._put(resource, "MODIFIED", going)

    def since(self, resource: Resource, namespace: str, version: int) -> Iterator[Change]:
        for change in self.changes:
            there = change.resource is resource and change.version > version
            if there and namespace in ("", change.object["metadata"].get("namespace", "")):
                yield change

    def compact(self) -> None:
        """Forget what has changed: etcd's compaction."""
        self.changes.clear()
        self.oldest = self.version

    def _update(self, resource: Resource, old: Object, new: Object, part: str) -> Object:
        asked = new.get("metadata", {}).get("resourceVersion")
        if asked and asked != old["metadata"]["resourceVersion"]:
            raise Refused(
                409,
                "Conflict",
                f"Operation cannot be fulfilled on {resource.plural} {old['metadata']['name']!r}: the object has been "
                "modified; please apply your changes to the latest version and try again",
            )
        result = copy.deepcopy(old)
        if part == "status":
            if "status" in new:
                result["status"] = new["status"]
        else:
            kept = {"status": old["status"]} if resource.has_status and "status" in old else {}
            result = {**new, **kept} if resource.has_status else new
            if resource.has_status and not kept:
                result.pop("status", None)
            fixed = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "name", "namespace")
            result["metadata"] = {
                **{name: value for name, value in new.get("metadata", {}).items() if name not in fixed},
                **{name: old["metadata"][name] for name in fixed if name in old["metadata"]},
            }
            if _content(result) != _content(old):
                result["metadata"]["generation"] += 1
        result["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if result["metadata"].get("deletionTimestamp") and not result["metadata"].get("finalizers"):
            return self._remove(resource, result)
        if result == old:
            return old  # a write that changes nothing makes no version
        return self._put(resource, "MODIFIED", result)

    def _remove(self, resource: Resource, old: Object) -> Object:
        gone = self._put(resource, "DELETED", copy.deepcopy(old))
        metadata = gone["metadata"]
        del self._objects[resource][(metadata.get("namespace", ""), metadata["name"])]
        return gone

    def _put(self, resource: Resource, what: str, made: Object) -> Object:
        self.version += 1
        metadata = made["metadata"]
        metadata["resourceVersion"] = str(self.version)
        self._objects[resource][(metadata.get("namespace", ""), metadata["name"])] = made
        self.changes.append(Change(self.version, what, resource, made))
        return made


def _content(made: Object) -> Object:
    return {name: value for name, value in made.items() if name not in ("metadata", "status")}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
