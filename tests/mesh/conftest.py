"""Pods for tests: a real process with real models, and several in this process on one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mesh.frontends import FRONTENDS
from mesh.local_cluster import LocalPod, ready
from mesh.registry import open_registry
from tests.mesh.client import Client
from tests.mesh.models import write_classifier, write_repository
from tests.mesh.pods import Loads, Mesh


@pytest.fixture(scope="module", params=FRONTENDS)
def frontend(request: pytest.FixtureRequest) -> str:
    """What serves the module's pod: tests through the port are run with each."""
    return str(request.param)


@pytest.fixture(scope="module")
def pod_settings() -> dict[str, str]:
    """Flags of the module's pod; a module that wants others overrides this."""
    return {}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of tests.mesh.models."""
    root = tmp_path_factory.mktemp("models")
    write_repository(root)
    write_classifier(root)
    return root


@pytest.fixture(scope="module")
def pod(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, pod_settings: dict[str, str], frontend: str
) -> Iterator[LocalPod]:
    """One `densemesh serve` process on that repository."""
    settings = {"models": str(repository), "capacity": "256MiB", "frontend": frontend, **pod_settings}
    process = LocalPod("pod-1", "memory://", tmp_path_factory.mktemp("pod") / "pod.log", settings)
    process.start()
    try:
        asyncio.run(ready([process]))
        yield process
    finally:
        process.terminate()
        status = process.wait()
    assert status == 0, process.last_words()


@pytest.fixture
async def client(pod: LocalPod) -> AsyncIterator[Client]:
    async with Client(pod.address) as connected:
        yield connected


@pytest.fixture(params=["memory", "etcd"])
async def mesh(request: pytest.FixtureRequest, loads: Loads) -> AsyncIterator[Mesh]:
    """One pod, `a`, on each registry."""
    alone = Mesh(loads)
    registry = open_registry(request.getfixturevalue("etcd_url")) if request.param == "etcd" else None
    try:
        await alone.start("a", registry)
        yield alone
    finally:
        await alone.close()
        if registry is not None:
            await registry.close()


@pytest.fixture
def a(mesh: Mesh) -> Client:
    return mesh.clients["a"]
