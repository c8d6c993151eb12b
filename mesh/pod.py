"""One pod: its parts put together, and its life: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

from loaders import loader_for
from loaders.base import LoaderError
from loaders.memory.store import Store
from loaders.prepare.preparation import Preparation
from loaders.storage.source import Storage
from mesh import metrics, reflection
from mesh.config import DEFAULT_CAPACITY, Config, parse_bytes, reachable_host
from mesh.directory import Directory
from mesh.driver import Driver, now_ms
from mesh.errors import Code, MeshError, ServerUnavailable
from mesh.frontends import Server, open_client, open_server
from mesh.health import Health
from mesh.hits import Hits
from mesh.inference import INFER, Inference
from mesh.management import Management
from mesh.memory import Memory
from mesh.mirror import Mirror
from mesh.models import Models
from mesh.publisher import Publisher
from mesh.registration import registration
from mesh.registry import open_registry
from mesh.registry.base import Registry, RegistryError
from mesh.relay import ModelRelay
from mesh.repository import scan
from mesh.residency import Residency
from mesh.router import Router
from mesh.rpc import Call, Client, Handlers
from mesh.runtime.runtime import Runtime
from mesh.settings import to_key
from mesh.split import Split
from mesh.tls import Tls, TlsError
from mesh.vmodels import VModels
from placement.engine import Engine
from placement.limits import HostMode, Limits
from placement.policies import POLICIES
from placement.view import ClusterView
from protos import management_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")

_REGISTRY_WAIT_S: Final = 30.0
"""How long a starting pod waits for the registry."""


REFLECTION: Final = tuple(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
)


class CannotStart(Exception):
    """One sentence for the operator."""


class BadSetting(CannotStart):
    """It lies in the configuration."""


class _Stopped(Exception):
    """Ends the task group when all is done."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a pod's life deals with."""

    driver: Driver
    publisher: Publisher
    mirror: Mirror
    management: Management
    observed: metrics.Metrics
    memory: Memory
    handlers: Handlers


