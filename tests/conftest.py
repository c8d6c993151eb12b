"""What tests of several packages need."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from mesh.local_etcd import LocalEtcd


@pytest.fixture(scope="session")
def etcd() -> Iterator[LocalEtcd]:
    """A running etcd, shared: a test that stops or hurts one starts its own."""
    with LocalEtcd() as running:
        yield running


@pytest.fixture
def etcd_url(etcd: LocalEtcd) -> str:
    """A registry URL with a prefix that no other test has."""
    return f"etcd://{etcd.url}/test-{secrets.token_hex(8)}"
