"""Three pod processes on a real etcd, mended before each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from mesh.local_cluster import LocalCluster
from tests.mesh.client import Client

LEASE_TTL_S = 5


@pytest.fixture(scope="module")
def processes() -> Iterator[LocalCluster]:
    settings = {"capacity": "64MiB", "lease_ttl_s": str(LEASE_TTL_S), "run_threads": "4"}
    cluster = LocalCluster(3, settings)
    asyncio.run(cluster.__aenter__())
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
async def cluster(processes: LocalCluster) -> LocalCluster:
    """All running, whatever the test before did."""
    if processes.etcd.pid is None:
        processes.etcd.start()
    for pod in processes.pods:
        if pod.pid is None:
            pod.start()
    await processes.ready()
    return processes


@pytest.fixture
async def clients(cluster: LocalCluster) -> AsyncIterator[list[Client]]:
    """One for each pod, in order."""
    opened = [Client(pod.address) for pod in cluster.pods]
    yield opened
    for client in opened:
        await client.channel.close()
