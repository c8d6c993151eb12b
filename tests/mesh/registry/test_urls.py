"""The URLs that name a registry (mesh.registry.open_registry)."""

from __future__ import annotations

import pytest

from mesh.registry import open_registry
from mesh.registry.base import Commit
from mesh.registry.etcd import Address, parse
from mesh.registry.etcd_endpoint import Login


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("etcd://h", Address((("h", 2379),), "/")),
        ("etcd://h:1/", Address((("h", 1),), "/")),
        ("etcd://h:1/a/b/", Address((("h", 1),), "/a/b/")),
        ("etcd://h:1//a%2Fb%20c", Address((("h", 1),), "/a/b c/")),
        (
            "etcd://h,10.0.0.1:2,[::1]:3,[fe80::1]/p",
            Address((("h", 2379), ("10.0.0.1", 2), ("::1", 3), ("fe80::1", 2379)), "/p/"),
        ),
        ("etcd://u:p%40:x@h/p", Address((("h", 2379),), "/p/", Login("u", "p@:x"))),
        (
            "etcds://h/p?ca=%2Fetc%2Fca.pem&server_name=etcd",
            Address((("h", 2379),), "/p/", None, True, (("ca", "/etc/ca.pem"), ("server_name", "etcd"))),
        ),
    ],
)
def test_etcd_urls(url: str, address: Address) -> None:
    assert parse(url) == address


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "memory://, etcd://, etcds://"),
        ("localhost:2379", "memory://, etcd://, etcds://"),
        ("zk://h/p", "memory://, etcd://, etcds://"),
        ("memory://a/b", "memory://name"),
        ("etcd://", "host:port"),
        ("etcd:///p", "host:port"),
        ("etcd://h,x:0/p", "host:port"),
        ("etcd://h:0", "host:port"),
        ("etcd://h:65536", "host:port"),
        ("etcd://h:port", "host:port"),
        ("etcd://h,,g", "host:port"),
        ("etcd://::1", "host:port"),
        ("etcd://[::1:2379", "host:port"),
        ("etcd://[::1]2379", "host:port"),
        ("etcd://user@h", "user:password"),
        ("etcd://h?ca=x", "etcds://"),
        ("etcds://h?cafile=x", "ca, cert, key, server_name"),
        ("etcds://h?ca=x&ca=y", "once"),
        ("etcds://h?cert=x", "cert and key"),
    ],
)
def test_a_wrong_url_says_what_was_expected(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"expected|starts with") as raised:
        open_registry(url)
    assert expected in str(raised.value)


def test_a_missing_certificate_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"/no/such/ca\.pem"):
        open_registry("etcds://h?ca=/no/such/ca.pem")


async def test_memory_urls_share_by_name() -> None:
    one, same, other = (open_registry(url) for url in ("memory://urls", "memory://urls", "memory://"))
    await one.commit(Commit(put={"a": b""}))
    assert await same.get("a") is not None
    assert await other.get("a") is None
