"""The mirror of the registry in a pod's view, where the watch and single reads overtake each other. Authority:
mesh.registry.base: a change has a revision; placement.view: the newer of two registrations stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.mirror import Mirror
from mesh.registry.base import Commit, Entry
from mesh.registry.memory import MemoryRegistry, MemoryStore
from placement.records import ModelRecord, PodRecord, encode, model_key, pod_key
from placement.view import ClusterView

KEY = model_key("m")
RECORD = encode(ModelRecord("m", "onnx", "/m"))


class SlowReads(MemoryRegistry):
    """Reads are answered when the test says so, with what was true when they were asked."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.answers = asyncio.Event()
        self.answers.set()

    async def get(self, key: str) -> Entry | None:
        entry = await super().get(key)
        await self.answers.wait()
        return entry


class Followed:
    """A mirror that follows a store."""

    def __init__(self) -> None:
        self.registry = SlowReads(MemoryStore())
        self.view = ClusterView()
        self.changed: list[str] = []
        self.gone: list[str] = []
        self.mirror = Mirror(
            self.registry, self.view, on_models_changed=self.changed.extend, on_pod_gone=self.gone.append
        )

    async def commit(self, change: Commit) -> int:
        revision = await self.registry.commit(change)
        assert revision is not None
        return revision


@pytest.fixture
async def followed() -> AsyncIterator[Followed]:
    it = Followed()
    await it.mirror.load()
    following = asyncio.create_task(it.mirror.run())
    yield it
    following.cancel()
    await asyncio.wait([following])


async def test_a_record_read_ahead_of_the_watch_is_in_the_view() -> None:
    it = Followed()
    await it.mirror.load()
    await it.commit(Commit(put={KEY: RECORD}))
    record = await it.mirror.fetch(KEY)
    assert isinstance(record, ModelRecord)
    assert it.view.models["m"] == record


async def test_a_record_read_before_its_end_does_not_come_back(followed: Followed) -> None:
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: RECORD})))
    followed.registry.answers.clear()
    reading = asyncio.create_task(followed.mirror.fetch(KEY))
    await asyncio.sleep(0)  # it has asked
    await followed.mirror.caught_up(await followed.commit(Commit(delete=[KEY])))
    followed.registry.answers.set()
    assert await reading is None
    assert "m" not in followed.view.models


async def test_a_record_read_before_its_successor_does_not_replace_it(followed: Followed) -> None:
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: RECORD})))
    followed.registry.answers.clear()
    reading = asyncio.create_task(followed.mirror.fetch(KEY))
    await asyncio.sleep(0)
    newer = encode(ModelRecord("m", "onnx", "/n"))
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: newer})))
    followed.registry.answers.set()
    record = await reading
    assert isinstance(record, ModelRecord)
    assert record.path == followed.view.models["m"].path == "/n"
    assert followed.changed == ["m"]


async def test_forgotten_history_is_read_anew(followed: Followed) -> None:
    store = followed.registry.store
    await followed.commit(Commit(put={KEY: RECORD, pod_key("p"): encode(PodRecord("p", "h:1", 1))}))
    await followed.commit(Commit(delete=[pod_key("p")]))
    store.compact(store.revision + 1)
    await followed.mirror.caught_up(store.revision)
    assert followed.view.models.keys() == {"m"}
    assert not followed.view.pods


async def test_a_pod_that_is_gone_is_told_by_its_address(followed: Followed) -> None:
    await followed.mirror.caught_up(await followed.commit(Commit(put={pod_key("p"): encode(PodRecord("p", "h:1", 1))})))
    await followed.mirror.caught_up(await followed.commit(Commit(delete=[pod_key("p")])))
    assert followed.gone == ["h:1"]


async def test_what_cannot_be_read_is_kept_aside_until_it_can(followed: Followed) -> None:
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: RECORD})))
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: b"{"})))
    assert "not JSON" in followed.mirror.quarantined[KEY]
    assert (followed.view.models, followed.changed) == ({}, ["m"])
    await followed.mirror.caught_up(await followed.commit(Commit(put={KEY: RECORD})))
    assert not followed.mirror.quarantined
    assert "m" in followed.view.models
