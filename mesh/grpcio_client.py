"""Calls to other pods over grpcio, messages as raw bytes: one channel per peer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
import grpc.aio

from mesh.errors import BY_CODE, BY_REASON, Code, MeshError, PodUnavailable
from mesh.rpc import Metadata

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class GrpcioClient:
    """Implements `mesh.rpc.Client`."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(
        self, address: str, method: str, message: bytes, metadata: Metadata, deadline: float
    ) -> tuple[bytes, Mapping[str, str]]:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=_OPTIONS)
        timeout_s = max(0.001, deadline - asyncio.get_running_loop().time())
        call = channel.unary_unary(method)(message, timeout=timeout_s, metadata=tuple(metadata))
        try:
            response: bytes = await call
        except grpc.aio.AioRpcError as error:
            raise _as_mesh_error(error, address) from None
        headers = {key: value for key, value in await call.initial_metadata() if isinstance(value, str)}
        return response, headers

    async def forget(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for address in list(self._channels):
            await self.forget(address)


def _as_mesh_error(error: grpc.aio.AioRpcError, address: str) -> MeshError:
    """The peer's answer as an error of ours; a peer that is not there has no `densemesh-reason`."""
    trailers = dict(error.trailing_metadata() or ())
    code = Code(error.code().value[0])
    kind = BY_REASON.get(str(trailers.get("densemesh-reason", ""))) or BY_CODE.get(code, MeshError)
    if kind is PodUnavailable:
        return PodUnavailable(f"{address}: {error.details()}")
    raised = kind(error.details() or code.name)
    pushback = trailers.get("grpc-retry-pushback-ms")
    if isinstance(pushback, str) and pushback.isdigit():
        raised.retry_after_ms = int(pushback)
    return raised
