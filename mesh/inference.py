"""The V2 service (Open Inference Protocol) with the repository and streaming extensions, over `mesh.rpc`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from loaders.base import LoaderError, Tensor
from mesh import __version__
from mesh.directory import Directory, check_id
from mesh.driver import Driver
from mesh.errors import InvalidRequest, MeshError, ModelFailed, ModelNotFound, NotHere, Unimplemented, encoded
from mesh.models import settings_of
from mesh.plans import answered, learn, split
from mesh.residency import Residency, overall
from mesh.resident import Resident
from mesh.router import MODEL, Router, priority_of
from mesh.rpc import SERVED, Call, Handlers, Stream, Unary
from mesh.settings import ModelSettings
from mesh.split import Split
from mesh.tensors import check, decode, encode
from mesh.wire import peek_string, with_strings
from placement.cache import Copy
from placement.records import CopyStatus, ModelId
from protos import inference_pb2 as pb

SERVICE: Final = "/inference.GRPCInferenceService/"
INFER: Final = SERVICE + "ModelInfer"

EXTENSIONS: Final = ("model_repository", "model_repository(unload_dependents)", "parameters")

M = TypeVar("M", bound=Message)

Forward = Callable[[bytes, float], Awaitable[bytes]]


class Inference:
    """Handlers of the V2 service."""

    def __init__(
        self,
        driver: Driver,
        router: Router,
        directory: Directory,
        residency: Residency,
        is_ready: Callable[[], bool],
        split: Split,
    ) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._router = router
        self._directory = directory
        self._residency = residency
        self._is_ready = is_ready
        self._split = split

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
        field = pb.ModelInferRequest.MODEL_NAME_FIELD_NUMBER
        model_id, hop = await self._router.model_of(call, message, field, splits=True)
        if call.side is None:
            return await self._router.walk(call, message, model_id, hop, self._infer_here)
        call.reply_metadata[SERVED] = encoded(model_id)
        with self._split.timed(*call.side):
            return await self._router.walk(call, message, model_id, hop, self._infer_here)

    async def _infer_here(self, copy: Copy, call: Call, message: bytes) -> bytes:
        """Decode, run, encode. `model_name` of the response is the name the client asked for."""
        resident = self._driver.resident(copy.model.model_id)
        if resident.forward is not None:
            return await self._forward(resident, resident.forward, copy, call, message)
        found = split(message)
        if found is None:
            return await self._infer_unplanned(copy, call, message, None)
        key, _, id_field, tensors = found
        plan = resident.plans.get(key, tensors)
        if plan is None:
            return await self._infer_unplanned(copy, call, message, key)
        results = await self._driver.batcher.run(
            copy, resident, plan.arrays(tensors), plan.outputs, len(message), call.deadline, priority_of(call)
        )
        response = answered(plan, id_field, results)
        if response is None:
            request, version = decode(message), resident.settings.version
            response = encode(request, results, model_name=request.model_name, model_version=version)
            learn(plan, results, model_name=request.model_name, model_version=version)
        return response

    async def _forward(self, resident: Resident, forward: Forward, copy: Copy, call: Call, message: bytes) -> bytes:
        """Have a model server answer; what it sends goes on as it comes, under the name that the client asked for."""
        model_id, version = copy.model.model_id, resident.settings.version
        request = pb.ModelInferRequest
        _check_version(peek_string(message, request.MODEL_VERSION_FIELD_NUMBER) or "", resident.settings, model_id)
        began_s = time.perf_counter()
        try:
            response = await forward(message, call.deadline)
        except NotHere:
            self._driver.lost(copy)
            raise
        self._driver.in_line.pace(model_id, len(message)).measured(time.perf_counter() - began_s)
        name = peek_string(message, request.MODEL_NAME_FIELD_NUMBER) or asked_name(call, model_id)
        told = {pb.ModelInferResponse.MODEL_NAME_FIELD_NUMBER: name}
        if version:
            told[pb.ModelInferResponse.MODEL_VERSION_FIELD_NUMBER] = version
        try:
            return with_strings(response, told)
        except InvalidRequest as error:
            raise ModelFailed(f"the model server answered with a {error}") from None

    async def _infer_unplanned(self, copy: Copy, call: Call, message: bytes, key: bytes | None) -> bytes:
        """The long way; if the request is right and has a key, the next one like it takes the short one."""
        resident = self._driver.resident(copy.model.model_id)
        request = decode(message)
        inputs, outputs = check(request, resident.model.signature)
        _check_version(request.model_version, resident.settings, copy.model.model_id)
        _check_batch(inputs, resident.settings)
        if key is not None:
            resident.plans.keep(key, request, inputs, outputs)
        results = await self._driver.batcher.run(
            copy, resident, inputs, outputs, len(message), call.deadline, priority_of(call)
        )
        asked = request.model_name or asked_name(call, copy.model.model_id)
        return encode(request, results, model_name=asked, model_version=resident.settings.version)

    async def _model_stream_infer(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Triton's bidirectional stream: one answer per request, in order; errors stay in band."""
        loop = asyncio.get_running_loop()
        per_request_s = call.deadline - loop.time()
        async for message in messages:
            one = Call(INFER, call.metadata, loop.time() + per_request_s)
            try:
                async with asyncio.timeout_at(one.deadline):
                    response = pb.ModelInferResponse.FromString(await self._model_infer(one, message))
                yield pb.ModelStreamInferResponse(infer_response=response).SerializeToString()
            except TimeoutError:
                yield _in_band("the deadline passed before the request was served", message)
            except MeshError as error:
                yield _in_band(str(error), message)

    async def _model_metadata(self, call: Call, message: bytes) -> bytes:
        model_id, hop = await self._router.model_of(call, message, pb.ModelMetadataRequest.NAME_FIELD_NUMBER)
        return await self._router.walk(call, message, model_id, hop, self._metadata_here)

    async def _metadata_here(self, copy: Copy, call: Call, message: bytes) -> bytes:
        request = parse(pb.ModelMetadataRequest, message)
        resident = self._driver.resident(copy.model.model_id)
        signature, settings = resident.model.signature, resident.settings
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
        """Ready: loaded, or can be loaded on demand. Unknown, failed and stopped models are not, as Triton answers."""
        request = parse(pb.ModelReadyRequest, message)
        try:
            model_id, _ = await self._router.model_of(call, message, pb.ModelReadyRequest.NAME_FIELD_NUMBER)
            model = self._engine.view.models[await self._directory.model(model_id)]
            _check_version(request.version, settings_of(model), model_id)
            is_failed = overall(self._engine.copies_of(model_id).values())[0] is CopyStatus.FAILED
            ready = not is_failed and not model.stopped
        except (ModelNotFound, LoaderError):
            ready = False
        return pb.ModelReadyResponse(ready=ready).SerializeToString()

    # Repository

    async def _repository_index(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.RepositoryIndexRequest, message)
        response = pb.RepositoryIndexResponse()
        for model in sorted(self._engine.view.models.values(), key=lambda model: model.model_id):
            status, errors = overall(self._engine.copies_of(model.model_id).values())
            try:
                version = settings_of(model).version
            except LoaderError as error:
                version, errors = "", [str(error)]
            if status is CopyStatus.LOADED or not request.ready:
                response.models.add(
                    name=model.model_id, version=version, state=_STATES[status], reason="; ".join(errors)
                )
        return response.SerializeToString()

    async def _repository_load(self, call: Call, message: bytes) -> bytes:
        request = parse(pb.RepositoryModelLoadRequest, message)
        name = check_id("model_name", request.model_name or request.repository_name)
        if request.parameters:
            raise Unimplemented("parameters: overriding a model's configuration or files; register the model anew")
        await self._residency.ensure_loaded(await self._directory.named(name), call.deadline)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True).SerializeToString()

    async def _repository_unload(self, call: Call, message: bytes) -> bytes:
        """Give up every copy; the model stays registered and is loaded again when somebody asks for it."""
        request = parse(pb.RepositoryModelUnloadRequest, message)
        name = check_id("model_name", request.model_name or request.repository_name)
        told = call.texts(MODEL.removesuffix("-bin"))  # by the pod that was asked; a vmodel may mean another one here
        await self._residency.give_up(call, message, told[0] if told else await self._directory.named(name))
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