class Pod:
    """A pod from its configuration; `run` is its whole life."""

    def __init__(self, config: Config, registry: Registry | None = None) -> None:
        """`registry`: handed in, and closed, by whoever runs several pods in one process."""
        self.config = config
        self._registry = registry
        self._tls: Tls | None = None
        self._runtime: Runtime | None = None
        self.store: Store | None = None
        """The device's memory."""
        self._stopping = asyncio.Event()
        self.serving = asyncio.Event()
        """Set while requests are taken."""
        self.pod_id = config.pod_id
        self.engine: Engine
        self.address = ""
        self.metrics_port = 0

    def stop(self) -> None:
        """Drain and end."""
        self._stopping.set()

    async def run(self) -> None:
        """Start, serve until `stop`, drain, end.

        Raises:
            CannotStart: a port is taken, the registry is not there, the repository cannot be read.
            ExceptionGroup: a bug, after which the process should end.
        """
        config = self.config
        try:
            self._tls = tls = config.open_tls()
        except TlsError as error:
            raise BadSetting(str(error)) from None
        registry = self._registry or _open(config.registry)
        client = open_client(config.frontend, tls=tls)
        server = open_server(
            config.frontend,
            max_message_bytes=config.max_message_bytes,
            default_timeout_s=config.request_timeout_s,
            tls=tls,
        )
        refused: CannotStart | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                if tls is not None:
                    tasks.create_task(tls.follow())
                await self._live(registry, server, client, tasks)
                raise _Stopped  # cancels whatever is still under way in the background
        except* _Stopped:
            log.info("pod %s has stopped", self.pod_id)
        except* CannotStart as errors:
            refused = next(error for error in errors.exceptions if isinstance(error, CannotStart))
        finally:
            await server.stop(0)
            await client.close()
            if self._runtime is not None:
                await self._runtime.close()
            if self._registry is None:
                await registry.close()
        if refused is not None:
            raise refused

    async def _live(self, registry: Registry, server: Server, client: Client, tasks: asyncio.TaskGroup) -> None:
        host = self.config.host
        port = _bind("gRPC", host, self.config.grpc_port, lambda port: server.listen(_join(host, port)))
        if self.config.uds:
            _bind_unix(self.config.uds, server)
        self.address = self.config.advertise or _join(reachable_host(host, self.config.registry), port)
        self.pod_id = self.config.pod_id or f"{socket.gethostname().split('.')[0]}-{port}"
        if (settings := self.config.runtime_settings) is not None:
            self._runtime = Runtime(settings, open_client(self.config.frontend))
            if not await self._unless_stopped(_started(self._runtime)):
                return
        try:
            self.store = await asyncio.to_thread(self.config.open_store)
        except LoaderError as error:
            raise CannotStart(f"--device {self.config.device}: {error}") from None
        parts = self._assemble(registry, client, tasks)
        self.metrics_port, close_metrics = _bind(
            "metrics",
            host,
            self.config.metrics_port,
            lambda port: metrics.serve(parts.observed, host, port, self.serving.is_set),
        )
        try:
            publishing = await self._unless_stopped(self._start(parts, server, tasks))
            if publishing is None:
                return
            self.serving.set()
            log.info("pod %s serves gRPC on %s", self.engine.pod_id, self.address)
            await self._stopped_or(parts.driver.broken)
            log.info("pod %s drains", self.engine.pod_id)
            self.serving.clear()
            until_s = asyncio.get_running_loop().time() + self.config.drain_timeout_s
            await self._replaced(parts, until_s - self.config.drain_timeout_s / 2)
            publishing.cancel()  # the lease goes: nobody is sent here any more
            await asyncio.wait([publishing])
            await server.stop(max(0.0, until_s - asyncio.get_running_loop().time()))
        finally:
            await asyncio.to_thread(close_metrics)
            await parts.driver.close()

    async def _replaced(self, parts: _Parts, until_s: float) -> None:
        """Say that this pod drains, and serve on until what is in use here is loaded elsewhere, or time is up."""
        parts.driver.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await parts.mirror.until(lambda: self.engine.is_replaced(now_ms()))

    def _assemble(self, registry: Registry, client: Client, tasks: asyncio.TaskGroup) -> _Parts:
        """Put the parts together; nothing runs yet."""
        config = self.config
        runtime = self._runtime
        limits = Limits(
            config.capacity_bytes or (runtime and runtime.status.capacityInBytes) or parse_bytes(DEFAULT_CAPACITY),
            labels=config.labels,
            run_threads=config.run_threads,
            load_slots=config.load_slots,
            load_timeout_ms=round(config.load_timeout_s * 1000),
        )
        if runtime is not None:
            limits = runtime.limits(limits)
        storage = Storage(
            config.cache_path,
            config.cache_bytes,
            Path(config.storage_config) if config.storage_config else None,
            Path(config.pvc_root),
            limits.capacity_bytes,
        )
        preparation = Preparation(config.cache_path / "prepared", config.prepared_bytes) if config.prepare else None
        try:
            storage.start()
            if preparation is not None:
                preparation.start()
            limits = replace(limits, disk_bytes=storage.cache_bytes)
            if self.store is not None:
                host_bytes = self.store.usage(self.store.host).capacity_bytes
                limits = replace(limits, host_bytes=host_bytes, host_mode=HostMode(config.host_mode))
        except LoaderError as error:
            raise CannotStart(f"{config.cache_path}: {error}") from None
        engine = Engine(self.pod_id, self.address, limits, ClusterView(), POLICIES[config.policy], Random(self.pod_id))
        self.engine = engine
        publisher = Publisher(registry, config.lease_ttl_s)
        models = Models(storage, config.allowed_code, runtime, preparation, self.store)
        driver = Driver(engine, publisher, tasks, models=models, run_threads=config.run_threads, store=self.store)

        def forget(address: str) -> None:
            tasks.create_task(client.forget(address))

        mirror = Mirror(registry, engine.view, on_models_changed=driver.models_changed, on_pod_gone=forget)
        directory = Directory(engine.view, mirror, asyncio.get_running_loop().time, engine.sides)
        split = Split(engine.view)
        router = Router(driver, client, directory)
        residency = Residency(driver, router, client, tasks)
        vmodels = VModels(engine, registry, mirror, residency)
        driver.lead_with(residency.ensure_quietly, vmodels.settle, residency.load_on)
        memory = Memory(engine, models, self.store, driver.residents, is_apart=config.device != "host")
        management = Management(
            engine, registry, mirror, directory, router, residency, vmodels, memory, driver.served_as
        )
        observed = metrics.Metrics(
            engine,
            driver.in_line,
            driver.batcher.sizes,
            self._tls,
            driver.preparing,
            models.sizes,
            runtime,
            split,
            driver.batcher.joint,
            memory,
        )
        hits = Hits(driver, router, directory, observed.cell("ModelInfer", Code.OK), split)
        handlers = observed.timed(
            Inference(driver, router, directory, residency, self.serving.is_set, split).handlers()
            | management.handlers()
            | Health(reflection.SERVICES, self.serving.is_set).handlers()
            | Handlers(streams=dict.fromkeys(REFLECTION, _reflect))
        )
        relay = ModelRelay(engine, router, directory, client, partial(observed.cell, "ModelInfer"))
        handlers |= Handlers(relays={INFER: relay}, quick={INFER: hits.take})
        return _Parts(driver, publisher, mirror, management, observed, memory, handlers)

    async def _start(self, parts: _Parts, server: Server, tasks: asyncio.TaskGroup) -> asyncio.Task[None]:
        """Know the mesh, be known to it, take calls; the task that keeps the pod known."""
        await asyncio.to_thread(_preload, self.config.preloaded)
        parts.memory.begin()
        await _until_registry(parts.mirror.load)
        publishing = tasks.create_task(parts.publisher.run())
        for work in (parts.mirror.run(), parts.driver.tick(), parts.driver.compare(parts.memory.check)):
            tasks.create_task(work)
        if self._runtime is not None:
            tasks.create_task(self._runtime.watch(parts.driver.models_changed))
        await self._register_models(parts.management)
        parts.driver.publish_pod()
        await parts.publisher.flushed()
        await server.start(parts.handlers)
        return publishing

    async def _stopped_or(self, broken: asyncio.Future[None]) -> None:
        """Return when `stop` is called; raise what broke the engine."""
        stopping: asyncio.Future[Any] = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([stopping, broken], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if broken.done():
            broken.result()

    async def _unless_stopped(self, work: Coroutine[None, None, T]) -> T | None:
        """What the work returns; None: `stop` was called first, and the work was cancelled."""
        working, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.wait({working, stopping})

    async def _register_models(self, management: Management) -> None:
        """Register what lies in the model repository; what cannot be served is reported and left out."""
        if not self.config.models:
            return
        try:
            models, problems = scan(Path(self.config.models), self._runtime.settings.formats if self._runtime else ())
        except ValueError as error:
            raise BadSetting(f"--models: {error}") from None
        for name, reason in problems:
            log.warning("model %s is left out: %s", name, reason)
        for model in models:
            try:
                info = pb.ModelInfo(type=model.format, path=str(model.path), key=to_key(model))
                labels = [pod.labels for pod in self.engine.peers.pods().values()]
                await management.register(registration(model.model_id, info, now_ms(), labels=labels))
            except (MeshError, RegistryError) as error:
                log.warning("model %s is not registered: %s", model.model_id, error)
        log.info("%d models registered from %s", len(models), self.config.models)


async def _started(runtime: Runtime) -> bool:
    try:
        await runtime.start()
    except ServerUnavailable as error:
        raise CannotStart(str(error)) from None
    return True


def _reflect(call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    return reflection.reflect(messages)


def _open(url: str) -> Registry:
    try:
        return open_registry(url)
    except (ValueError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise BadSetting(f"--registry: {said}") from None


def _preload(formats: Iterable[str]) -> None:
    """Import frameworks, which may take seconds, before the first request could wait for it."""
    for name in sorted(formats):
        try:
            loader_for(name)
        except LoaderError as error:
            raise CannotStart(f"--preload {name}: {error}") from None


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(what: str, host: str, port: int, bind: Callable[[int], T]) -> T:
    try:
        return bind(port)
    except OSError as error:
        raise CannotStart(f"the {what} port {_join(host, port)} cannot be opened: {error.strerror or error}") from None


def _bind_unix(path: str, server: Server) -> None:
    try:
        server.listen(f"unix:{path}")
    except OSError as error:
        raise CannotStart(f"the Unix socket {path} cannot be opened: {error.strerror or error}") from None


async def _until_registry(load: Callable[[], Awaitable[None]]) -> None:
    """Load the view, giving the registry some time to come up."""
    deadline = asyncio.get_running_loop().time() + _REGISTRY_WAIT_S
    while True:
        try:
            return await load()
        except RegistryError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise CannotStart(f"the registry does not answer: {error}") from None
            log.warning("waiting for the registry: %s", error)
            await asyncio.sleep(1)
