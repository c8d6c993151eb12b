"""A request's walk through the mesh: ask the engine, then serve, join, load or forward.

A bounded number of attempts, each without the pods that were tried in vain, all within the request's one deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from mesh.directory import Directory
from mesh.driver import Driver, now_ms
from mesh.errors import (
    FailedPrecondition,
    InvalidRequest,
    LoadFailed,
    LoadUnavailable,
    MeshError,
    NoRoom,
    NotHere,
    PodUnavailable,
)
from mesh.rpc import HOLDER, Call, Client, Head, Metadata, Told
from placement.cache import Copy
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, CopyState
from placement.messages import Forward, Hop, Join, LoadHere, Refuse, Serve, Why
from placement.records import ModelId, ModelRecord, PodId, Priority

HOP: Final = "densemesh-hop"
"""Request header between pods: `hit` or `load`."""
_HOP_BINARY: Final = f"{HOP}-bin"
MODEL: Final = "densemesh-model-bin"
"""Request header between pods: the concrete model id, so that both agree what a vmodel meant."""
CREATED: Final = "densemesh-created"
"""Request header between pods: the registration that the sender knows (`ModelRecord.created`), so that a receiver whose
watch is behind does not answer from what was registered before."""

PRIORITY: Final = "densemesh-priority"
"""Request header of clients, in place of the model's own class: `high`, `normal` or `low`."""

PREFETCH: Final = "densemesh-prefetch"
"""Request header of loads ahead: they come after all that somebody waits for."""

_LOAD_HERE: Final = Hop.LOAD_HERE  # looked up once: on the enum that takes 0.2 us
ATTEMPTS: Final = 8
"""Tries for one request; a load may fail on fewer pods (`Limits.load_tries`)."""
_MOVED_S: Final = 0.001
"""How long a request whose copy has just moved waits for the registry's watch to say so; doubles with each try."""

_OF_A_LOAD: Final = (LoadFailed, LoadUnavailable, NoRoom)
_KEPT: Final = 4_096
_Told = dict[ModelId, tuple[ModelRecord | None, Told]]

Local = Callable[[Copy, Call, bytes], Awaitable[bytes]]
"""Serves a call on a loaded copy, which stays pinned meanwhile."""

_NOT_FORWARDED: Final = ("grpc-", ":", HOP, MODEL.removesuffix("-bin"), CREATED)
_OF_THE_CONNECTION: Final = frozenset(("user-agent", "content-type", "te"))


