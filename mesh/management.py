"""The management service, wire-compatible with KServe ModelMesh's `mmesh.ModelMesh`, and `densemesh.Mesh` beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final

from mesh.directory import Directory, check_id
from mesh.driver import now_ms
from mesh.errors import (
    FailedPrecondition,
    LoadFailed,
    LoadUnavailable,
    ModelNotFound,
    NoRoom,
    RegistryUnavailable,
)
from mesh.explain import Explanations
from mesh.inference import parse
from mesh.memory import Memory
from mesh.mirror import Mirror
from mesh.registration import Registration, registration
from mesh.registry.base import CAS_TRIES, Commit, Entry, Registry, RegistryError
from mesh.residency import ENSURE_LOADED, Residency, overall
from mesh.router import Router
from mesh.rpc import Call, Handlers, Unary
from mesh.tenants import TenantGrants, check_quota
from mesh.vmodels import VModels
from placement.engine import Engine
from placement.explain import unmet
from placement.messages import Hop
from placement.records import BadRecord, CopyRecord, CopyStatus, ModelId, ModelRecord, decode, encode, model_key
from protos import management_pb2 as pb

MODEL_MESH: Final = "/mmesh.ModelMesh/"
MESH: Final = "/densemesh.Mesh/"

_HOUR_MS: Final = 3_600_000
_AGE_LOADED_MS: Final = _HOUR_MS
"""A registration counts as used an hour ago, so that registering many models pushes out none that is in use
(ModelMesh: LASTUSED_AGE_ON_ADD_MS) ..."""
_AGE_REGISTERED_MS: Final = 6 * _HOUR_MS
"""... and longer ago when it is not even loaded."""

_COPY_STATUS: Final = {
    CopyStatus.LOADING: pb.ModelStatusInfo.LOADING,
    CopyStatus.LOADED: pb.ModelStatusInfo.LOADED,
    CopyStatus.FAILED: pb.ModelStatusInfo.LOADING_FAILED,
    CopyStatus.HELD: pb.ModelStatusInfo.NOT_LOADED,
    None: pb.ModelStatusInfo.NOT_LOADED,
}


class Management:
    """Handlers of the management services."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        mirror: Mirror,
        directory: Directory,
        router: Router,
        residency: Residency,
        vmodels: VModels,
        memory: Memory,
        served_as: Callable[[ModelId], str],
    ) -> None:
        self._engine = engine
        self._view = engine.view
        self._registry = registry
        self._mirror = mirror
        self._directory = directory
        self._router = router
        self._residency = residency
        self._vmodels = vmodels
        self._memory = memory
        self._served_as = served_as
        self._tenants = TenantGrants(engine, registry, mirror)

    def handlers(self) -> Handlers:
        unary: dict[str, Unary] = {
            MODEL_MESH + "registerModel": self._register,
            MODEL_MESH + "unregisterModel": self._unregister,
            MODEL_MESH + "getModelStatus": self._get_status,
            ENSURE_LOADED: self._ensure_loaded,
            MODEL_MESH + "setVModel": self._set_vmodel,
            MODEL_MESH + "deleteVModel": self._delete_vmodel,
            MODEL_MESH + "getVModelStatus": self._get_vmodel_status,
            MESH + "GetState": self._get_state,
            MESH + "GetMemory": self._get_memory,
            MESH + "Explain": Explanations(self._engine, self._directory, self._served_as).explain,
        }
        unary |= {MESH + name: handler for name, handler in self._tenants.handlers().items()}
        return Handlers({path: _guarded(handler) for path, handler in unary.items()}, {})

    # Models

    async def _register(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.RegisterModelRequest, message)
        asked = registration(
            check_id("modelId", request.modelId),
            request.modelInfo,
            used_ms(request.lastUsedTime, _AGE_LOADED_MS if request.loadNow else _AGE_REGISTERED_MS),
            labels=self._labels(request.modelId),
        )
        await self.register(asked)
        record = asked.record
        if not request.loadNow:
            return self._status(record.model_id).SerializeToString()
        return await self._load(call, record.model_id, record.last_used_ms, request.sync)

    async def register(self, asked: Registration, *, known: ModelRecord | None = None) -> None:
        """Register a model, or find it registered alike and placed as is asked for; this pod then knows it. `known`:
        its record, if it is registered already.

        Raises:
            AlreadyExists: registered with other attributes.
            OverQuota: the tenant has as many models as it may have.
            RegistryError
        """
        check_quota(self._view, asked.record)
        key = model_key(asked.record.model_id)
        for _ in range(CAS_TRIES):
            wanted = asked.record if known is None else asked.over(known)
            if wanted == known:
                return
            expected = 0 if known is None else known.revision
            revision = await self._registry.commit(Commit(expect={key: expected}, put={key: encode(wanted)}))
            if revision is not None:
                await self._mirror.caught_up(revision)
                return
            record = await self._mirror.fetch(key)
            known = record if isinstance(record, ModelRecord) else None
            if known is None and key in self._mirror.quarantined:
                raise FailedPrecondition(f"the registry's record cannot be read: {self._mirror.quarantined[key]}")
        raise FailedPrecondition(f"model {asked.record.model_id!r} is being changed by others; try again")

    def _labels(self, model_id: str) -> list[str]:
        known = self._view.models.get(model_id)
        pods = self._engine.peers.pods().values()
        return [*(pod.labels for pod in pods), *([known.requires] if known is not None else [])]

    async def _unregister(self, call: Call, message: bytes) -> bytes:
        model_id = check_id("modelId", parse(pb.UnregisterModelRequest, message).modelId)
        key = model_key(model_id)
        for _ in range(CAS_TRIES):
            entry = await self._registry.get(key)
            if entry is None:
                break
            model = readable_model(entry)
            if model is not None and model.refs:
                raise FailedPrecondition(f"model {model_id!r} has referents: {model.refs} vmodels point to it")
            revision = await self._registry.commit(Commit(expect={key: entry.revision}, delete=(key,)))
            if revision is not None:
                await self._mirror.caught_up(revision)
                break
        else:
            raise FailedPrecondition(f"model {model_id!r} is being changed by others; try again")
        return pb.UnregisterModelResponse().SerializeToString()

    async def _get_status(self, call: Call, message: bytes) -> bytes:
        model_id = check_id("modelId", parse(pb.GetStatusRequest, message).modelId)
        try:
            await self._directory.model(model_id)
        except ModelNotFound:
            return pb.ModelStatusInfo(status=pb.ModelStatusInfo.NOT_FOUND).SerializeToString()
        return self._status(model_id).SerializeToString()

    async def _ensure_loaded(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.EnsureLoadedRequest, message)
        check_id("modelId", request.modelId)
        touched_ms = used_ms(request.lastUsedTime, 0)
        model_id, hop = await self._router.model_of(call, message, pb.EnsureLoadedRequest.MODELID_FIELD_NUMBER)
        if hop is not Hop.CLIENT:
            return await self._residency.ensure_for(call, message, model_id, hop, touched_ms)
        return await self._load(call, await self._directory.model(request.modelId), touched_ms, request.sync)

    async def _load(self, call: Call, model_id: str, touched_ms: int, sync: bool) -> bytes:
        """Load and answer with the status; a failed load is a status, not an error (ModelMesh)."""
        if not sync:
            self._residency.ensure_in_background(model_id, touched_ms)
            return self._status(model_id).SerializeToString()
        try:
            pod_id = await self._residency.ensure_loaded(model_id, call.deadline, touched_ms)
        except (LoadFailed, LoadUnavailable, NoRoom) as error:
            failed = pb.ModelStatusInfo(status=pb.ModelStatusInfo.LOADING_FAILED, errors=[str(error)])
            return failed.SerializeToString()
        status = self._status(model_id)
        if status.status != pb.ModelStatusInfo.LOADED:  # the holder's word is ahead of the registry's watch
            status.status = pb.ModelStatusInfo.LOADED
            status.ClearField("modelCopyInfos")
            status.modelCopyInfos.add(location=pod_id, copyStatus=pb.ModelStatusInfo.LOADED, time=now_ms())
        return status.SerializeToString()

    def _status(self, model_id: str) -> pb.ModelStatusInfo:
        status = status_info(self._engine.copies_of(model_id).values())
        model = self._view.models.get(model_id)
        if model is not None and status.status == pb.ModelStatusInfo.NOT_LOADED:
            status.errors.extend(filter(None, [unmet(model, self._engine.peers.pods().values())]))
        return status

    # VModels

    async def _set_vmodel(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.SetVModelRequest, message)
        check_id("vModelId", request.vModelId)
        check_id("targetModelId", request.targetModelId)
        asked = None
        if request.HasField("modelInfo"):
            asked = registration(
                request.targetModelId,
                request.modelInfo,
                used_ms(0, _AGE_LOADED_MS if request.loadNow else _AGE_REGISTERED_MS),
                auto_delete=request.autoDeleteTargetModel,
                labels=self._labels(request.targetModelId),
            )
        await self._vmodels.set(request, asked)
        known = self._view.models.get(request.targetModelId)
        if asked is not None and known is not None:
            await self.register(asked, known=known)
        if request.sync:
            await self._vmodels.settled(request, call.deadline)
        elif request.loadNow:
            self._residency.ensure_in_background(request.targetModelId, used_ms(0, _AGE_LOADED_MS))
        return self._vmodel_status(request.vModelId, request.owner).SerializeToString()

    async def _delete_vmodel(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.DeleteVModelRequest, message)
        await self._vmodels.delete(check_id("vModelId", request.vModelId), request.owner)
        return pb.DeleteVModelResponse().SerializeToString()

    async def _get_vmodel_status(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.GetVModelStatusRequest, message)
        try:
            await self._directory.vmodel(check_id("vModelId", request.vModelId))
        except ModelNotFound:
            return pb.VModelStatusInfo(status=pb.VModelStatusInfo.NOT_FOUND).SerializeToString()
        return self._vmodel_status(request.vModelId, request.owner).SerializeToString()

    def _vmodel_status(self, vmodel_id: str, owner: str) -> pb.VModelStatusInfo:
        vmodel = self._view.vmodels.get(vmodel_id)
        if vmodel is None or (owner and vmodel.owner != owner):
            return pb.VModelStatusInfo(status=pb.VModelStatusInfo.NOT_FOUND)
        info = pb.VModelStatusInfo(
            status=pb.VModelStatusInfo.DEFINED,
            activeModelId=vmodel.active,
            targetModelId=vmodel.target,
            activeModelStatus=self._status(vmodel.active),
            owner=vmodel.owner,
        )
        if vmodel.active != vmodel.target:
            failed = bool(vmodel.failed)
            info.status = pb.VModelStatusInfo.TRANSITION_FAILED if failed else pb.VModelStatusInfo.TRANSITIONING
            info.targetModelStatus.CopyFrom(self._status(vmodel.target))
            if vmodel.canary:
                info.canary_percent = vmodel.canary_percent
            if failed and not info.targetModelStatus.errors:
                info.targetModelStatus.errors.append(vmodel.failed)
        return info

    # Mesh

    async def _get_state(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.GetStateRequest, message)
        engine, stats = self._engine, self._engine.stats
        state = pb.MeshState(
            pod_id=engine.pod_id,
            models_registered=len(self._view.models),
            fates=pb.RequestFates(**{f.name: getattr(stats, f.name) for f in pb.RequestFates.DESCRIPTOR.fields}),
        )
        for pod in sorted({**self._view.pods, engine.pod_id: engine.pod_record()}.values(), key=lambda p: p.pod_id):
            state.pods.add(
                pod_id=pod.pod_id,
                address=pod.address,
                version=pod.version,
                capacity_bytes=pod.capacity_bytes,
                used_bytes=pod.used_bytes,
                models_loaded=pod.loaded,
                models_loading=pod.loading,
                models_failed=pod.failed,
                draining=pod.draining,
                oldest_used_ms=pod.oldest_used_ms,
                labels=pod.labels,
            )
        if request.models:
            for model in sorted(self._view.models.values(), key=lambda model: model.model_id):
                info = pb.ModelInfo(type=model.format, path=model.path, key=model.key)
                state.models.add(model_id=model.model_id, info=info, status=self._status(model.model_id))
        return state.SerializeToString()

    async def _get_memory(self, call: Call, message: bytes) -> bytes:
        parse(pb.GetMemoryRequest, message)
        memory, last = self._memory, self._memory.last
        state = pb.MemoryState(pod_id=self._engine.pod_id, device_lost=memory.lost)
        for tier in memory.tiers():
            state.tiers.add(
                name=tier.name,
                capacity_bytes=tier.capacity,
                free_bytes=tier.free,
                shared_bytes=tier.shared,
                **{f"{told}_bytes": size_bytes for told, size_bytes in tier.by_state.items()},
            )
        for (tenant, tier_name), size_bytes in sorted(memory.tenants().items()):
            state.tenants.add(tenant=tenant, tier=tier_name, size_bytes=size_bytes)
        for model in memory.models():
            state.models.add(
                model_id=model.model_id,
                tenant=model.tenant,
                tier=model.tier,
                state=model.state,
                size_bytes=model.size,
                charged_bytes=model.charged,
            )
        check = state.check
        check.expected_bytes, check.resident_bytes = last.expected, last.resident
        check.device_used_bytes = last.device_used
        check.alarms.extend(last.alarms)
        return state.SerializeToString()


