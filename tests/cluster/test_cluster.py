"""Three pod processes and a real etcd. Authority: docs/ARCHITECTURE.md, A death, and a farewell."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from mesh.local_cluster import LocalCluster
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import ROW, request_for

Status = mm.ModelStatusInfo

WITHIN_S = 60.0


async def register(client: Client, *model_ids: str, key: str = "", load: bool = False) -> None:
    for model_id in model_ids:
        info = mm.ModelInfo(type="synthetic", key=key)
        request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)
        status = await client.call("registerModel", request, timeout_s=WITHIN_S)
        assert not load or status.status == Status.LOADED


async def infer(client: Client, model_id: str) -> str:
    """The pod that answered."""
    answer, headers = await client.call_for_headers("ModelInfer", request_for(model_id), timeout_s=WITHIN_S)
    assert (answer.model_name, answer.raw_output_contents) == (model_id, [ROW])
    return headers["densemesh-pod"]


async def load_on(client: Client, *model_ids: str) -> None:
    """Load models on the client's pod, as another pod would ask it to."""
    for model_id in model_ids:
        there = [("densemesh-hop", "load"), ("densemesh-model-bin", model_id.encode())]
        await client.call("ModelMetadata", v2.ModelMetadataRequest(name=model_id), metadata=there)


def names(count: int) -> list[str]:
    """Models that no other test has."""
    prefix = secrets.token_hex(3)
    return [f"{prefix}-{i}" for i in range(count)]


