"""Pods for other people's clients, and what those need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.frontends import FRONTENDS
from mesh.local_cluster import LocalPod, ready
from mesh.tls import Tls
from tests.mesh.certificates import Authority
from tests.mesh.models import write_repository


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
