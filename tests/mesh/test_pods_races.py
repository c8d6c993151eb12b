"""Registrations that change under traffic, and more models than fit: three pods in one process. Authority: design,
sections 3 and 4: a request is answered from what is registered, or NOT_FOUND; bytes are exact."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.pods import ROW, Loads, Mesh, request_for, running, until


@pytest.fixture
async def three(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads, capacity="4MiB") as mesh:
        yield mesh


async def register(mesh: Mesh, pod_id: str, version: int) -> None:
    """Model `m` whose answers carry the version."""
    info = mm.ModelInfo(type="synthetic", key=f'{{"version":"{version}"}}')
    await mesh.clients[pod_id].call("registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=info))


async def ask(mesh: Mesh, pod_id: str) -> int | None:
    """The version that answered; None: NOT_FOUND."""
    try:
        answer = await mesh.clients[pod_id].call("ModelInfer", request_for("m"))
    except grpc.aio.AioRpcError as error:
        assert error.code().name == "NOT_FOUND", error  # noqa: PT017
        return None
    assert answer.raw_output_contents == [ROW]
    return int(answer.model_version)


async def test_answers_come_from_what_is_registered_or_not_found(three: Mesh) -> None:
    done = asyncio.Event()
    newest = registered = 0
    """The version whose registration was last begun; and the one that stands, 0 if none surely does."""

    async def traffic(pod_id: str) -> int:
        answered = 0
        while not done.is_set():
            known = registered
            version = await ask(three, pod_id)
            if version is not None:
                answered += 1
                assert version <= newest
                if pod_id == "a":  # where it is registered: no watch lies between
                    assert version >= known
            elif pod_id == "a":
                assert not known or known != registered
        return answered

    asking = [asyncio.create_task(traffic(pod_id)) for pod_id in "abcabc"]
    try:
        for version in range(1, 41):
            newest = version
            await register(three, "a", version)
            registered = version
            while await ask(three, "a") is None:
                assert not any(task.done() for task in asking)
            registered = 0
            await three.unregister("m")
    finally:
        done.set()
    assert sum(await asyncio.gather(*asking)) > 40
    await register(three, "a", 99)
    await until(lambda: all(pod.engine.view.models.keys() == {"m"} for pod in three.pods.values()))
    assert [await ask(three, pod_id) for pod_id in "abc"] == [99] * 3


async def test_registrations_by_all_at_once_end_in_one(three: Mesh) -> None:
    rng = random.Random(5)

    async def change(pod_id: str) -> None:
        for _ in range(25):
            try:
                if rng.getrandbits(1):
                    await register(three, pod_id, rng.randrange(3))
                else:
                    await three.unregister("m", pod_id)
            except grpc.aio.AioRpcError as error:
                # another's other attributes, or others who change it all the time
                assert error.code().name in ("ALREADY_EXISTS", "FAILED_PRECONDITION"), error  # noqa: PT017
            await ask(three, pod_id)

    await asyncio.gather(*map(change, "abcabc"))
    await three.unregister("m")
    await register(three, "b", 7)
    await until(lambda: all("m" in pod.engine.view.models for pod in three.pods.values()))
    assert [await ask(three, pod_id) for pod_id in "abc"] == [7] * 3


async def test_far_more_models_than_fit_are_all_served(three: Mesh) -> None:
    models = [f"m{i}" for i in range(40)]  # 40 MiB, of which 12 fit
    for model_id in models:
        await three.register(model_id)
    rng = random.Random(6)

    async def traffic() -> None:
        for _ in range(40):
            await three.infer(rng.choices(models)[0], rng.choices("abc")[0])

    await asyncio.gather(*(traffic() for _ in range(8)))
    for pod in three.pods.values():
        pod.engine.cache.check()
        assert pod.engine.stats.evictions > 0
        assert pod.engine.cache.resident_bytes <= 4 << 20


async def test_unloads_and_loads_by_hand_under_traffic(three: Mesh) -> None:
    await three.register("m")
    rng = random.Random(7)

    async def traffic(pod_id: str) -> None:
        for _ in range(60):
            assert await three.infer("m", pod_id) in "abc"

    async def operator() -> None:
        for _ in range(30):
            name, message = rng.choices(
                [
                    ("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="m")),
                    ("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="m")),
                ]
            )[0]
            await three.clients[rng.choices("abc")[0]].call(name, message)

    await asyncio.gather(operator(), *map(traffic, "abcabc"))


async def test_clients_that_give_up_leave_no_pins(three: Mesh) -> None:
    models = [f"m{i}" for i in range(20)]
    for model_id in models:
        await three.register(model_id, load_ms=3, infer_ms=1)
    rng = random.Random(8)

    async def impatient() -> None:
        for _ in range(25):
            client = three.clients[rng.choices("abc")[0]]
            call = client.start("ModelInfer", request_for(rng.choices(models)[0]), timeout_s=rng.uniform(0.001, 0.05))
            await asyncio.sleep(rng.uniform(0, 0.01))  # a client's whim
            call.cancel()

    await asyncio.gather(*(impatient() for _ in range(10)))
    await until(lambda: three.pins() == 0)
    for model_id in models:
        await three.infer(model_id)
