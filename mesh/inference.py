"""The V2 service (Open Inference Protocol) with the repository and streaming extensions, over `mesh.rpc`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from loaders.base import InferError, LoadedModel
from mesh import __version__
from mesh.directory import check_id
from mesh.driver import Driver
from mesh.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MeshError,
    ModelFailed,
    ModelNotFound,
)
from mesh.repository import ModelSettings, from_key
from mesh.router import Router
from mesh.rpc import Call, Handlers, Stream, Unary
from mesh.status import model_status
from mesh.tensors import DecodedRequest, check, decode, encode
from placement.cache import Copy
from placement.messages import CopyUnwanted, Hop
from placement.records import CopyStatus, ModelId
from protos import inference_pb2 as pb

SERVICE: Final = "/inference.GRPCInferenceService/"

EXTENSIONS: Final = ("model_repository", "model_repository(unload_dependents)", "parameters")

M = TypeVar("M", bound=Message)


class Inference:
    """Handlers of the V2 service."""

    def __init__(self, driver: Driver, router: Router, is_ready: Callable[[], bool]) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._router = router
        self._is_ready = is_ready

    def handlers(self) -> Handlers:
        unary: dict[str, Unary] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_load,
            "RepositoryModelUnload": self._repository_unload,
        }
        streams: dict[str, Stream] = {"ModelStreamInfer": self._model_stream_infer}
        return Handlers(
            {SERVICE + name: handler for name, handler in unary.items()},
            {SERVICE + name: handler for name, handler in streams.items()},
        )

    # Server

    async def _server_live(self, call: Call, message: bytes) -> bytes:
        parse(pb.ServerLiveRequest, message)
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, call: Call, message: bytes) -> bytes:
        parse(pb.ServerReadyRequest, message)
        return pb.ServerReadyResponse(ready=self._is_ready()).SerializeToString()

    async def _server_metadata(self, call: Call, message: bytes) -> bytes:
        parse(pb.ServerMetadataRequest, message)
        return pb.ServerMetadataResponse(
            name="densemesh", version=__version__, extensions=EXTENSIONS
        ).SerializeToString()

    # Models

    async def _model_infer(self, call: Call, message: bytes) -> bytes:
        model_id, hop = await self._router.model_of(call, message, pb.ModelInferRequest.MODEL_NAME_FIELD_NUMBER)
        return await self._router.walk(call, message, model_id, hop, self._infer_here)

    async def _infer_here(self, copy: Copy, call: Call, message: bytes) -> bytes:
        """Decode, run in a thread, encode. `model_name` of the response is the name the client asked for."""
        model = self._driver.loaded(copy.model.model_id)
        request = check(decode(message), model.signature)
        settings = from_key(copy.model.key)
        _check_version(request.model_version, settings, copy.model.model_id)
        _check_batch(request, settings)
        asked = request.model_name or asked_name(call, copy.model.model_id)
        self._driver.pin(copy)
        outputs = await self._driver.run(copy, lambda: _infer(model, request))
        return encode(request, outputs, model_name=asked, model_version=settings.version)

    async def _model_stream_infer(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Triton's bidirectional stream: one answer per request, in order; errors stay in band."""
        loop = asyncio.get_running_loop()
        per_request_s = call.deadline - loop.time()
        async for message in messages:
            one = Call(SERVICE + "ModelInfer", call.metadata, loop.time() + per_request_s)
            try:
                async with asyncio.timeout_at(one.deadline):
                    response = pb.ModelInferResponse.FromString(await self._model_infer(one, message))
                yield pb.ModelStreamInferResponse(infer_response=response).SerializeToString()
            except TimeoutError:
                yield pb.ModelStreamInferResponse(error_message=DeadlineExceeded.__name__).SerializeToString()
            except MeshError as error:
                yield pb.ModelStreamInferResponse(error_message=str(error)).SerializeToString()

    async def _model_metadata(self, call: Call, message: bytes) -> bytes:
        model_id, hop = await self._router.model_of(call, message, pb.ModelMetadataRequest.NAME_FIELD_NUMBER)
        return await self._router.walk(call, message, model_id, hop, self._metadata_here)

    async def _metadata_here(self, copy: Copy, call: Call, message: bytes) -> bytes:
        request = parse(pb.ModelMetadataRequest, message)
        signature = self._driver.loaded(copy.model.model_id).signature
        settings = from_key(copy.model.key)
        _check_version(request.version, settings, copy.model.model_id)
        response = pb.ModelMetadataResponse(
            name=request.name or asked_name(call, copy.model.model_id),
            versions=[settings.version] if settings.version else [],
            platform=signature.platform,
        )
        for spec in signature.inputs:
            response.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        for spec in signature.outputs:
            response.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response.SerializeToString()

    async def _model_ready(self, call: Call, message: bytes) -> bytes:
        """Ready: loaded, or can be loaded on demand. Unknown and failed models are not, as Triton answers."""
        request = parse(pb.ModelReadyRequest, message)
        try:
            model_id, _ = await self._router.model_of(call, message, pb.ModelReadyRequest.NAME_FIELD_NUMBER)
            model = self._engine.view.models[model_id]
            _check_version(request.version, from_key(model.key), model_id)
            status, _ = model_status(self._engine, model_id)
            ready = status is not CopyStatus.FAILED
        except ModelNotFound:
            ready = False
        return pb.ModelReadyResponse(ready=ready).SerializeToString()

    # Repository

    async def _repository_index(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.RepositoryIndexRequest, message)
        response = pb.RepositoryIndexResponse()
        for model_id in sorted(self._engine.view.models):
            status, error = model_status(self._engine, model_id)
            if request.ready and status is not CopyStatus.LOADED:
                continue
            settings = from_key(self._engine.view.models[model_id].key)
            response.models.add(name=model_id, version=settings.version, state=_STATES[status], reason=error)
        return response.SerializeToString()

    async def _repository_load(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.RepositoryModelLoadRequest, message)
        name = check_id("model_name", request.model_name or request.repository_name)
        if request.parameters:
            raise InvalidRequest("parameters: config and file overrides are not supported; register the model anew")
        await self._router.ensure_loaded(name, call.deadline)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True).SerializeToString()

    async def _repository_unload(self, call: Call, message: bytes) -> bytes:
        """Give up every copy; the model stays registered and is loaded again when it is asked for."""
        request = parse(pb.RepositoryModelUnloadRequest, message)
        name = check_id("model_name", request.model_name or request.repository_name)
        model_id, hop = await self._router.model_of_name(call, name)
        self._driver.step(CopyUnwanted(model_id))
        if hop is Hop.CLIENT:
            await self._router.tell_holders(call, message, model_id)
        while model_id in self._engine.cache.copies:
            await self._driver.changed(model_id)
        return pb.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True).SerializeToString()


