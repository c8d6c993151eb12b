"""Models of the server: loaded, unloaded and sized by it, and asked with the messages as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from loaders.artifacts import agreed
from loaders.base import Artifact, InferError, LoaderError, ModelLost, Signature, Tensor, TensorSpec
from mesh.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    NotHere,
    Overloaded,
    PodUnavailable,
    ServerUnavailable,
    Unimplemented,
)
from mesh.runtime.runtime import Runtime
from mesh.tensors import decode_response, encode_request
from placement.records import ModelId, ModelRecord
from protos import inference_pb2 as v2
from protos import runtime_pb2 as pb

T = TypeVar("T")

_MAY_PASS: Final = (PodUnavailable, ServerUnavailable, DeadlineExceeded, Overloaded, ModelNotFound)
"""Answers to a load after which the same may succeed; NOT_FOUND: a file that is not there yet."""
_LOADED_PER_STORED: Final = 1.25
"""As ModelMesh's adapters reckon what they load."""
_QUEUE: Final = 16, 8
"""Requests that a model with limited concurrency may have under way and waiting: at least, and for each that it takes
at once (ModelMesh)."""
_WARM_UP_S: Final = 120.0


class RemoteLoader:
    """Has the server load one model: a `loaders.base.Loader`. Its methods block, in threads of the pod."""

    def __init__(self, runtime: Runtime, model: ModelRecord, format_name: str) -> None:
        """`format_name`: as it was registered, not in our words."""
        self._runtime = runtime
        self._model = model
        self._format_name = format_name

    def estimate_bytes(self, artifact: Artifact) -> int:
        """What the server predicts, else what its adapter would reckon from the files, or its default."""
        told = self._told(artifact)
        request = pb.PredictModelSizeRequest(**told)
        stored_bytes = json.loads(told["modelKey"]).get("disk_size_bytes", 0)
        least_bytes = max(1, self._runtime.status.defaultModelSizeInBytes)
        predicted_bytes = self._block(self._runtime.predict(request))
        return predicted_bytes or max(least_bytes, int(stored_bytes * _LOADED_PER_STORED))

    def load(self, artifact: Artifact) -> RemoteModel:
        runtime, model_id = self._runtime, self._model.model_id
        response, generation = self._block(runtime.load(pb.LoadModelRequest(**self._told(artifact))))
        size_bytes = response.sizeInBytes or self.estimate_bytes(artifact)
        limited = response.maxConcurrency if runtime.status.limitModelConcurrency else 0
        try:
            signature = self._signature(artifact)
        except LoaderError:
            self._block(runtime.unload(model_id, generation))
            raise
        return RemoteModel(runtime, model_id, generation, signature, size_bytes, limited)

    def _told(self, artifact: Artifact) -> dict[str, str]:
        """What ModelMesh's adapters expect: the path and key as registered if they fetch, else what their puller
        makes of them: a local path, and no more of where it came from."""
        key: dict[str, Any] = json.loads(self._model.key) if self._model.key else {}
        if self._format_name:
            key.setdefault("model_type", {"name": self._format_name})
        path = self._model.path
        if not self._runtime.settings.pulls:
            path = str(artifact.path)
            for name in ("storage_key", "storage_params", "bucket", "schema_path"):
                key.pop(name, None)
            key["disk_size_bytes"] = _stored_bytes(artifact.path)
        told = {"modelId": self._model.model_id, "modelType": self._model.format, "modelPath": path}
        return {**told, "modelKey": json.dumps(key)}

    def _signature(self, artifact: Artifact) -> Signature:
        """What the server says that the model takes and gives, else what is declared, else anything."""
        told = self._block(self._metadata())
        inputs, outputs = (
            tuple(TensorSpec(each.name, each.datatype, tuple(each.shape)) for each in tensors)
            for tensors in (told.inputs, told.outputs)
        )
        own = Signature(inputs or artifact.inputs, outputs or artifact.outputs, told.platform or self._format_name)
        return agreed(own, artifact) if own.inputs and own.outputs else replace(own, lenient=True)

    async def _metadata(self) -> v2.ModelMetadataResponse:
        request = v2.ModelMetadataRequest(name=self._model.model_id)
        try:
            return await self._runtime.calls.ask("ModelMetadata", request, v2.ModelMetadataResponse)
        except Unimplemented:
            return v2.ModelMetadataResponse()

    def _block(self, work: Coroutine[Any, Any, T]) -> T:
        """On the loop, as this thread waits.

        Raises:
            LoaderError: the server's reason.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, self._runtime.loop).result()
        except MeshError as error:
            who = "" if isinstance(error, ServerUnavailable) else f"model server {self._runtime.settings.name}: "
            raise LoaderError(f"{who}{error}", retryable=isinstance(error, _MAY_PASS)) from None


class RemoteModel:
    """A model that the server has loaded."""

    waits = 1

    def __init__(
        self, runtime: Runtime, model_id: ModelId, generation: int, signature: Signature, size_bytes: int, limited: int
    ) -> None:
        """`limited`: requests that it takes at once; 0: any number."""
        self.signature = signature
        self.size_bytes = size_bytes
        self._runtime = runtime
        self._model_id = model_id
        self._generation = generation
        self._slots = asyncio.Semaphore(limited) if limited else None
        least, each = _QUEUE
        self._most = max(least, each * limited)
        self._under_way = 0

    async def forward(self, message: bytes, deadline: float) -> bytes:
        """The answer to a ModelInferRequest, whatever model that names. On the loop.

        Raises:
            MeshError: see `Calls.infer`; `Overloaded`: too many wait.
        """
        if self._slots is None:
            return await self._runtime.calls.infer(self._model_id, message, deadline)
        if self._under_way >= self._most:
            raise Overloaded(f"model {self._model_id!r}: {self._under_way} requests are under way and wait")
        self._under_way += 1
        try:
            async with self._slots:
                return await self._runtime.calls.infer(self._model_id, message, deadline)
        finally:
            self._under_way -= 1

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once, from a thread: for warm-ups.

        Raises:
            InferError: the server's own reason.
            ModelLost: it does not have the model any more, or is gone.
        """
        runtime = self._runtime
        deadline = runtime.loop.time() + _WARM_UP_S
        work = self.forward(encode_request(inputs, outputs), deadline)
        try:
            return decode_response(asyncio.run_coroutine_threadsafe(work, runtime.loop).result())
        except (NotHere, ServerUnavailable) as error:
            raise ModelLost(str(error), began=isinstance(error, ServerUnavailable)) from None
        except MeshError as error:
            raise InferError(str(error), bad_input=isinstance(error, InvalidRequest)) from None

    def unload(self) -> None:
        work = self._runtime.unload(self._model_id, self._generation)
        asyncio.run_coroutine_threadsafe(work, self._runtime.loop).result()


def _stored_bytes(path: Path) -> int:
    """Of a model's files, as far as they can be seen here."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    except OSError:
        return 0
