"""Operators in processes of their own, between a fake API server and a mesh of real pods in this one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, request_for
from tests.operator.fake_api.objects import RESOURCES, Object
from tests.operator.fake_api.server import FakeApi
from tests.operator.manifests import isvc

TIMEOUT_S: Final = 30.0
ROOT: Final = Path(__file__).resolve().parents[2]
NAMESPACE: Final = "news"
BY_PLURAL: Final = {resource.plural: resource for resource in RESOURCES}
ISVC: Final = BY_PLURAL["inferenceservices"]


class Rig:
    """A cluster, a mesh, and operators between them."""

    def __init__(self, api: FakeApi, mesh: Mesh, folder: Path) -> None:
        self.api = api
        self.mesh = mesh
        self.target = mesh.pods["a"].address
        self._folder = folder
        self._operators: dict[str, asyncio.subprocess.Process] = {}

    @property
    def client(self) -> Client:
        return self.mesh.clients["a"]

    # The cluster

    async def create(self, plural: str, body: Mapping[str, Any], namespace: str = NAMESPACE) -> Object:
        resource = BY_PLURAL[plural]
        made = self.api.objects.create(resource, namespace if resource.namespaced else "", body)
        await self.api.notify()
        return made

    async def apply(self, manifest: Mapping[str, Any]) -> Object:
        """`kubectl apply` of an InferenceService: made, or its spec and annotations replaced."""
        metadata = manifest["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        if not self.has(name, namespace):
            return await self.create("inferenceservices", manifest, namespace)
        old = self.get(name, namespace)
        told = {"annotations": metadata["annotations"], "finalizers": old["metadata"].get("finalizers")}
        body = {**old, "spec": manifest["spec"], "metadata": {**old["metadata"], **told}}
        body["metadata"].pop("resourceVersion")
        made = self.api.objects.replace(ISVC, namespace, name, body)
        await self.api.notify()
        return made

    async def delete(self, name: str = "fraud", namespace: str = NAMESPACE) -> None:
        self.api.objects.delete(ISVC, namespace, name)
        await self.api.notify()

    def has(self, name: str = "fraud", namespace: str = NAMESPACE) -> bool:
        return any(found["metadata"]["name"] == name for found in self.api.objects.list(ISVC, namespace))

    def get(self, name: str = "fraud", namespace: str = NAMESPACE) -> Object:
        return self.api.objects.get(ISVC, namespace, name)

    def condition(self, of: str = "Ready", name: str = "fraud") -> tuple[str, str]:
        """Status and reason."""
        found = (self.get(name).get("status") or {}).get("conditions") or ()
        entry: dict[str, str] = next((entry for entry in found if entry["type"] == of), {})
        return entry.get("status", ""), entry.get("reason", "")

    def model_status(self, name: str = "fraud") -> dict[str, Any]:
        return dict((self.get(name).get("status") or {}).get("modelStatus") or {})

    async def told(self, *reasons: str, name: str = "fraud") -> None:
        """Return when exactly these events, in this order, have come since the start."""
        await self.becomes(lambda: self.reasons(name) == list(reasons))

    def reasons(self, name: str = "fraud") -> list[str]:
        """Of the events of an InferenceService, in order."""
        events = sorted(self.api.objects.list(BY_PLURAL["events"]), key=lambda e: int(e["metadata"]["resourceVersion"]))
        return [event["reason"] for event in events if event["involvedObject"]["name"] == name]

    async def becomes(self, holds: Callable[[], bool]) -> None:
        """Return when something holds after a change in the cluster."""
        changed = self.api.objects.changed
        try:
            async with asyncio.timeout(TIMEOUT_S), changed:
                while not holds():
                    await changed.wait()
        except TimeoutError:
            shown = json.dumps([found.get("status") for found in self.api.objects.list(ISVC)], indent=1)
            raise AssertionError(f"it never became so; status: {shown[:4000]}") from None

    async def ready(self, name: str = "fraud", status: str = "True") -> None:
        await self.becomes(lambda: self.condition(name=name)[0] == status)

    async def infer(self, model: str = "news.fraud") -> None:
        answer = await self.client.call("ModelInfer", request_for(model))
        assert answer.model_name == model

    async def active(self, model: str = "news.fraud") -> str:
        """Where the model that serves lies."""
        status = await self.client.call("getVModelStatus", mm.GetVModelStatusRequest(vModelId=model))
        found = self.mesh.pods["a"].engine.view.models.get(status.activeModelId)
        return "" if found is None else found.path

    # Operators

    async def start(self, operator: str = "1", *options: str, lease: bool = False) -> None:
        """Start an operator's process and wait until it watches."""
        watches = self.api.calls[("WATCH", "inferenceservices")]
        told = ["--mesh", self.target, "--grpc-url", "grpc://mesh:8033", "--metrics-port", "0", "--health-port", "0"]
        told += ["--lease-s", "1.5"] if lease else ["--lease", ""]
        with (self._folder / f"operator-{operator}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mesh_operator",
                *told,
                *options,
                cwd=ROOT / "operator",
                stdout=log,
                stderr=log,
                env={**os.environ, "KUBECONFIG": str(self._folder / "kubeconfig"), "PYTHONPATH": str(ROOT)},
            )
        self._operators[operator] = process
        async with asyncio.timeout(TIMEOUT_S):
            while self.api.calls[("WATCH", "inferenceservices")] == watches:
                assert process.returncode is None, self.log(operator)
                await asyncio.sleep(0.02)

    def log(self, operator: str = "1") -> str:
        return (self._folder / f"operator-{operator}.log").read_text()

    async def stop(self, operator: str = "1") -> None:
        """As Kubernetes does."""
        process = self._operators.pop(operator)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0, self.log(operator)

    async def kill(self, operator: str = "1") -> None:
        """In the middle of whatever it does."""
        process = self._operators.pop(operator)
        process.kill()
        await process.wait()

    async def close(self) -> None:
        for operator in list(self._operators):
            await self.kill(operator)
        for log in self._folder.glob("operator-*.log"):
            assert "a bug of the operator" not in log.read_text(), log.read_text()


@asynccontextmanager
async def rigged(folder: Path, loads: Loads, **settings: Any) -> AsyncIterator[Rig]:
    """A cluster with the mesh's runtime, and a pod `a`; the operator is a test's to start."""
    mesh = Mesh(loads)
    await mesh.start("a", **settings)
    try:
        async with FakeApi().running() as api:
            (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig(api.url)))
            rig = Rig(api, mesh, folder)
            for name in (NAMESPACE, "sports", "kserve"):
                await rig.create("namespaces", {"metadata": {"name": name}})
            await rig.create("clusterservingruntimes", runtime_manifest())
            try:
                yield rig
            finally:
                await rig.close()
    finally:
        await mesh.close()


def runtime_manifest(name: str = "densemesh") -> dict[str, Any]:
    formats = [{"name": known, "autoSelect": True} for known in ("onnx", "sklearn", "synthetic")]
    return {
        "metadata": {"name": name, "annotations": {"densemesh.io/in-process": "true"}},
        "spec": {"multiModel": True, "supportedModelFormats": formats, "containers": []},
    }


def fraud(where: str = "synthetic", name: str = "fraud", **told: Any) -> dict[str, Any]:
    """A synthetic model."""
    predictor = {"model": {"modelFormat": {"name": "synthetic"}, "storageUri": where}, **told.pop("predictor", {})}
    return isvc(predictor, name=name, finalizers=(), **told)


def kubeconfig(url: str) -> dict[str, Any]:
    return {
        "current-context": "fake",
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "fake", "user": {"token": "t"}}],
    }
