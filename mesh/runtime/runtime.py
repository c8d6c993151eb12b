"""The server itself: whether it is there, and which models it has. Everything here runs on the event loop.

It is asked for its status until it is READY, at start and whenever it was gone: that is also its word that it has no
models. A server that goes takes its models with it, so the pod gives their copies up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from math import inf
from typing import Final

from mesh.errors import (
    FailedPrecondition,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    PodUnavailable,
    ServerUnavailable,
    Unimplemented,
)
from mesh.rpc import Client
from mesh.runtime.calls import Calls
from mesh.runtime.settings import RuntimeSettings
from placement.limits import Limits
from placement.records import ModelId
from protos import runtime_pb2 as pb

log = logging.getLogger(__name__)

_INFER: Final = "inference.GRPCInferenceService/ModelInfer"

START_S: Final = 180.0
"""How long a starting pod waits for its server (ModelMesh)."""
_POLL_S: Final = 2.0
_LOG_EVERY_S: Final = 20.0
_PREDICT_S: Final = 0.5
_SIZE_S: Final = 30.0
_LOAD_S: Final = 90.0
"""If the server does not say; so ModelMesh's adapters."""
_UNLOAD_S: Final = 20.0
_UNLOAD_PAUSES_S: Final = (0.0, 0.2, 1.0, 5.0)
"""Before each try; what fails each time is tried again for as long as the server lives."""
_AGAIN_S: Final = 10.0

_NOT_ATTEMPTED: Final = (InvalidRequest, FailedPrecondition)
"""Answers to a load that leave nothing behind."""


