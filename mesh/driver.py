"""The engine's only caller: events go in, actions are carried out, their outcomes go in again as events.

Everything here runs on the event loop's thread except what frameworks do: sizing, loading and unloading in `loading`
threads, and inference where `batcher` has it run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, assert_never

from loaders.base import LoaderError, OutOfMemory
from loaders.memory.store import Store
from loaders.memory.tiered import TieredModel
from mesh import __version__
from mesh.batcher import Batcher
from mesh.crashes import Crashes
from mesh.errors import ModelNotFound
from mesh.fetches import Fetches
from mesh.in_line import InLine
from mesh.models import Models, is_fetched
from mesh.preparing import Preparing
from mesh.publisher import Publisher
from mesh.resident import Resident
from mesh.tiers import Tiers
from mesh.workers import Workers
from placement.cache import Copy
from placement.engine import Engine
from placement.lifecycle import CopyState
from placement.messages import (
    Action,
    CopyUnwanted,
    CopyWanted,
    Demote,
    Demoted,
    DrainStarted,
    DropHeld,
    EnsureLoaded,
    EstimateSize,
    Event,
    HeldDropped,
    HeldLost,
    LoadFailed,
    LoadFinished,
    LoadOn,
    MemoryShort,
    Publish,
    SettleVModel,
    SizeEstimated,
    StartLoad,
    StartUnload,
    Tick,
    UnloadFinished,
    Unpublish,
    Wake,
)
from placement.records import ModelId, ModelRecord, Priority, Tier, copy_key, encode, pod_key

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

_TICK_S = 0.5
_LOOK_S = 60.0

MAX_ERROR_CHARS: Final = 1000


def now_ms() -> int:
    """Unix time in milliseconds, as registry records have it."""
    return time.time_ns() // 1_000_000


class Driver:
    """Carries out what the engine decides."""

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        tasks: asyncio.TaskGroup,
        *,
        models: Models,
        run_threads: int,
        store: Store | None = None,
    ) -> None:
        """`store`: the device's memory, if it is not the process's own."""
        self.engine = engine
        self._ensure_loaded: Callable[[ModelId], Awaitable[None]] | None = None
        self._settle_vmodel: Callable[[SettleVModel], Awaitable[None]] | None = None
        self._load_on: Callable[[LoadOn], Awaitable[None]] | None = None
        self._publisher = publisher
        self._tasks = tasks
        self._models = models
        self.tiers = Tiers(models, store)
        self._loaded: dict[ModelId, Resident] = {}
        self._waiters: dict[ModelId, asyncio.Future[None]] = {}
        self._crashes = Crashes()
        self._closed = self._fenced = False
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with the bug, when an impossible state was found."""
        self._leading: set[object] = set()
        """What was asked of other pods and is still under way."""
        # Unloads and estimates must not queue behind loads, or room would wait for what waits for room.
        slots = engine.limits.load_slots
        # A load that is overdue keeps its thread.
        self._loading = ThreadPoolExecutor(slots + engine.limits.max_overdue, "load")
        self._fetching = ThreadPoolExecutor(slots, "fetch")
        self._fetches = Fetches(slots, engine.next_fetch)
        self._housekeeping = ThreadPoolExecutor(2, "housekeeping")
        self.preparing = Preparing(models)
        loop = asyncio.get_running_loop()
        self._workers = Workers(run_threads, loop)
        self.in_line = InLine(loop)
        self.batcher = Batcher(self._workers, self.in_line, engine.pin, self.unpin, self.lost, self.short)

    def lead_with(
        self,
        ensure_loaded: Callable[[ModelId], Awaitable[None]],
        settle_vmodel: Callable[[SettleVModel], Awaitable[None]],
        load_on: Callable[[LoadOn], Awaitable[None]],
    ) -> None:
        """How wishes that concern other pods are met; all need routing, which needs this driver."""
        self._ensure_loaded, self._settle_vmodel, self._load_on = ensure_loaded, settle_vmodel, load_on

    # Requests

    def resident(self, model_id: ModelId) -> Resident:
        """The model of a LOADED copy."""
        return self._loaded[model_id]

    def want(
        self,
        model_id: ModelId,
        *,
        last_used_ms: int | None = None,
        priority: Priority | None = None,
        is_prefetch: bool = False,
    ) -> None:
        """The model should be loaded here.

        Raises:
            ModelNotFound: it is not registered (any more).
        """
        if model_id not in self.engine.view.models:
            raise ModelNotFound(f"model {model_id!r} is not registered")
        used_ms = now_ms() if last_used_ms is None else last_used_ms
        self.step(CopyWanted(model_id, used_ms, priority, is_prefetch))

    def served_as(self, model_id: ModelId) -> str:
        """In which form a copy here is served, in words; empty: there is none."""
        resident = self._loaded.get(model_id)
        if resident is None:
            return ""
        if resident.form:
            return f"here it is served in a prepared form: {resident.form}"
        refusal = self.preparing.refusals.get(model_id, "")
        return "here it is served as it was written" + (f", not prepared: {refusal}" if refusal else "")

    async def changed(self, model_id: ModelId) -> None:
        """Return when the model's copy here has ended a load, a failure or an unload."""
        waiter = self._waiters.get(model_id)
        if waiter is None:
            waiter = self._waiters[model_id] = asyncio.get_running_loop().create_future()
        await asyncio.shield(waiter)

    def pin(self, copy: Copy) -> None:
        self.engine.pin(copy)

    def join(self, copy: Copy, priority: Priority | None, is_prefetch: bool) -> None:
        self.engine.join(copy, priority, is_prefetch=is_prefetch)

    def unpin(self, copy: Copy) -> None:
        self._decide(self.engine.unpin, copy)

    def lost(self, copy: Copy) -> None:
        """The model is not in memory any more, whatever the books say."""
        model_id = copy.model.model_id
        if copy.state is CopyState.LOADED:
            log.warning("copy %s was lost, and is given up", model_id)
            self._crashes.add(model_id)
            self.step(CopyUnwanted(model_id))

    def short(self, copy: Copy) -> None:
        """A run of the model has found no memory: others may go for it."""
        log.warning("memory ran out in a run of %s", copy.model.model_id)
        self.step(MemoryShort(copy.model.model_id, copy.size_bytes))

    # Events and actions

    def step(self, event: Event) -> None:
        self._decide(self.engine.step, event)

    def _decide(self, decide: Callable[[S, int], Sequence[Action]], subject: S) -> None:
        """Ask the engine and do what it says. If it breaks, its books are not to be trusted any more: the pod ends."""
        try:
            actions = decide(subject, now_ms())
        except Exception as bug:
            if not self.broken.done():
                self.broken.set_exception(bug)
            raise
        if actions:
            self._carry_out(actions)

    def models_changed(self, model_ids: Iterable[ModelId]) -> None:
        """Registrations vanished or changed: their copies are of no use."""
        for model_id in model_ids:
            self._crashes.forget(model_id)
            self.preparing.refusals.pop(model_id, None)
            self.step(CopyUnwanted(model_id))

    async def tick(self) -> None:
        """Let time pass, and publish how this pod is, until cancelled."""
        while True:
            self._pass_time()
            await asyncio.sleep(_TICK_S)

    def drain(self) -> None:
        """Say that this pod is going away; what is in use here is wanted elsewhere from now on."""
        self._pass_time()  # so that the engine knows what is in use
        self.step(DrainStarted())
        self.publish_pod()

    def _pass_time(self) -> None:
        self.step(Tick(self.in_line.take_runs()))
        if self.tiers.is_lost and not self._fenced:
            self._fence()
        self.publish_pod()

    def _fence(self) -> None:
        """The device is lost: the models on it are of no use here. The pod serves what needs none."""
        self._fenced = True
        log.error("the device is lost, and its models are given up: %s", self.tiers.is_lost)
        for model_id, resident in list(self._loaded.items()):
            if isinstance(resident.model, TieredModel):
                self.lost(self.engine.cache.copies[model_id])

    def residents(self) -> Iterable[tuple[ModelId, Resident]]:
        """What is loaded."""
        return self._loaded.items()

    async def compare(self, check: Callable[[], object]) -> None:
        """Every minute, until closed: hold the books against what is there, and tell the engine what lower tiers have
        lost."""

        def look() -> Iterable[ModelId]:
            check()
            return self.tiers.gone()

        while True:
            await asyncio.sleep(_LOOK_S)
            if self._closed:
                return
            for model_id in await self._do(look):
                self.step(HeldLost(model_id, Tier.DISK))
                if model_id not in self.engine.copies.lower[Tier.DISK].entries:
                    self.tiers.forget(model_id)

    def publish_pod(self) -> None:
        self._publisher.put(pod_key(self.engine.pod_id), encode(self.engine.pod_record(__version__)))

    async def close(self) -> None:
        """Unload everything once what runs in threads has ended; nothing new is begun. No request may be running."""
        self._closed = True
        await asyncio.to_thread(self._end_threads)
        loaded, self._loaded = self._loaded, {}
        for resident in loaded.values():
            await asyncio.to_thread(resident.unload)
        await asyncio.to_thread(self.tiers.close)

    def _end_threads(self) -> None:
        self._workers.close()
        self._models.stop()
        self._fetching.shutdown(wait=True, cancel_futures=True)
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._housekeeping.shutdown(wait=True)
        self.preparing.close()
        self._models.close()

    def _carry_out(self, actions: Iterable[Action]) -> None:
        if self._closed:
            return
        pod_id = self.engine.pod_id
        for action in actions:
            match action:
                case EstimateSize(model):
                    self._tasks.create_task(self._estimate(model))
                case StartLoad():
                    self._tasks.create_task(self._load(action))
                case StartUnload(model_id, keep):
                    self._tasks.create_task(self._unload(model_id, keep))
                case Demote():
                    self._tasks.create_task(self._demote(action))
                case DropHeld():
                    self._tasks.create_task(self._drop(action))
                case Publish(copy):
                    self._publisher.put(copy_key(pod_id, copy.model_id), encode(copy))
                case Unpublish(model_id):
                    self._publisher.delete(copy_key(pod_id, model_id))
                case Wake(model_id):
                    waiter = self._waiters.pop(model_id, None)
                    if waiter is not None:
                        waiter.set_result(None)
                case EnsureLoaded(model_id):
                    assert self._ensure_loaded is not None
                    self._lead(action, self._ensure_loaded, model_id)
                case SettleVModel():
                    assert self._settle_vmodel is not None
                    self._lead(action, self._settle_vmodel, action)
                case LoadOn():
                    assert self._load_on is not None
                    self._lead(action, self._load_on, action)
                case _:
                    assert_never(action)

    def _lead(self, action: Action, work: Callable[[T], Awaitable[None]], argument: T) -> None:
        """The same action is planned at every tick until it shows; carry it out once at a time."""

        async def once() -> None:
            try:
                await work(argument)
            finally:
                self._leading.discard(action)

        if action not in self._leading:
            self._leading.add(action)
            self._tasks.create_task(once())

    async def _estimate(self, model: ModelRecord) -> None:
        if reason := self._crashes.reason(model.model_id):
            self._failed(LoadFailed(model.model_id, reason, False))
            return
        if not is_fetched(model):
            await self._attempt(model, self._housekeeping, self._models.estimate_bytes, SizeEstimated)
            return
        async with self._fetches.turn(model.model_id):
            await self._attempt(model, self._fetching, self._models.estimate_bytes, SizeEstimated)

    async def _load(self, action: StartLoad) -> None:
        started, model = time.monotonic(), action.model

        def finished(model_id: ModelId, result: tuple[Resident, Mapping[Tier, int]]) -> LoadFinished:
            loaded, kept = result
            self._loaded[model_id] = loaded
            most = loaded.settings.max_concurrency
            if loaded.model.waits and loaded.forward is None:
                threads = min(loaded.model.waits, most or loaded.model.waits)
                loaded.workers = Workers(threads, asyncio.get_running_loop(), "wait")
                self.in_line.keep_out(model_id)
            if most:
                self.in_line.keep_out(model_id)
            self.batcher.meet(loaded)
            elapsed_ms = (time.monotonic() - started) * 1e3
            size_bytes = loaded.size_bytes
            said = ", ".join(filter(None, (loaded.form, action.source and f"from {action.source.value}")))
            what = f"copy {model_id} LOADING -> LOADED" + (f" ({said})" if said else "")
            log.info("%s in %.0f ms, %d bytes", what, elapsed_ms, size_bytes)
            if not loaded.form:
                self._tasks.create_task(self._prepare(model, loaded))
            return LoadFinished(model_id, size_bytes, kept)

        def load(_: ModelRecord) -> tuple[Resident, Mapping[Tier, int]]:
            return self._load_model(action)

        if not await self._attempt(model, self._loading, load, finished, gives_up=False):
            await self._make_room(model.model_id)
            await self._attempt(model, self._loading, load, finished)

    async def _make_room(self, model_id: ModelId) -> None:
        """Memory ran out in a load, whatever the books say: return when others have gone."""
        copies = self.engine.cache.copies
        log.warning("memory ran out in the load of %s: others go, and it is tried once more", model_id)
        self.step(MemoryShort(model_id, copies[model_id].size_bytes))
        going = [copy for copy in copies.values() if copy.state is CopyState.UNLOADING]
        for copy in going:
            while copies.get(copy.model.model_id) is copy and copy.state is CopyState.UNLOADING and not self._closed:
                await self.changed(copy.model.model_id)

    async def _prepare(self, model: ModelRecord, resident: Resident) -> None:
        """Have a better form of a loaded model made; if the copy is still the same then, load that instead. What comes
        meanwhile waits for the load."""
        model_id = model.model_id

        def is_current() -> bool:
            return not self._closed and self._loaded.get(model_id) is resident

        if not is_current() or not await self.preparing.has_better(model, is_current) or not is_current():
            return
        copy = self.engine.cache.copies[model_id]
        if copy.state is not CopyState.LOADED or self.engine.draining:
            return
        self.step(CopyUnwanted(model_id))
        while self.engine.cache.copies.get(model_id) is copy:
            await self.changed(model_id)
        known = self.engine.view.models.get(model_id)
        if known is not None and not known.stopped:
            self.want(model_id, last_used_ms=copy.used_ms)

    async def _attempt(
        self,
        model: ModelRecord,
        pool: ThreadPoolExecutor,
        work: Callable[[ModelRecord], T],
        event: Callable[[ModelId, T], Event],
        *,
        gives_up: bool = True,
    ) -> bool:
        """Run a loader in a thread. Whatever it raises is this model's failure, not the pod's. False: memory ran out,
        which is not told if it does not give up."""
        if self._closed:
            return True
        try:
            result = await asyncio.get_running_loop().run_in_executor(pool, work, model)
        except (OutOfMemory, MemoryError) as error:
            if not gives_up:
                return False
            failed = LoadFailed(model.model_id, f"out of memory: {_told(error)}".rstrip(": "), True)
        except LoaderError as error:
            failed = LoadFailed(model.model_id, _told(error), error.retryable)
        except Exception as error:
            log.exception("loader %s broke on model %s", model.format, model.model_id)
            said = f"loader {model.format}: {type(error).__name__}: {_told(error)}"
            failed = LoadFailed(model.model_id, said, False)
        else:
            self.step(event(model.model_id, result))
            return True
        self._failed(failed)
        return True

    def _failed(self, failed: LoadFailed) -> None:
        log.warning("copy %s FAILED: %s", failed.model_id, failed.error)
        self.step(failed)

    async def _unload(self, model_id: ModelId, keep: Tier | None) -> None:
        if self._closed:
            return
        resident = self._loaded.pop(model_id)
        self.in_line.forget(model_id)
        kept = await self._do(self.tiers.unload, model_id, resident, keep)
        log.info("copy %s UNLOADING -> %s", model_id, keep.value if kept and keep else "gone")
        self.step(UnloadFinished(model_id, kept))

    async def _demote(self, action: Demote) -> None:
        if not self._closed:
            kept = await self._do(self.tiers.demote, action)
            self.step(Demoted(action.model_id, action.target, kept))

    async def _drop(self, action: DropHeld) -> None:
        if self._closed:
            return
        try:
            await self._do(self.tiers.drop, action)
        except LoaderError as error:  # the books are the cache's: it finds no room for others then, and says so
            log.warning("model %s: %s", action.model_id, error)
        self.step(HeldDropped(action.model_id, action.tier))

    async def _do(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._housekeeping, work, *arguments)

    def _load_model(self, action: StartLoad) -> tuple[Resident, Mapping[Tier, int]]:
        return self.tiers.load(action)


def _told(error: Exception) -> str:
    """What an error says, fit for a registry record and a status: not endless, and of characters that can be sent."""
    return str(error)[:MAX_ERROR_CHARS].encode(errors="replace").decode()
