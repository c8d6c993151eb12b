"""The objects over HTTP as a Kubernetes API server has them, with faults that a test asks for."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from tests.operator.fake_api.objects import RESOURCES, Object, Objects, Refused, Resource

_PART: Final = "status"


@dataclass
class Fault:
    """What is answered instead, to the next `times` requests with this method and this in their path."""

    method: str
    within: str
    code: int
    times: int
    headers: Mapping[str, str]


class FakeApi:
    """A server on a port of its own."""

    def __init__(self) -> None:
        self.objects = Objects()
        self.calls: Counter[tuple[str, str]] = Counter()
        """By method and resource; watches are WATCH."""
        self.faults: list[Fault] = []
        self.url = ""
        self._watches: set[asyncio.Task[Any]] = set()

    @property
    def total(self) -> int:
        """Requests, but those of watches."""
        return sum(count for (method, _), count in self.calls.items() if method != "WATCH")

    def fault(self, method: str, within: str, code: int, times: int = 1, **headers: str) -> Fault:
        """Answer so from now on; `within`: in the path."""
        fault = Fault(method, within, code, times, {name.replace("_", "-"): text for name, text in headers.items()})
        self.faults.append(fault)
        return fault

    def drop_watches(self) -> None:
        """End all of them as a lost connection does."""
        for task in self._watches:
            task.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeApi]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            self.drop_watches()
            await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except Refused as error:
            return web.json_response(error.body(), status=error.code, headers=error.headers)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.match_info["path"].strip("/").split("/")
        if (found := _discovery(parts)) is not None:
            return web.json_response(found)
        resource, namespace, name, part = _addressed(parts)
        watched = request.query.get("watch") in ("true", "1")
        method = "WATCH" if watched else request.method
        self.calls[(method, resource.plural)] += 1
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.within in request.path:
                fault.times -= 1
                raise Refused(fault.code, "Injected", "a fault of the test", **fault.headers)
        if watched:
            return await self._watch(request, resource, namespace)
        body = await request.json() if request.can_read_body else {}
        match request.method, bool(name):
            case "GET", False:
                return web.json_response(self._list(request, resource, namespace))
            case "GET", True:
                result = self.objects.get(resource, namespace, name)
            case "POST", False:
                result = self.objects.create(resource, namespace, body)
            case "PUT", True:
                result = self.objects.replace(resource, namespace, name, body, part)
            case "PATCH", True:
                how = request.headers.get("Content-Type", "")
                result = self.objects.patch(resource, namespace, name, how, body, part)
            case "DELETE", True:
                result = self.objects.delete(resource, namespace, name)
            case _:
                raise Refused(
                    405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
                )
        await self.notify()
        return web.json_response(result)

    async def notify(self) -> None:
        """Have watches look for what a test has changed directly."""
        async with self.objects.changed:
            self.objects.changed.notify_all()

    def _list(self, request: web.Request, resource: Resource, namespace: str) -> Object:
        items = [item for item in self.objects.list(resource, namespace) if _selected(request, item)]
        return {
            "kind": f"{resource.kind}List",
            "apiVersion": resource.api_version,
            "metadata": {"resourceVersion": str(self.objects.version)},
            "items": items,
        }

    async def _watch(self, request: web.Request, resource: Resource, namespace: str) -> web.StreamResponse:
        at = int(request.query.get("resourceVersion") or self.objects.version)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if at < self.objects.oldest:
            gone = Refused(410, "Expired", f"too old resource version: {at} ({self.objects.oldest})")
            await _send(response, "ERROR", gone.body())
            return response
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds") or 300)):
                while True:
                    for change in list(self.objects.since(resource, namespace, at)):
                        at = change.version
                        if _selected(request, change.object):
                            await _send(response, change.type, change.object)
                    if request.query.get("allowWatchBookmarks") == "true" and at < self.objects.version:
                        at = self.objects.version
                        bookmark = {"metadata": {"resourceVersion": str(at)}}
                        told = {"kind": resource.kind, "apiVersion": resource.api_version}
                        await _send(response, "BOOKMARK", {**told, **bookmark})
                    async with self.objects.changed:
                        if self.objects.version == at:
                            await self.objects.changed.wait()
        except (TimeoutError, ConnectionError):
            return response
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            return response
        finally:
            self._watches.discard(task)


async def _send(response: web.StreamResponse, what: str, told: Object) -> None:
    await response.write(json.dumps({"type": what, "object": told}).encode() + b"\n")


def _discovery(parts: list[str]) -> Object | None:
    """What the server has; None: something else is asked."""
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        groups: dict[str, list[str]] = {}
        for resource in RESOURCES:
            if resource.group and resource.version not in groups.setdefault(resource.group, []):
                groups[resource.group].append(resource.version)
        return {"kind": "APIGroupList", "groups": [_group(name, versions) for name, versions in groups.items()]}
    if parts == ["version"]:
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    version = "/".join(parts[1:])
    if (parts[0], len(parts)) not in (("api", 2), ("apis", 3)):
        return None
    found = [resource for resource in RESOURCES if resource.api_version == version]
    if not found:
        raise Refused(404, "NotFound", "the server could not find the requested resource")
    return {"kind": "APIResourceList", "groupVersion": version, "resources": [*_listed(found)]}


def _group(name: str, versions: list[str]) -> Object:
    told = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": told, "preferredVersion": told[0]}


def _listed(resources: list[Resource]) -> list[Object]:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    listed = []
    for resource in resources:
        told = {"kind": resource.kind, "namespaced": resource.namespaced, "singularName": resource.kind.lower()}
        listed.append({"name": resource.plural, "verbs": verbs, **told})
        if resource.has_status:
            listed.append({"name": f"{resource.plural}/{_PART}", "verbs": ["get", "patch", "update"], **told})
    return listed


def _addressed(parts: list[str]) -> tuple[Resource, str, str, str]:
    """Resource, namespace, name and part of a path."""
    group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name, part = [*rest, "", "", ""][:3]
    for resource in RESOURCES:
        if (resource.group, resource.version, resource.plural) == (group, version, plural):
            return resource, namespace, name, part
    raise Refused(404, "NotFound", "the server could not find the requested resource")


def _selected(request: web.Request, item: Object) -> bool:
    """Whether labels and fields are as asked; of selectors only the equalities."""
    labels = item["metadata"].get("labels") or {}
    for name, _, value in _pairs(request.query.get("labelSelector", "")):
        if labels.get(name) != value:
            return False
    for path, _, value in _pairs(request.query.get("fieldSelector", "")):
        found: Any = item
        for member in path.split("."):
            found = (found or {}).get(member)
        if found != value:
            return False
    return True


def _pairs(selector: str) -> list[tuple[str, str, str]]:
    return [part.replace("==", "=").partition("=") for part in selector.split(",") if part]
