"""The mesh's management API, as the operator needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from mesh_operator.status import Copy, Model, VModel
from mesh_operator.world import Call, DeleteVModel, EnsureLoaded, Problem, SetVModel, Trouble
from protos import management_pb2 as pb

M = TypeVar("M")

TIMEOUT_S: Final = 10.0
"""Of one attempt (ModelMesh's controller: 10 s)."""
_TRIES: Final = 3
_PAUSE_S: Final = 0.2
_SERVICE: Final = "/mmesh.ModelMesh/"
_AGAIN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
_TROUBLE: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: Trouble.REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: Trouble.REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: Trouble.REFUSED,
    grpc.StatusCode.ALREADY_EXISTS: Trouble.TAKEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Trouble.QUOTA,
}


class MeshError(Exception):
    """A call failed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class MeshClient:
    """Calls to any pod behind an address. Each is idempotent, so it is tried again where that may help."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None, tls_name: str = "") -> None:
        """`target`: host:port; a name with several addresses is balanced over. `tls_name`: in the pods' certificate."""
        options: list[tuple[str, Any]] = [
            ("grpc.lb_policy_name", "round_robin"),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if tls_name:
            options.append(("grpc.ssl_target_name_override", tls_name))
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._set = self._method("setVModel", pb.SetVModelRequest, pb.VModelStatusInfo)
        self._get = self._method("getVModelStatus", pb.GetVModelStatusRequest, pb.VModelStatusInfo)
        self._delete = self._method("deleteVModel", pb.DeleteVModelRequest, pb.DeleteVModelResponse)
        self._ensure = self._method("ensureLoaded", pb.EnsureLoadedRequest, pb.ModelStatusInfo)

    async def close(self) -> None:
        await self._channel.close()

    async def vmodel(self, vmodel_id: str, owner: str) -> VModel | None:
        """What the mesh says of a vmodel; None: there is none of this owner.

        Raises:
            MeshError
        """
        return _vmodel(await _tried(self._get, pb.GetVModelStatusRequest(vModelId=vmodel_id, owner=owner)))

    async def carry_out(self, call: Call) -> VModel | None:
        """Make a call, and say what the mesh says of the vmodel then.

        Raises:
            MeshError
        """
        match call:
            case SetVModel():
                request = pb.SetVModelRequest(
                    vModelId=call.vmodel_id,
                    targetModelId=call.model_id,
                    owner=call.owner,
                    modelInfo=pb.ModelInfo(type=call.type, path=call.path, key=call.key),
                    autoDeleteTargetModel=True,
                    loadNow=call.load_now,
                    canary_percent=call.canary_percent,
                )
                return _vmodel(await _tried(self._set, request))
            case EnsureLoaded():
                await _tried(self._ensure, pb.EnsureLoadedRequest(modelId=call.model_id))
                return await self.vmodel(call.vmodel_id, call.owner)
            case DeleteVModel():
                await _tried(self._delete, pb.DeleteVModelRequest(vModelId=call.vmodel_id, owner=call.owner))
                return None

    def _method(self, name: str, request: Any, response: type[M]) -> Callable[[Any], Awaitable[M]]:
        call = self._channel.unary_unary(
            _SERVICE + name,
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,  # type: ignore[attr-defined]  # it is a message
        )

        async def called(message: Any) -> M:
            answer: M = await call(message, timeout=TIMEOUT_S)
            return answer

        return called


async def _tried(method: Callable[[Any], Awaitable[M]], request: Any) -> M:
    for attempt in range(1, _TRIES + 1):
        try:
            return await method(request)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _AGAIN or attempt == _TRIES:
                message = error.details() or error.code().name
                raise MeshError(Problem(_TROUBLE.get(error.code(), Trouble.UNREACHABLE), message)) from None
        await asyncio.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _vmodel(info: pb.VModelStatusInfo) -> VModel | None:
    if info.status == pb.VModelStatusInfo.NOT_FOUND:
        return None
    active = _model(info.activeModelId, info.activeModelStatus)
    if info.activeModelId == info.targetModelId:
        return VModel(active, active)
    target = _model(info.targetModelId, info.targetModelStatus)
    percent = info.canary_percent if info.HasField("canary_percent") else None
    return VModel(active, target, info.status == pb.VModelStatusInfo.TRANSITION_FAILED, percent)


def _model(model_id: str, info: pb.ModelStatusInfo) -> Model:
    name = pb.ModelStatusInfo.ModelStatus.Name
    copies = tuple(Copy(copy.location, name(copy.copyStatus), copy.time) for copy in info.modelCopyInfos)
    return Model(model_id, name(info.status), tuple(info.errors), copies)
