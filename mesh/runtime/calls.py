"""What a model server is asked, and what its answers mean. Everything here runs on the event loop."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.errors import (
    InvalidRequest,
    MeshError,
    ModelFailed,
    ModelNotFound,
    NotHere,
    PodUnavailable,
    ServerUnavailable,
)
from mesh.rpc import Client
from mesh.runtime.settings import RuntimeSettings
from mesh.wire import with_strings
from placement.records import ModelId
from protos import inference_pb2 as v2

M = TypeVar("M", bound=Message)

SPI: Final = "/mmesh.ModelRuntime/"
V2: Final = "/inference.GRPCInferenceService/"
ANSWER_S: Final = 10.0
"""For what a healthy server answers at once."""


class Calls:
    """To one server, in plaintext."""

    def __init__(self, settings: RuntimeSettings, client: Client) -> None:
        self._settings = settings
        self._client = client
        self._loop = asyncio.get_running_loop()
        self.suspected = asyncio.Event()
        """Set when it did not answer a request, or could not."""

    def __str__(self) -> str:
        return f"the model server {self._settings.name} at {self._settings.address}"

    async def close(self) -> None:
        await self._client.close()

    async def manage(self, method: str, request: Message, answer: type[M], timeout_s: float = ANSWER_S) -> M:
        """Call the SPI.

        Raises:
            MeshError: the server's own answer; `PodUnavailable` if there is none.
        """
        return await self._call(self._settings.address, SPI + method, request, answer, timeout_s)

    async def ask(self, method: str, request: Message, answer: type[M], timeout_s: float = ANSWER_S) -> M:
        """Call V2. Raises: see `manage`."""
        return await self._call(self._settings.data_address, V2 + method, request, answer, timeout_s)

    async def infer(self, model_id: ModelId, message: bytes, deadline: float) -> bytes:
        """Have a loaded model answer a ModelInferRequest, whatever model it names.

        Raises:
            NotHere: the server does not have the model (any more).
            ServerUnavailable: it does not answer, or not now.
            MeshError: its own answer.
        """
        message = with_strings(message, {1: model_id, 2: ""})
        try:
            return (await self._client.call(self._settings.data_address, V2 + "ModelInfer", message, (), deadline))[0]
        except MeshError as error:
            if _may_mean_unknown(error) and not await self._has(model_id):
                raise NotHere(f"{self} does not have model {model_id!r} any more: {error}") from None
            if isinstance(error, PodUnavailable):
                self.suspected.set()
                raise ServerUnavailable(f"{self}: {error}") from None
            raise

    async def is_alive(self) -> bool:
        """A server that cannot be reached twice in a row is gone; what it answers does not matter."""
        for pause_s in (0.2, 0.0):
            try:
                await self.ask("ServerLive", v2.ServerLiveRequest(), v2.ServerLiveResponse)
            except PodUnavailable:
                await asyncio.sleep(pause_s)
            except MeshError:
                return True
            else:
                return True
        return False

    async def _has(self, model_id: ModelId) -> bool:
        try:
            return (await self.ask("ModelReady", v2.ModelReadyRequest(name=model_id), v2.ModelReadyResponse)).ready
        except PodUnavailable as error:
            return not _may_mean_unknown(error)
        except MeshError:
            return False

    async def _call(self, address: str, method: str, request: Message, answer: type[M], timeout_s: float) -> M:
        deadline = self._loop.time() + timeout_s
        response, _ = await self._client.call(address, method, request.SerializeToString(), (), deadline)
        try:
            return answer.FromString(response)
        except DecodeError as error:
            raise ModelFailed(f"{method} was answered with something else: {error}") from None


def _may_mean_unknown(error: MeshError) -> bool:
    """Whether a server may say so that it does not have the model: NOT_FOUND; Triton: UNAVAILABLE, "Request for unknown
    model: 'm' is not found" or "has no available versions"; MLServer: INVALID_ARGUMENT, "Model m not found"."""
    text = str(error).lower()
    return (
        isinstance(error, ModelNotFound)
        or (isinstance(error, PodUnavailable) and "unknown model" in text)
        or (isinstance(error, InvalidRequest) and "not found" in text)
    )
