"""What a pod says of itself gets into the registry, late if need be. Authority: mesh.publisher's own words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.publisher import Publisher
from mesh.registry.memory import MemoryStore
from tests.mesh.pods import TroubledRegistry, until


@asynccontextmanager
async def publishing() -> AsyncIterator[tuple[Publisher, TroubledRegistry]]:
    registry = TroubledRegistry(MemoryStore())
    publisher = Publisher(registry, 60)
    running = asyncio.create_task(publisher.run())
    yield publisher, registry
    running.cancel()
    await asyncio.wait([running])
    assert registry.store.snapshot().entries == []  # the lease went, and took what it held


def stored(registry: TroubledRegistry) -> dict[str, bytes]:
    return {entry.key: entry.value for entry in registry.store.snapshot().entries}


async def test_what_is_wanted_is_written_and_only_when_it_changes() -> None:
    async with publishing() as (publisher, registry):
        publisher.put("a", b"1")
        publisher.put("b", b"1")
        await publisher.flushed()
        assert stored(registry) == {"a": b"1", "b": b"1"}
        revision = registry.store.revision
        publisher.put("a", b"1")
        publisher.delete("never there")
        publisher.delete("b")
        await publisher.flushed()
        assert (stored(registry), registry.store.revision) == ({"a": b"1"}, revision + 1)


async def test_only_the_newest_value_is_written() -> None:
    async with publishing() as (publisher, registry):
        for value in range(100):
            publisher.put("a", str(value).encode())
        publisher.put("b", b"gone at once")
        publisher.delete("b")
        await publisher.flushed()
        assert (stored(registry), registry.store.revision) == ({"a": b"99"}, 2)


async def test_writes_that_fail_are_made_later() -> None:
    async with publishing() as (publisher, registry):
        publisher.put("a", b"1")
        await publisher.flushed()
        registry.reachable = False
        publisher.put("a", b"2")
        publisher.put("b", b"2")
        flushed = asyncio.create_task(publisher.flushed())
        await asyncio.wait([flushed], timeout=0.05)
        assert not flushed.done()
        registry.reachable = True
        await flushed
        assert stored(registry) == {"a": b"2", "b": b"2"}


async def test_a_lost_lease_is_replaced_and_everything_written_anew() -> None:
    async with publishing() as (publisher, registry):
        publisher.put("a", b"1")
        publisher.put("b", b"1")
        await publisher.flushed()
        registry.store.expire(registry.sessions[-1])
        assert stored(registry) == {}
        publisher.delete("b")
        await until(lambda: stored(registry) == {"a": b"1"})
        assert len(registry.sessions) == 2


async def test_a_registry_that_is_not_there_yet_is_waited_for() -> None:
    registry = TroubledRegistry(MemoryStore())
    registry.reachable = False
    publisher = Publisher(registry, 60)
    publisher.put("a", b"1")
    running = asyncio.create_task(publisher.run())
    await asyncio.wait([running], timeout=0.05)
    assert not publisher.connected
    registry.reachable = True
    await publisher.flushed()
    assert stored(registry) == {"a": b"1"}
    running.cancel()
    await asyncio.wait([running])