class Runtime:
    """A pod's model server."""

    def __init__(self, settings: RuntimeSettings, client: Client) -> None:
        """`client` is its own: it speaks plaintext."""
        self.settings = settings
        self.calls = Calls(settings, client)
        self.status = pb.RuntimeStatusResponse()
        self.loop = asyncio.get_running_loop()
        self.generation = 0
        """How often it was READY; 0: it was never. What was loaded in another one is gone."""
        self.is_up = False
        self._loaded: set[ModelId] = set()
        self._unreleased: set[ModelId] = set()
        """Models that it could not be made to unload."""
        self._releasing = asyncio.Lock()
        self._predicts = True
        self._loads: set[asyncio.Task[object]] = set()
        self._stopped = False

    # Its life

    async def start(self) -> None:
        """Return when it is READY.

        Raises:
            ServerUnavailable: it is not in time, or speaks no V2; one sentence.
        """
        try:
            async with asyncio.timeout(START_S):
                await self._until_ready()
        except TimeoutError:
            raise ServerUnavailable(f"{self} was not ready in {START_S:.0f} s") from None
        methods = self.status.methodInfos
        if methods and not self.status.allowAnyMethod and _INFER not in methods:
            raise ServerUnavailable(f"{self} does not serve V2 gRPC ({_INFER})")
        if list(methods[_INFER].idInjectionPath if _INFER in methods else ()) not in ([], [1]):
            raise ServerUnavailable(f"{self} wants the model's id elsewhere than in model_name")

    def limits(self, limits: Limits) -> Limits:
        """A pod's limits with what the server says of its own."""
        status = self.status
        return replace(
            limits,
            capacity_bytes=min(limits.capacity_bytes, status.capacityInBytes or limits.capacity_bytes),
            load_slots=min(limits.load_slots, status.maxLoadingConcurrency or limits.load_slots),
            load_timeout_ms=max(limits.load_timeout_ms, status.modelLoadingTimeoutMs),
            labels=",".join(filter(None, (limits.labels, self.settings.labels))),
        )

    async def watch(self, lost: Callable[[Collection[ModelId]], None]) -> None:
        """Notice that it has gone, and that it is back; `lost` hears which models went with it. Until cancelled."""
        tried_s = self.loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.calls.suspected.wait(), _POLL_S)
            self.calls.suspected.clear()
            if await self.calls.is_alive():
                if self._unreleased and self.loop.time() >= tried_s + _AGAIN_S:
                    tried_s = self.loop.time()
                    for model_id in list(self._unreleased):
                        await self._release(model_id)
                continue
            self.is_up = False
            loaded, self._loaded = self._loaded, set()
            log.warning("%s is gone, and with it %d models", self, len(loaded))
            lost(loaded)
            await self._until_ready()

    def stop(self) -> None:
        """End the loads under way; called from any thread."""
        self.loop.call_soon_threadsafe(self._stop)

    async def close(self) -> None:
        await self.calls.close()

    def __str__(self) -> str:
        return str(self.calls)

    def _stop(self) -> None:
        self._stopped = True
        for load in self._loads:
            load.cancel()

    async def _until_ready(self) -> None:
        told_s = -inf
        while True:
            try:
                status = await self.calls.manage("runtimeStatus", pb.RuntimeStatusRequest(), pb.RuntimeStatusResponse)
                why = f"it says {pb.RuntimeStatusResponse.Status.Name(status.status)}"
            except (MeshError, ValueError) as error:
                status, why = pb.RuntimeStatusResponse(), str(error)
            if status.status == pb.RuntimeStatusResponse.READY:
                break
            if self.loop.time() >= told_s + _LOG_EVERY_S:
                told_s = self.loop.time()
                log.warning("waiting for %s: %s", self, why)
            await asyncio.sleep(_POLL_S)
        self.status = status
        self._unreleased.clear()
        self.generation += 1
        self.is_up = True
        log.info("%s %s is ready, capacity %d bytes", self, status.runtimeVersion, status.capacityInBytes)

    # Loads

    async def load(self, request: pb.LoadModelRequest) -> tuple[pb.LoadModelResponse, int]:
        """Load a model; its size, and how many requests it takes, in the answer, and the generation it is of.

        Raises:
            MeshError: the server's own answer, or `ServerUnavailable`; nothing stays behind.
        """
        model_id = request.modelId
        if self._stopped or not self.is_up:
            raise ServerUnavailable(f"{self} does not answer")
        await self._release(model_id)
        self._unreleased.discard(model_id)  # if it has it still, it will not load it twice
        generation = self.generation
        timeout_s = self.status.modelLoadingTimeoutMs / 1e3 or _LOAD_S
        load = asyncio.current_task()
        assert load is not None
        self._loads.add(load)
        try:
            response = await self.calls.manage("loadModel", request, pb.LoadModelResponse, timeout_s)
            if not response.sizeInBytes:
                response.sizeInBytes = await self._size(model_id)
        except asyncio.CancelledError:
            await self.unload(model_id, generation)
            raise ServerUnavailable("the pod stops") from None
        except MeshError as error:
            if isinstance(error, PodUnavailable):
                self.calls.suspected.set()
            if not isinstance(error, _NOT_ATTEMPTED):
                await self.unload(model_id, generation)
            raise
        finally:
            self._loads.discard(load)
        if generation != self.generation or not self.is_up:
            raise ServerUnavailable(f"{self} went while it loaded the model")
        self._loaded.add(model_id)
        return response, generation

    async def _size(self, model_id: ModelId) -> int:
        request = pb.ModelSizeRequest(modelId=model_id)
        try:
            return (await self.calls.manage("modelSize", request, pb.ModelSizeResponse, _SIZE_S)).sizeInBytes
        except Unimplemented:
            return 0

    async def predict(self, request: pb.PredictModelSizeRequest) -> int:
        """Bytes that a model will take; 0: the server does not tell."""
        if self._predicts and self.is_up:
            try:
                answer = await self.calls.manage("predictModelSize", request, pb.PredictModelSizeResponse, _PREDICT_S)
                return answer.sizeInBytes
            except Unimplemented:
                self._predicts = False
            except MeshError as error:
                log.debug("%s does not predict the size of %s: %s", self, request.modelId, error)
        return 0

    async def unload(self, model_id: ModelId, generation: int) -> None:
        """Unload a model of that generation. What the server cannot do now is tried again later."""
        self._loaded.discard(model_id)
        why = ""
        for pause_s in (0.0,) if self._stopped else _UNLOAD_PAUSES_S:
            await asyncio.sleep(pause_s)
            if generation != self.generation or not self.is_up:
                return
            try:
                await self._unload(model_id)
                return
            except MeshError as error:
                why = str(error)
        self.is_up = self.is_up and not self._stopped  # no other one has to wait for it then
        log.error("%s did not unload model %s, whose memory it may still hold: %s", self, model_id, why)
        self._unreleased.add(model_id)

    async def _release(self, model_id: ModelId) -> None:
        """Try once more to have it unloaded."""
        async with self._releasing:  # of a model that is being loaded anew, nothing is under way any more
            if model_id in self._unreleased:
                with contextlib.suppress(MeshError):
                    await self._unload(model_id)
                    self._unreleased.discard(model_id)

    async def _unload(self, model_id: ModelId) -> None:
        with contextlib.suppress(ModelNotFound):
            request = pb.UnloadModelRequest(modelId=model_id)
            await self.calls.manage("unloadModel", request, pb.UnloadModelResponse, _UNLOAD_S)