def _in_band(error: str, message: bytes) -> bytes:
    """A stream's answer to one request that failed; with the id, if there is one, so that the client knows which."""
    answer = pb.ModelStreamInferResponse(error_message=error)
    with contextlib.suppress(InvalidRequest):
        request_id = peek_string(message, pb.ModelInferRequest.ID_FIELD_NUMBER)
        if request_id:
            answer.infer_response.id = request_id
    return answer.SerializeToString()


def asked_name(call: Call, model_id: ModelId) -> str:
    """The name in ModelMesh's headers, for clients that leave the message's name empty."""
    return next(iter(call.texts("mm-vmodel-id") or call.texts("mm-model-id")), model_id)


def _check_version(asked: str, settings: ModelSettings, model_id: ModelId) -> None:
    if asked and asked != settings.version:
        has = f"has version {settings.version!r}" if settings.version else "has no versions"
        raise ModelNotFound(f"model {model_id!r} {has}, not {asked!r}")


def _check_batch(inputs: Mapping[str, Tensor], settings: ModelSettings) -> None:
    """Triton: the first dimension of every input is the batch, at most max_batch_size."""
    if settings.max_batch_size:
        for name, tensor in inputs.items():
            if tensor.ndim and tensor.shape[0] > settings.max_batch_size:
                raise InvalidRequest(
                    f"input {name!r}: batch of {tensor.shape[0]}, expected at most {settings.max_batch_size}"
                )
