"""A client of generated messages over grpc.aio: every RPC of the pod by its short name."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mesh.tls import Tls
from protos import inference_pb2, management_pb2

SERVICES: Final = {
    "inference.GRPCInferenceService": (inference_pb2.DESCRIPTOR, "GRPCInferenceService"),
    "mmesh.ModelMesh": (management_pb2.DESCRIPTOR, "ModelMesh"),
    "densemesh.Mesh": (management_pb2.DESCRIPTOR, "Mesh"),
}
METHODS: Final[dict[str, tuple[str, Any]]] = {
    method.name: (f"/{path}/{method.name}", GetMessageClass(method.output_type))
    for path, (file, service) in SERVICES.items()
    for method in file.services_by_name[service].methods
}
"""Short name of each RPC to its path and the class of its answer."""

TIMEOUT_S: Final = 30.0


class Client:
    """One channel to one pod."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        """`tls`: the pod's own, which serves a client as well."""
        self.address = address
        options: list[tuple[str, str | int]] = [("grpc.use_local_subchannel_pool", 1)]
        options.append(("grpc.max_send_message_length", -1))
        if tls is None:
            self.channel = grpc.aio.insecure_channel(address, options=options)
            return
        options.append(("grpc.ssl_target_name_override", tls.files.name or address.rpartition(":")[0]))
        credentials = grpc.ssl_channel_credentials(tls.pems["ca"], tls.pems["key"], tls.pems["cert"])
        self.channel = grpc.aio.secure_channel(address, credentials, options=options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()

    def start(
        self,
        name: str,
        request: Message | bytes,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        timeout_s: float | None = TIMEOUT_S,
    ) -> Any:
        """The RPC under way: await it, cancel it, ask for its headers."""
        path, answer = METHODS[name]
        rpc = self.channel.unary_unary(path, response_deserializer=answer.FromString)
        message = request if isinstance(request, bytes) else request.SerializeToString()
        return rpc(message, metadata=tuple(metadata), timeout=timeout_s)

    async def call(self, name: str, request: Message | bytes, **how: Any) -> Any:
        """The answer.

        Raises:
            grpc.aio.AioRpcError
        """
        return await self.start(name, request, **how)

    async def call_for_headers(self, name: str, request: Message | bytes, **how: Any) -> tuple[Any, dict[str, str]]:
        """The answer and the response headers."""
        call = self.start(name, request, **how)
        answer = await call
        return answer, {key: str(value) for key, value in await call.initial_metadata()}

    async def refusal(self, name: str, request: Message | bytes, **how: Any) -> tuple[str, str]:
        """The status' name and message of a call that must not succeed."""
        try:
            answer = await self.call(name, request, **how)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or ""
        raise AssertionError(f"{name} was answered: {answer}")