def readable_model(entry: Entry) -> ModelRecord | None:
    """The model of a registry entry; None: it cannot be read, so nothing counts on it."""
    try:
        record = decode(entry.key, entry.value)
    except BadRecord:
        return None
    assert isinstance(record, ModelRecord)
    return record


def used_ms(asked_ms: int, default_age_ms: int) -> int:
    """The time of last use a call asks for; never in the future."""
    now = now_ms()
    return min(asked_ms, now) if asked_ms else now - default_age_ms


def status_info(copies: Collection[CopyRecord]) -> pb.ModelStatusInfo:
    """A registered model's status from its copies, newest first. What lower tiers hold is no copy to a client."""
    copies = [copy for copy in copies if copy.status is not CopyStatus.HELD]
    status, errors = overall(copies)
    info = pb.ModelStatusInfo(status=_COPY_STATUS[status], errors=errors)
    for copy in sorted(copies, key=lambda copy: -copy.since_ms):
        info.modelCopyInfos.add(location=copy.pod_id, copyStatus=_COPY_STATUS[copy.status], time=copy.since_ms)
    return info


def _guarded(handler: Unary) -> Callable[[Call, bytes], Awaitable[bytes]]:
    """A registry that does not answer is the client's to hear."""

    async def guarded(call: Call, message: bytes) -> bytes:
        try:
            return await handler(call, message)
        except RegistryError as error:
            raise RegistryUnavailable(f"the registry does not answer: {error}") from None

    return guarded