class Router:
    """Takes calls to models where they can be served."""

    def __init__(self, driver: Driver, client: Client, directory: Directory) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._client = client
        self._directory = directory
        self._told: tuple[_Told, _Told] = {}, {}
        """`told` for hits and for loads, as long as the registration is the same."""

    def is_from_a_pod(self, call: Call | Head) -> bool:
        """Whether the call may have come from another pod; `model_of` says for sure."""
        return call.keys is None or HOP in call.keys or _HOP_BINARY in call.keys

    async def model_of(
        self, call: Call, message: bytes, field_number: int, *, splits: bool = False
    ) -> tuple[ModelId, Hop]:
        """The concrete model a call is for, and how the call came here; `splits`: see `Directory.resolve`.

        Raises:
            MeshError: see `Directory.resolve`.
        """
        if call.begun is not None:
            return call.begun[0], Hop.CLIENT
        known = self.known(call, message, field_number)
        if known is not None:
            return known
        told = call.texts(MODEL.removesuffix("-bin"))
        if told and call.texts(HOP):
            await self._directory.refresh(told[0])
            return told[0], _hop(call)
        return await self._directory.resolve(call, message, field_number, splits=splits), Hop.CLIENT

    def known(self, call: Call, message: bytes, field_number: int) -> tuple[ModelId, Hop] | None:
        """What `model_of` says where nobody has to be asked for it.

        Raises:
            InvalidRequest
        """
        if call.keys is not None and HOP not in call.keys and _HOP_BINARY not in call.keys:
            model_id = self._directory.known(call, message, field_number)
            return None if model_id is None else (model_id, Hop.CLIENT)
        told = call.texts(MODEL.removesuffix("-bin"))
        if not told or not call.texts(HOP):
            return None
        known, created = self._engine.view.models.get(told[0]), call.texts(CREATED)
        if created and created[0].isdecimal() and (known is None or known.created < int(created[0])):
            return None
        return told[0], _hop(call)

    async def walk(
        self, call: Call, message: bytes, model_id: ModelId, hop: Hop, local: Local, used_ms: int | None = None
    ) -> bytes:
        """Serve a call for a concrete model, here or elsewhere; `used_ms` as in `Engine.route`.

        Raises:
            MeshError: why the last pod that was asked, or every pod, cannot serve it.
        """
        engine = self._engine
        exclude: set[PodId] = set()
        without: set[PodId] = set()
        """Of those, the ones that only did not have it: they can load it, if it comes to that."""
        last: MeshError | None = None
        loads_failed = 0
        begun, call.begun = call.begun, None
        for attempt in range(ATTEMPTS):
            engine.stats.retries += attempt > 0
            failed: MeshError | None = None
            if begun is not None:
                (_, route, failed), begun = begun, None
            else:
                route = engine.route(model_id, hop, exclude, now_ms(), used_ms)
            if isinstance(route, Refuse) and without:
                exclude -= without
                without.clear()
                route = engine.route(model_id, hop, exclude, now_ms(), used_ms)
            try:
                if failed is not None:
                    raise failed
                match route:
                    case Serve(copy):
                        return await self._serve(copy, call, message, local)
                    case Join(copy):
                        response = await self._join(copy, call, message, local)
                    case LoadHere():
                        response = await self._load(model_id, call, message, local, used_ms)
                    case Forward(pod_id, onward):
                        return await self._forward(pod_id, onward, call, message, model_id)
                    case Refuse(Why.UNKNOWN_MODEL):
                        await self._directory.model(model_id)  # registered a moment ago, or not at all
                        continue
                    case Refuse(why, detail):
                        raise _refusal(why, model_id, detail, last)
            except MeshError as error:
                if hop is not Hop.CLIENT or not error.try_elsewhere or isinstance(route, Refuse):
                    raise
                last = error
                # Counted here too: the registry's watch may not have told yet of those that this request met.
                loads_failed += isinstance(error, _OF_A_LOAD)
                if loads_failed >= engine.limits.load_tries:
                    raise
                asked = route.pod_id if isinstance(route, Forward) else engine.pod_id
                exclude.add(asked)
                if not isinstance(error, NotHere):
                    continue
                without.add(asked)
            else:
                if response is not None:
                    return response
            await asyncio.sleep(_MOVED_S * 2**attempt)
        raise (
            last
            if last is not None and not isinstance(last, NotHere)
            else PodUnavailable(
                f"model {model_id!r}: its copies moved {ATTEMPTS} times while the request looked for one"
            )
        )

    async def _serve(self, copy: Copy, call: Call, message: bytes, local: Local) -> bytes:
        self._driver.pin(copy)
        try:
            call.reply_metadata[HOLDER] = self._engine.pod_id
            return await local(copy, call, message)
        finally:
            self._driver.unpin(copy)

    async def _load(
        self, model_id: ModelId, call: Call, message: bytes, local: Local, used_ms: int | None
    ) -> bytes | None:
        is_prefetch = bool(call.texts(PREFETCH))
        self._driver.want(model_id, last_used_ms=used_ms, priority=priority_of(call), is_prefetch=is_prefetch)
        copy = self._engine.cache.copies[model_id]
        if copy.state in IN_FLIGHT and not copy.doomed:
            return await self._join(copy, call, message, local)
        await self._driver.changed(model_id)  # an unload has to end first
        return None

    async def _join(self, copy: Copy, call: Call, message: bytes, local: Local) -> bytes | None:
        """Wait for a copy on its way, then serve; None: it went away meanwhile."""
        self._driver.join(copy, priority_of(call), is_prefetch=bool(call.texts(PREFETCH)))
        try:
            while copy.state in IN_FLIGHT and not copy.doomed:
                await self._driver.changed(copy.model.model_id)
            if copy.state is CopyState.LOADED:
                return await self._serve(copy, call, message, local)
            if copy.state in HAS_FAILED:
                raise _failure(copy)
            return None
        finally:
            self._driver.unpin(copy)

    def told(self, model_id: ModelId, hop: Hop) -> Told:
        """What the pod that is asked next is told beside what the client said."""
        told = self._told[hop is _LOAD_HERE]
        model = self._engine.view.models.get(model_id)
        known = told.get(model_id)
        if known is None or known[0] is not model:
            said: list[tuple[str, str | bytes]] = [(HOP, hop.value), (MODEL, model_id.encode())]
            if model is not None:
                said.append((CREATED, str(model.created)))
            if len(told) >= _KEPT:
                told.clear()
            known = told[model_id] = model, Told(tuple(said))
        return known[1]

    async def _forward(self, pod_id: PodId, hop: Hop, call: Call, message: bytes, model_id: ModelId) -> bytes:
        """Send the same bytes to another pod."""
        metadata = (*passed_on(call.metadata), *self.told(model_id, hop).metadata)
        address = self._engine.view.pods[pod_id].address
        reached = True
        self._engine.forward_started(pod_id)
        try:
            response, headers = await self._client.call(address, call.method, message, metadata, call.deadline)
        except PodUnavailable:
            reached = False
            raise
        finally:
            self._engine.forward_ended(pod_id, reached=reached, now_ms=now_ms())
        call.reply_metadata[HOLDER] = headers.get(HOLDER, pod_id)
        return response


