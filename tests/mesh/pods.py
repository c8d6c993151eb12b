"""Several pods in this process, on one store, with loads that a test can watch, hold up and break."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import numpy as np

from loaders.base import LoaderError
from mesh.config import Config
from mesh.driver import Driver
from mesh.pod import Pod
from mesh.registry.base import Change, Commit, Entry, Registry, RegistryError, Session, Snapshot
from mesh.registry.memory import MemoryRegistry, MemorySession, MemoryStore
from placement.lifecycle import CopyState
from placement.messages import StartLoad
from placement.records import CopyStatus
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client

TIMEOUT_S: Final = 30.0

Status = mm.ModelStatusInfo


class TroubledRegistry(MemoryRegistry):
    """A pod's way to the store, which a test can block (`reachable`) or delay (`watching`)."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.reachable = True
        self.watching = asyncio.Event()
        """Cleared: the watch brings nothing."""
        self.watching.set()
        self.sessions: list[MemorySession] = []

    def _reach(self) -> None:
        if not self.reachable:
            raise RegistryError("out of reach")

    async def snapshot(self) -> Snapshot:
        self._reach()
        return await super().snapshot()

    async def get(self, key: str) -> Entry | None:
        self._reach()
        return await super().get(key)

    async def commit(self, change: Commit) -> int | None:
        self._reach()
        return await super().commit(change)

    async def open_session(self, ttl_s: float) -> Session:
        self._reach()
        session = Lease(self)
        self.sessions.append(session)
        return session

    async def watch(self, after: int) -> AsyncGenerator[Sequence[Change], None]:
        async for changes in super().watch(after):
            await self.watching.wait()
            yield changes


class Lease(MemorySession):
    """Outlives a pod that cannot reach the store any more, until it is expired."""

    def __init__(self, registry: TroubledRegistry) -> None:
        super().__init__(registry.store)
        self._registry = registry

    async def put(self, key: str, value: bytes) -> None:
        if not self._registry.reachable:
            raise RegistryError("out of reach")
        await super().put(key, value)

    async def close(self) -> None:
        if self._registry.reachable:
            await super().close()


