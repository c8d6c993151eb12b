"""VModels: aliases that move from one model to the next without a gap.

Every change is one compare-and-set over the alias and the reference counts of the models it touches, so that a model
is never removed under an alias and none is left behind. `placement.leader` decides when a transition ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Final

from mesh.driver import now_ms
from mesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    LoadFailed,
    LoadUnavailable,
    MeshError,
    ModelNotFound,
    NoRoom,
)
from mesh.mirror import Mirror
from mesh.registration import Registration
from mesh.registry.base import CAS_TRIES, Commit, Entry, Registry, RegistryError
from mesh.residency import Residency
from mesh.tenants import check_quota
from placement.engine import Engine
from placement.messages import SettleVModel
from placement.records import (
    BadRecord,
    CopyStatus,
    ModelId,
    ModelRecord,
    Record,
    VModelRecord,
    decode,
    encode,
    model_key,
    vmodel_key,
)
from protos import management_pb2 as pb

log = logging.getLogger(__name__)


_TRANSITION_S: Final = 240.0
"""How long a `sync` call waits for a transition (ModelMesh: 4 minutes)."""


class VModels:
    """Changes vmodels in the registry."""

    def __init__(self, engine: Engine, registry: Registry, mirror: Mirror, residency: Residency) -> None:
        self._engine = engine
        self._registry = registry
        self._mirror = mirror
        self._residency = residency

    async def set(self, request: pb.SetVModelRequest, asked: Registration | None) -> None:
        """Create a vmodel or give it a new target, which is registered as `asked` in the same commit if it is not yet.

        Raises:
            InvalidRequest, ModelNotFound, AlreadyExists, FailedPrecondition: see management.proto.
            OverQuota: the model's tenant has as many as it may have.
            RegistryError
        """
        percent = _percent(request)
        if asked is not None:
            check_quota(self._engine.view, asked.record)
        for _ in range(CAS_TRIES):
            old = await self._vmodel(request.vModelId)
            known = await self._model(request.targetModelId)
            needed = _allowed(old, request, percent)
            if known is not None and asked is not None:
                asked.over(known)
            if old is not None and not needed:
                await self._mirror.caught_up(old.revision)
                return
            if known is None and asked is None:
                raise ModelNotFound(f"targetModelId {request.targetModelId!r} is not registered")
            new = self._moved(old, request, percent)
            if await self._commit(old, new, create=asked.record if asked and known is None else None):
                return
        raise FailedPrecondition(f"vmodel {request.vModelId!r} is being changed by others; try again")

    async def settled(self, request: pb.SetVModelRequest, deadline: float) -> None:
        """Return when the transition has ended, well or not, or a canary may begin; with loadNow the target is then
        loaded or its load failed.

        Raises:
            MeshError: it could not even be tried.
            TimeoutError
        """
        view = self._engine.view
        if request.loadNow or _percent(request):
            with contextlib.suppress(LoadFailed, LoadUnavailable, NoRoom):  # which the status tells
                await self._residency.ensure_loaded(request.targetModelId, deadline)

        def ended() -> bool:
            vmodel = view.vmodels.get(request.vModelId)
            if vmodel is None or vmodel.active == vmodel.target or vmodel.failed:
                return True
            return vmodel.canary and (not vmodel.canary_percent or self._loaded(vmodel.target) > 0)

        async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + _TRANSITION_S)):
            await self._mirror.until(ended)

    async def delete(self, vmodel_id: str, owner: str) -> None:
        """Remove a vmodel and the models that lived for it; another owner's is left alone, silently (ModelMesh).

        Raises:
            FailedPrecondition, RegistryError
        """
        for _ in range(CAS_TRIES):
            old = await self._vmodel(vmodel_id)
            if old is None or (owner and old.owner != owner) or await self._commit(old, None):
                return
        raise FailedPrecondition(f"vmodel {vmodel_id!r} is being changed by others; try again")

    async def settle(self, action: SettleVModel) -> None:
        """Carry out the leader's decision if the vmodel still is what it was decided on."""
        try:
            if await self._commit(action.old, action.new):
                log.info("vmodel %s: active %s, failed %r", action.new.vmodel_id, action.new.active, action.new.failed)
        except (MeshError, RegistryError) as error:
            log.warning("vmodel %s: %s", action.new.vmodel_id, error)

    def _moved(self, old: VModelRecord | None, request: pb.SetVModelRequest, percent: int | None) -> VModelRecord:
        """The record with its new target, or another share for that."""
        name, target = request.vModelId, request.targetModelId
        if old is None:
            return VModelRecord(name, target, target, owner=request.owner)
        if target == old.active or (percent is None and self._at_once(old, request)):
            return VModelRecord(name, target, target, owner=old.owner)
        share = percent
        if share is None:  # a canary that is promoted keeps what it has
            share = old.canary_percent if old.target == target else 0
        return VModelRecord(
            name,
            old.active,
            target,
            owner=old.owner,
            canary=percent is not None,
            canary_percent=share,
            since_ms=now_ms(),
        )

    def _at_once(self, old: VModelRecord, request: pb.SetVModelRequest) -> bool:
        """Whether the target becomes active now (ModelMesh): forced, nothing to lose, or just as ready."""
        if request.force:
            return True
        active, target = self._loaded(old.active), self._loaded(request.targetModelId)
        return (active == 0 and not request.loadNow) or (target > 0 and target >= active)

    def _loaded(self, model_id: ModelId) -> int:
        return sum(copy.status is CopyStatus.LOADED for copy in self._engine.copies_of(model_id).values())

    async def _commit(
        self, old: VModelRecord | None, new: VModelRecord | None, create: ModelRecord | None = None
    ) -> bool:
        """Replace `old` by `new` and carry the reference counts over; False: something changed meanwhile."""
        before = {old.active, old.target} if old else set()
        after = {new.active, new.target} if new else set()
        key = vmodel_key((new or old).vmodel_id)  # type: ignore[union-attr]  # one of them is there
        expect = {key: old.revision if old else 0}
        put = {key: encode(new)} if new else {}
        delete = [] if new else [key]
        for model_id in before ^ after:
            model = await self._model(model_id)
            if model is None and create is not None and create.model_id == model_id:
                model = create
            if model is None and model_id in after:
                return False  # unregistered meanwhile: an alias must not come to point to nothing
            if model is None:
                continue  # it went before its alias, which only a registry changed by hand can do: nothing to count
            refs = model.refs + (1 if model_id in after else -1)
            expect[model_key(model_id)] = model.revision
            if refs <= 0 and model.auto_delete:
                delete.append(model_key(model_id))
            else:
                put[model_key(model_id)] = encode(replace(model, refs=max(0, refs)))
        revision = await self._registry.commit(Commit(expect, put, delete))
        if revision is None:
            return False
        await self._mirror.caught_up(revision)
        return True

    async def _vmodel(self, vmodel_id: str) -> VModelRecord | None:
        record = readable(await self._registry.get(vmodel_key(vmodel_id)))
        return record if isinstance(record, VModelRecord) else None

    async def _model(self, model_id: ModelId) -> ModelRecord | None:
        record = readable(await self._registry.get(model_key(model_id)))
        return record if isinstance(record, ModelRecord) else None


