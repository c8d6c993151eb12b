"""What tests of several packages need."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from mesh.driver import Driver
from mesh.local_etcd import LocalEtcd
from tests.mesh.pods import Loads, watch_loads


@pytest.fixture(scope="session", autouse=True)
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pods leave the user's cache alone, and prepare no models unless told to, so that tests know what is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSEMESH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DENSEMESH_PREPARE", "false")
        yield


@pytest.fixture(scope="session")
def etcd() -> Iterator[LocalEtcd]:
    """A running etcd, shared: a test that stops or hurts one starts its own."""
    with LocalEtcd() as running:
        yield running


@pytest.fixture
def etcd_url(etcd: LocalEtcd) -> str:
    """A registry URL with a prefix that no other test has."""
    return f"etcd://{etcd.url}/test-{secrets.token_hex(8)}"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """The loads of all pods in this process."""
    seen = Loads()
    monkeypatch.setattr(Driver, "_load_model", watch_loads(seen, Driver._load_model))
    return seen
