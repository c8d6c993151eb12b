"""What tests of several packages need."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from mesh.driver import Driver
from mesh.local_etcd import LocalEtcd
from tests.mesh.pods import Loads, watch_loads


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