_STATES: Final = {
    CopyStatus.LOADED: "READY",
    CopyStatus.LOADING: "LOADING",
    CopyStatus.FAILED: "UNAVAILABLE",
    None: "UNAVAILABLE",
}
"""Triton's words; a model that is registered and not loaded is UNAVAILABLE without a reason."""


def parse(kind: type[M], message: bytes) -> M:
    """The message, decoded.

    Raises:
        InvalidRequest
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidRequest(f"the message is not a valid {kind.DESCRIPTOR.name}") from None


def asked_name(call: Call, model_id: ModelId) -> str:
    """The name in ModelMesh's headers, for clients that leave the message's name empty."""
    return next(iter(call.texts("mm-vmodel-id") or call.texts("mm-model-id")), model_id)


def _infer(model: LoadedModel, request: DecodedRequest) -> dict[str, object]:
    try:
        return model.infer(request.inputs, request.outputs)
    except InferError as error:
        raise (InvalidRequest if error.bad_input else ModelFailed)(str(error)) from None


def _check_version(asked: str, settings: ModelSettings, model_id: ModelId) -> None:
    if asked and asked != settings.version:
        has = f"has version {settings.version!r}" if settings.version else "has no versions"
        raise ModelNotFound(f"model {model_id!r} {has}, not {asked!r}")


def _check_batch(request: DecodedRequest, settings: ModelSettings) -> None:
    """Triton: the first dimension of every input is the batch, at most max_batch_size."""
    if settings.max_batch_size:
        for name, tensor in request.inputs.items():
            if tensor.ndim and tensor.shape[0] > settings.max_batch_size:
                raise InvalidRequest(
                    f"input {name!r}: batch of {tensor.shape[0]}, expected at most {settings.max_batch_size}"
                )
