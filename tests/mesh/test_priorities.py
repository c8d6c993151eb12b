"""Requests have classes (docs/ARCHITECTURE.md, Tenants and priorities): `densemesh-priority`, else the model's own."""

from __future__ import annotations

import asyncio

import pytest

from protos import management_pb2 as mm
from tests.mesh.pods import Loads, Mesh, request_for, running, until


async def _order(mesh: Mesh, loads: Loads, through: str, asked: list[tuple[str, str]]) -> list[str]:
    """In which order models are loaded that were asked for while the only slot was taken."""
    gate = loads.hold("first")
    for model_id in ("first", *(model_id for model_id, _ in asked)):
        await mesh.register(model_id)
    tasks = [asyncio.create_task(mesh.infer("first"))]
    await loads.begun()
    cache = mesh.pods["a"].engine.cache
    for model_id, priority in asked:
        metadata = [("densemesh-priority", priority)] if priority else []
        tasks.append(asyncio.create_task(mesh.infer(model_id, through, metadata=metadata)))
        await until(lambda m=model_id: m in cache.copies and cache.copies[m].estimated)  # type: ignore[misc]
    gate.set()
    await asyncio.gather(*tasks)
    return [model_id for pod_id, model_id in loads.seen if pod_id == "a"][1:]


@pytest.mark.parametrize("through", ["a", "b"])
async def test_loads_go_by_class(loads: Loads, through: str) -> None:
    """Through a hop as well: `b` has no room, so all is loaded on `a`."""
    async with running("", loads) as mesh:
        await mesh.start("a", load_slots=1)
        await mesh.start("b", capacity="1KiB")
        await mesh.together()
        asked = [("low", "low"), ("normal", ""), ("high", "high"), ("raised", "low")]
        tasks = asyncio.create_task(_order(mesh, loads, through, asked))
        assert await tasks == ["high", "normal", "low", "raised"]


async def test_another_class_is_refused(loads: Loads) -> None:
    async with running("a", loads) as mesh:
        await mesh.register("m")
        metadata = [("densemesh-priority", "urgent")]
        status, message = await mesh.clients["a"].refusal("ModelInfer", request_for("m"), metadata=metadata)
        assert status == "INVALID_ARGUMENT"
        assert message == "header densemesh-priority: expected high, normal, low, found 'urgent'"


async def test_another_class_is_refused_on_every_way(loads: Loads) -> None:
    """Also where nothing waits: fast models on the loop, and through a hop."""
    async with running("ab", loads) as mesh:
        await mesh.register("m", load=True)
        (holder,) = mesh.holders("m")
        await mesh.seen_by_all("m", holder)
        for pod_id in "ab":
            for _ in range(20):
                await mesh.infer("m", pod_id, metadata=[("densemesh-priority", "high")])
            metadata = [("densemesh-priority", "urgent")]
            status, _ = await mesh.clients[pod_id].refusal("ModelInfer", request_for("m"), metadata=metadata)
            assert status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("through", ["a", "b"])
async def test_what_nobody_waits_for_is_loaded_last(loads: Loads, through: str) -> None:
    """Asked for before the others, also through a hop: `ensureLoaded` without `sync`."""
    async with running("", loads) as mesh:
        await mesh.start("a", load_slots=1)
        await mesh.start("b", capacity="1KiB")
        await mesh.together()
        gate = loads.hold("first")
        for model_id in ("first", "ahead", "asked"):
            await mesh.register(model_id)
        requests = [asyncio.create_task(mesh.infer("first"))]
        await loads.begun()
        cache = mesh.pods["a"].engine.cache
        await mesh.clients[through].call("ensureLoaded", mm.EnsureLoadedRequest(modelId="ahead"))
        await until(lambda: "ahead" in cache.copies and cache.copies["ahead"].estimated)
        requests.append(asyncio.create_task(mesh.infer("asked", through)))
        await until(lambda: "asked" in cache.copies and cache.copies["asked"].estimated)
        gate.set()
        await asyncio.gather(*requests)
        await until(lambda: loads.count("ahead") == 1)
        assert [model_id for _, model_id in loads.seen] == ["first", "asked", "ahead"]