def readable(entry: Entry | None) -> Record | None:
    """The record of a registry entry.

    Raises:
        FailedPrecondition: it was written by hand or by a later version.
    """
    if entry is None:
        return None
    try:
        return decode(entry.key, entry.value, revision=entry.revision, created=entry.created)
    except BadRecord as error:
        raise FailedPrecondition(f"the registry's record cannot be read: {error}") from None


def _percent(request: pb.SetVModelRequest) -> int | None:
    """What a canary is to get; None: the target is to become active.

    Raises:
        InvalidRequest
    """
    percent = request.canary_percent if request.HasField("canary_percent") else 100
    if percent > 100:
        raise InvalidRequest(f"canary_percent: expected 0 to 100, found {percent}")
    if percent < 100 and request.force:
        raise InvalidRequest("force and canary_percent: expected one of them, as force switches at once")
    return percent if percent < 100 else None


def _allowed(old: VModelRecord | None, request: pb.SetVModelRequest, percent: int | None) -> bool:
    """Whether the change may and need be made.

    Raises:
        ModelNotFound, AlreadyExists, FailedPrecondition
    """
    name, expected, target = request.vModelId, request.expectedTargetModelId, request.targetModelId
    if old is None:
        if request.updateOnly:
            raise ModelNotFound(f"vmodel {name!r} is not registered")
        if expected and expected != target:
            raise FailedPrecondition(f"vmodel {name!r}: expected target {expected!r}, but it does not exist")
        return True
    if request.owner and old.owner != request.owner:
        raise AlreadyExists(f"vmodel {name!r} exists and belongs to another owner")
    if expected and expected != old.target:
        raise FailedPrecondition(f"vmodel {name!r}: expected target {expected!r}, found {old.target!r}")
    if old.target != target:
        return True
    if old.active == target:
        return False
    return request.force or bool(old.failed) or percent != (old.canary_percent if old.canary else None)