async def known_to_all(clients: Sequence[Client], model_ids: Sequence[str]) -> dict[str, str]:
    """Wait until every pod tells the same of these models: each loaded, on which pod."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            told = []
            for client in clients:
                state = await client.call("GetState", mm.GetStateRequest(models=True))
                copies = {m.model_id: [c.location for c in m.status.modelCopyInfos] for m in state.models}
                told.append({model_id: copies.get(model_id, []) for model_id in model_ids})
            if all(one == told[0] for one in told) and all(told[0].values()):
                return {model_id: pods[0] for model_id, pods in told[0].items()}
            await asyncio.sleep(0.05)


async def until(client: Client, holds: Callable[[Any], bool]) -> None:
    """Return when a pod's state is such."""
    async with asyncio.timeout(WITHIN_S):
        while not holds(await client.call("GetState", mm.GetStateRequest())):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Traffic:
    """What became of requests sent without pause."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed: Counter[str] = Counter()

    async def more(self, count: int) -> None:
        """Return when this many further requests were answered."""
        async with asyncio.timeout(WITHIN_S):
            wanted = self.answered + count
            while self.answered < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def traffic(clients: Sequence[Client], model_ids: Sequence[str], workers: int = 6) -> AsyncIterator[Traffic]:
    """Send requests for all the models through all the clients until the end of the block."""
    seen, done, rng = Traffic(), asyncio.Event(), random.Random(4)

    async def work() -> None:
        while not done.is_set():
            try:
                await infer(rng.choices(clients)[0], rng.choices(model_ids)[0])
                seen.answered += 1
            except grpc.aio.AioRpcError as error:
                seen.failed[f"{error.code().name}: {error.details()}"] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(work())
        try:
            yield seen
        finally:
            done.set()


async def test_registered_on_one_served_through_each(clients: list[Client]) -> None:
    (model_id,) = names(1)
    await register(clients[0], model_id)
    served = {await infer(client, model_id) for client in clients}
    assert len(served) == 1
    assert await known_to_all(clients, [model_id]) == {model_id: served.pop()}


async def test_killing_a_pod_fails_no_request_to_the_others(cluster: LocalCluster, clients: list[Client]) -> None:
    models, victim = names(18), cluster.pods[1]
    await register(clients[0], *models)
    for client, part in zip(clients, (models[:6], models[6:12], models[12:]), strict=True):
        await load_on(client, *part)
    assert list((await known_to_all(clients, models)).values()).count(victim.pod_id) == 6
    left = [clients[0], clients[2]]
    async with traffic(left, models) as seen:
        await seen.more(100)
        victim.kill()
        await seen.more(300)  # its lease still stands: requests fail over
        for model_id in models:
            assert {await infer(client, model_id) for client in left} <= {"pod-1", "pod-3"}
        for client in left:
            await until(client, lambda state: len(state.pods) == 2)  # the lease has ended
        await seen.more(300)
    assert not seen.failed


async def test_a_hung_pod_holds_requests_up_only_for_a_while(cluster: LocalCluster, clients: list[Client]) -> None:
    models, hung = names(3), cluster.pods[1]
    assert hung.pid is not None
    await register(clients[0], *models)
    await load_on(clients[1], *models)
    assert set((await known_to_all(clients, models)).values()) == {hung.pod_id}
    os.kill(hung.pid, signal.SIGSTOP)  # its connections stay open
    try:
        asked = [infer(client, model_id) for model_id in models for client in (clients[0], clients[2])]
        assert hung.pod_id not in await asyncio.gather(*asked)
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    await cluster.ready()
    for model_id in models:
        await infer(clients[1], model_id)


async def test_a_pod_that_comes_back_serves(cluster: LocalCluster, clients: list[Client]) -> None:
    (model_id,) = names(1)
    await register(clients[2], model_id)
    cluster.pods[0].kill()
    await infer(clients[1], model_id)
    cluster.pods[0].start()
    await cluster.ready()
    async with Client(cluster.pods[0].address) as back:
        await infer(back, model_id)


async def test_registrations_race_from_several_clients(clients: list[Client]) -> None:
    models, rng = names(6), random.Random(9)

    async def change() -> None:
        for _ in range(30):
            client, model_id = rng.choices(clients)[0], rng.choices(models)[0]
            try:
                if rng.getrandbits(1):
                    await register(client, model_id, key=f'{{"version":"{rng.randrange(3)}"}}')
                else:
                    await client.call("unregisterModel", mm.UnregisterModelRequest(modelId=model_id))
            except grpc.aio.AioRpcError as error:
                assert error.code().name in ("ALREADY_EXISTS", "FAILED_PRECONDITION"), error  # noqa: PT017
            try:
                await infer(client, model_id)
            except grpc.aio.AioRpcError as error:
                assert error.code().name == "NOT_FOUND", error  # noqa: PT017

    await asyncio.gather(*(change() for _ in range(8)))
    for model_id in models:
        await clients[0].call("unregisterModel", mm.UnregisterModelRequest(modelId=model_id))
        await register(clients[1], model_id, key='{"version":"9"}', load=True)
    await known_to_all(clients, models)
    for client in clients:
        for model_id in models:
            assert (await client.call("ModelInfer", request_for(model_id))).model_version == "9"


async def test_loaded_models_serve_while_etcd_is_gone(cluster: LocalCluster, clients: list[Client]) -> None:
    models = names(9)
    await register(clients[0], *models, load=True)
    await known_to_all(clients, models)
    async with traffic(clients, models) as seen:
        await seen.more(100)
        cluster.etcd.kill()
        await seen.more(500)
        cluster.etcd.spawn()
        await asyncio.to_thread(cluster.etcd.wait_until_healthy)
        await register(clients[1], *names(1), load=True)  # management is back
        await seen.more(100)
    assert not seen.failed
    await cluster.ready()


async def test_a_restart_of_all_pods_keeps_registrations(cluster: LocalCluster, clients: list[Client]) -> None:
    models = names(5)
    await register(clients[0], *models, load=True)
    for pod in cluster.pods:
        pod.terminate()
    assert [await asyncio.to_thread(pod.wait) for pod in cluster.pods] == [0, 0, 0]
    for pod in cluster.pods:
        pod.start()
    await cluster.ready()
    for pod in cluster.pods:
        async with Client(pod.address) as client:
            for model_id in models:
                assert await infer(client, model_id)


async def test_a_pod_drains_without_a_failed_request(cluster: LocalCluster, clients: list[Client]) -> None:
    models, (slow,) = names(12), names(1)
    leaving, at_its_door = cluster.pods[2], clients[2]
    await register(clients[0], *models)
    await register(clients[0], slow, key='{"parameters":{"infer_ms":1500}}')
    await load_on(at_its_door, slow, *models[:4])
    await load_on(clients[0], *models[4:8])
    await load_on(clients[1], *models[8:])
    await known_to_all(clients, [slow, *models])
    before = (await at_its_door.call("GetState", mm.GetStateRequest())).fates.hits
    under_way = [asyncio.create_task(infer(client, slow)) for client in clients]
    await until(at_its_door, lambda state: state.fates.hits == before + len(under_way))
    async with traffic(clients[:2], models) as seen:
        await seen.more(50)
        leaving.terminate()
        assert await asyncio.to_thread(leaving.wait) == 0
        assert await asyncio.gather(*under_way) == [leaving.pod_id] * 3
        await seen.more(100)
    assert not seen.failed


async def test_more_models_than_fit(clients: list[Client]) -> None:
    models = names(240)  # of 1 MiB; three pods hold 192
    await asyncio.gather(*(register(clients[i % 3], model_id) for i, model_id in enumerate(models)))
    async with traffic(clients, models, workers=12) as seen:
        await seen.more(1000)
    assert not seen.failed