class Loads:
    """Every load of every pod: counted, and if a test says so held up or broken."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        """(pod, model), in order."""
        self.started = threading.Semaphore(0)
        self.failures: dict[str, LoaderError] = {}
        """By pod, or by `pod/model`."""
        self._gates: dict[str, threading.Event] = {}

    def hold(self, model_id: str) -> threading.Event:
        """Loads of the model wait until this is set."""
        return self._gates.setdefault(model_id, threading.Event())

    def __call__(self, pod_id: str, model_id: str) -> None:
        self.seen.append((pod_id, model_id))
        self.started.release()
        gate = self._gates.get(model_id)
        if gate is not None:
            assert gate.wait(TIMEOUT_S)
        failure = self.failures.get(pod_id) or self.failures.get(f"{pod_id}/{model_id}")
        if failure is not None:
            raise failure

    def count(self, model_id: str) -> int:
        return sum(model == model_id for _, model in self.seen)

    async def begun(self) -> None:
        """Return when one more load has begun."""
        assert await asyncio.to_thread(self.started.acquire, timeout=TIMEOUT_S)


class Mesh:
    """Pods by id, and a client for each."""

    def __init__(self, loads: Loads) -> None:
        self.loads = loads
        self.store = MemoryStore()
        self.pods: dict[str, Pod] = {}
        self.registries: dict[str, TroubledRegistry] = {}
        self.clients: dict[str, Client] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, pod_id: str, registry: Registry | None = None, **settings: Any) -> Pod:
        """Start a pod and wait until it serves."""
        if registry is None:
            registry = self.registries[pod_id] = TroubledRegistry(self.store)
        settings = {"policy": "lru", "prepare": False, **settings}  # whose order and loads tests can tell in advance
        config = Config(
            host="127.0.0.1", grpc_port=0, metrics_port=0, pod_id=pod_id, run_threads=4, drain_timeout_s=5, **settings
        )
        assert config.validate() is None
        pod = self.pods[pod_id] = Pod(config, registry)
        task = self._tasks[pod_id] = asyncio.create_task(pod.run())
        serving = asyncio.create_task(pod.serving.wait())
        await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if task.done():
            await task
        self.clients[pod_id] = Client(pod.address, config.open_tls())
        return pod

    async def together(self) -> None:
        """Return when every pod knows all the others."""
        await until(lambda: all(self.pods.keys() <= pod.engine.view.pods.keys() for pod in self.pods.values()))

    async def stop(self, *pod_ids: str) -> None:
        """Drain pods."""
        for pod_id in pod_ids:
            self.pods.pop(pod_id).stop()
        await asyncio.gather(*(self._tasks.pop(pod_id) for pod_id in pod_ids))

    async def crash(self, pod_id: str) -> None:
        """End a pod at once; its lease, and what it published, stays."""
        self.registries[pod_id].reachable = False
        del self.pods[pod_id]
        task = self._tasks.pop(pod_id)
        task.cancel()
        await asyncio.wait([task])

    async def close(self) -> None:
        for client in self.clients.values():
            await client.channel.close()
        await self.stop(*self.pods)

    async def register(self, model_id: str, pod_id: str = "a", *, load: bool = False, **settings: Any) -> Any:
        """Register a synthetic model; with `load`, wait until it is loaded."""
        info = mm.ModelInfo(type="synthetic", path="", key=json.dumps({"parameters": settings}) if settings else "")
        request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)
        return await self.clients[pod_id].call("registerModel", request)

    async def unregister(self, model_id: str, pod_id: str = "a") -> None:
        await self.clients[pod_id].call("unregisterModel", mm.UnregisterModelRequest(modelId=model_id))

    async def infer(self, model_id: str, pod_id: str = "a", **how: Any) -> str:
        """The pod that served a request sent to `pod_id`."""
        answer, headers = await self.clients[pod_id].call_for_headers("ModelInfer", request_for(model_id), **how)
        assert (answer.model_name, answer.raw_output_contents) == (model_id, [ROW])
        return headers["densemesh-pod"]

    async def status(self, model_id: str, pod_id: str = "a") -> Any:
        return await self.clients[pod_id].call("getModelStatus", mm.GetStatusRequest(modelId=model_id))

    def holders(self, model_id: str) -> list[str]:
        """The pods on which the model is loaded."""
        copies = ((pod_id, pod.engine.cache.copies.get(model_id)) for pod_id, pod in self.pods.items())
        return [pod_id for pod_id, copy in copies if copy is not None and copy.state is CopyState.LOADED]

    async def seen_by_all(self, model_id: str, holder: str) -> None:
        """Return when every pod knows that the holder has the model loaded."""

        def seen(pod: Pod) -> bool:
            copy = pod.engine.view.copies(model_id).get(holder)
            return copy is not None and copy.status is CopyStatus.LOADED

        await until(lambda: all(map(seen, self.pods.values())))

    def pins(self) -> int:
        return sum(copy.pins for pod in self.pods.values() for copy in pod.engine.cache.copies.values())


@asynccontextmanager
async def running(pod_ids: str, loads: Loads, **settings: Any) -> AsyncIterator[Mesh]:
    """A mesh of pods with one-letter names, drained in the end; the books are right then."""
    mesh = Mesh(loads)
    try:
        for pod_id in pod_ids:
            await mesh.start(pod_id, **settings)
        await mesh.together()
        yield mesh
        await until(lambda: mesh.pins() == 0)
        for pod in mesh.pods.values():
            pod.engine.cache.check()
    finally:
        await mesh.close()


def watch_loads(loads: Loads, load_model: Callable[[Driver, StartLoad], Any]) -> Callable[[Driver, StartLoad], Any]:
    """`Driver._load_model`, told to `loads` first."""

    def load(driver: Driver, action: StartLoad) -> Any:
        loads(driver.engine.pod_id, action.model.model_id)
        return load_model(driver, action)

    return load


async def until(holds: Callable[[], bool]) -> None:
    """Return when a condition holds that nobody announces."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


ROW: Final = np.arange(3, dtype="<f4").tobytes()


def request_for(model_id: str) -> v2.ModelInferRequest:
    request = v2.ModelInferRequest(model_name=model_id, raw_input_contents=[ROW])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 3])
    return request