def priority_of(call: Call) -> Priority | None:
    """The request's own class, if it tells one.

    Raises:
        InvalidRequest
    """
    told = call.texts(PRIORITY)
    if not told:
        return None
    try:
        return Priority(told[0])
    except ValueError:
        raise InvalidRequest(f"header {PRIORITY}: expected {', '.join(Priority)}, found {told[0][:64]!r}") from None


def passed_on(metadata: Metadata) -> Metadata:
    """What of a client's metadata another pod is sent."""
    return tuple(
        [pair for pair in metadata if not pair[0].startswith(_NOT_FORWARDED) and pair[0] not in _OF_THE_CONNECTION]
    )


def _hop(call: Call) -> Hop:
    return Hop.LOAD_HERE if call.texts(HOP)[0] == Hop.LOAD_HERE.value else Hop.HIT_ONLY


def _failure(copy: Copy) -> MeshError:
    """What a client hears of a copy that FAILED while its request waited for it."""
    if copy.no_room:
        return NoRoom(f"model {copy.model.model_id!r}: {copy.error}")
    return _load_error(copy.model.model_id, copy.error, copy.retryable)


def _load_error(model_id: ModelId, detail: str, retryable: bool) -> MeshError:
    return (LoadUnavailable if retryable else LoadFailed)(f"model {model_id!r} cannot be loaded: {detail}")


def _refusal(why: Why, model_id: ModelId, detail: str, last: MeshError | None) -> MeshError:
    """What a client hears when no pod is left; what the last attempt said tells more than that there is none."""
    match why:
        case Why.LOAD_FAILED | Why.LOAD_FAILED_FOR_NOW:
            return _load_error(model_id, detail, why is Why.LOAD_FAILED_FOR_NOW)
        case Why.NOT_HERE:
            return NotHere(f"model {model_id!r} is not here")
        case Why.STOPPED:
            return FailedPrecondition(f"model {model_id!r} is {detail}")
        case Why.NO_ROOM:
            return NoRoom(f"model {model_id!r}: {detail}")
        case _:
            return (
                last
                if last is not None and not isinstance(last, NotHere)
                else PodUnavailable(f"model {model_id!r}: {detail}")
            )
