"""`mesh.child`: what `densemesh up`, the demo and the tests start processes with."""

from __future__ import annotations

from mesh.child import free_ports


def test_no_port_is_given_twice() -> None:
    """Several servers are given ports before the first of them listens."""
    ports = [port for _ in range(300) for port in free_ports(3)]
    assert len(set(ports)) == len(ports)
