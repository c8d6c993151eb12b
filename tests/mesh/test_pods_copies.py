"""Copies on several real pods: kept, asked for by load, replaced before a pod goes (issue 4, items 7 and 8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from placement.lifecycle import CopyState
from placement.records import CopyStatus
from protos import management_pb2 as mm
from tests.mesh.pods import Loads, Mesh, running, until


@pytest.fixture
async def three(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads) as mesh:
        yield mesh


async def place(mesh: Mesh, model_id: str, pod_id: str = "a", **placement: object) -> None:
    """Register a synthetic model, or place it in another way."""
    info = mm.ModelInfo(type="synthetic", key=json.dumps({"placement": placement}))
    await mesh.clients[pod_id].call("registerModel", mm.RegisterModelRequest(modelId=model_id, modelInfo=info))


async def test_min_copies_are_loaded_without_a_request_and_again_after_a_crash(three: Mesh) -> None:
    await place(three, "m", min_copies=2)
    await until(lambda: len(three.holders("m")) == 2)
    gone, stays = three.holders("m")
    await three.crash(gone)
    for lease in three.registries[gone].sessions:
        three.store.expire(lease)
    await until(lambda: len(three.holders("m")) == 2)
    assert stays in three.holders("m")
    await place(three, "m", stays, min_copies=0)


async def test_an_idle_model_is_unloaded_and_another_is_not(three: Mesh) -> None:
    await three.register("stays", load=True)
    await place(three, "goes", idle_unload_s=1)
    holder = await three.infer("goes")
    await until(lambda: three.holders("goes") == [])
    assert await three.infer("goes") in three.pods, "and comes back when it is asked for"
    assert holder in three.pods
    assert three.holders("stays")


async def test_a_model_that_keeps_its_pod_busy_gets_another_copy(three: Mesh) -> None:
    """What ran in the pod's threads is told to the engine at each tick: 60 requests share 4 threads."""
    key = json.dumps({"parameters": {"infer_ms": 50}, "max_batch_size": 1})
    request = mm.RegisterModelRequest(modelId="m", modelInfo=mm.ModelInfo(type="synthetic", key=key))
    await three.clients["a"].call("registerModel", request)
    await three.infer("m")
    (first,) = three.holders("m")
    enough = asyncio.Event()

    async def ask() -> None:
        while not enough.is_set():
            assert await three.infer("m", first) == first

    asking = [asyncio.create_task(ask()) for _ in range(60)]
    await until(lambda: len(three.holders("m")) > 1)
    enough.set()
    await asyncio.gather(*asking)


async def test_nothing_fails_while_a_pod_with_a_hot_model_drains(three: Mesh, loads: Loads) -> None:
    """Replacements are loaded first (mm#142: ModelMesh's own copy goes first, and requests stall for 25 s)."""
    gate = loads.hold("hot")
    gate.set()
    await three.register("hot", load=True)
    (leaving,) = three.holders("hot")
    staying = sorted(three.pods.keys() - {leaving})
    await three.seen_by_all("hot", leaving)
    gate.clear()  # the replacement takes its time
    await three.infer("hot")
    served: list[str] = []
    stopped = asyncio.Event()

    async def ask(pod_id: str) -> None:
        while not stopped.is_set():
            served.append(await three.infer("hot", pod_id))

    engine = three.pods[leaving].engine
    asking = [asyncio.create_task(ask(pod_id)) for pod_id in staying]
    going = asyncio.create_task(three.stop(leaving))
    await until(lambda: loads.count("hot") == 2)
    count = len(served)
    await until(lambda: len(served) > count + 50)
    assert set(served) == {leaving}, "it serves on while another loads"
    assert engine.cache.copies["hot"].state is CopyState.LOADED
    gate.set()
    await going
    count = len(served)
    await until(lambda: len(served) > count + 50)
    stopped.set()
    await asyncio.gather(*asking)
    assert served[-1] in staying
    assert loads.count("hot") == 2, "one replacement, before anybody missed it"


async def test_a_pod_that_cannot_be_replaced_in_time_goes_all_the_same(loads: Loads) -> None:
    async with running("ab", loads) as mesh:
        gate = loads.hold("m")
        gate.set()
        await mesh.register("m")
        leaving = await mesh.infer("m")
        (staying,) = mesh.pods.keys() - {leaving}
        gate.clear()
        await mesh.stop(leaving)
        assert [copy.state for copy in mesh.pods[staying].engine.cache.copies.values()] == [CopyState.LOADING]
        gate.set()


async def test_pods_that_all_go_do_not_wait_for_each_other(loads: Loads) -> None:
    async with running("abc", loads) as mesh:
        for model_id in "mnop":
            await mesh.register(model_id, load=True)
        await mesh.stop(*"abc")
        assert len(loads.seen) <= 4 + 3 * 4


async def test_placement_is_told_by_every_pod(three: Mesh) -> None:
    await place(three, "m", min_copies=1)
    await until(lambda: len(three.holders("m")) == 1)
    (holder,) = three.holders("m")
    await three.seen_by_all("m", holder)
    for client in three.clients.values():
        told = await client.call("Explain", mm.ExplainRequest(model_id="m"))
        assert told.reasons[0] == f"loaded on {holder}"
        assert told.placement.min_copies == 1
        assert [pod.pod_id for pod in told.pods if not pod.can_load] == [holder]
    view = three.pods["a"].engine.view
    assert view.copies("m")[holder].status is CopyStatus.LOADED
