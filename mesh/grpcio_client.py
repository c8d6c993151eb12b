"""Calls to other pods over grpcio, messages as raw bytes: one channel per peer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from mesh.errors import MeshError, PodUnavailable, answer_of
from mesh.rpc import Metadata
from mesh.tls import Tls

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a minute by default, whatever keepalive_timeout_ms says: a hung pod's toll
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    (
        "grpc.min_reconnect_backoff_ms",
        5_000,
    ),  # for one attempt, TLS handshake and SETTINGS included, in spite of its name
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(slots=True)
class _Peer:
    """One channel and the calls on it. Closing a channel cancels its calls, so that waits for the last of them."""

    channel: grpc.aio.Channel
    pems: object = None
    """The certificates it was opened with."""
    calls: int = 0
    forgotten: bool = False


class GrpcioClient:
    """Implements `mesh.rpc.Client`."""

    def __init__(self, *, tls: Tls | None = None) -> None:
        """`tls`: for all that is no Unix socket."""
        self._tls = tls
        self._peers: dict[str, _Peer] = {}

    async def call(
        self, address: str, method: str, message: bytes, metadata: Metadata, deadline: float
    ) -> tuple[bytes, Mapping[str, str]]:
        if not address:  # which grpcio would call an UNKNOWN error of the call
            raise PodUnavailable("the pod has no address")
        peer = self._peers.get(address)
        if peer is not None and self._tls is not None and peer.pems is not self._tls.pems:
            await self.forget(address)
            peer = None
        if peer is None:
            peer = self._peers[address] = self._open(address)
        timeout_s = max(0.001, deadline - asyncio.get_running_loop().time())
        peer.calls += 1
        try:
            call = peer.channel.unary_unary(method)(message, timeout=timeout_s, metadata=tuple(metadata))
            response: bytes = await call
            headers = {key: value for key, value in await call.initial_metadata() if isinstance(value, str)}
        except grpc.aio.AioRpcError as error:
            raise _as_mesh_error(error, address) from None
        finally:
            peer.calls -= 1
            if peer.forgotten and not peer.calls:
                await peer.channel.close()
        return response, headers

    def _open(self, address: str) -> _Peer:
        if self._tls is None or address.startswith("unix:"):
            return _Peer(grpc.aio.insecure_channel(address, options=_OPTIONS))
        pems, name = self._tls.pems, self._tls.files.name
        credentials = grpc.ssl_channel_credentials(*(pems[field] or None for field in ("ca", "key", "cert")))
        options = [*_OPTIONS, ("grpc.ssl_target_name_override", name)] if name else _OPTIONS
        return _Peer(grpc.aio.secure_channel(address, credentials, options=options), pems)

    def ready(self, address: str) -> None:
        """grpcio's server sends nothing on by itself."""

    async def forget(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.forgotten = True
            if not peer.calls:
                await peer.channel.close()

    async def close(self) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.channel.close()


def _as_mesh_error(error: grpc.aio.AioRpcError, address: str) -> MeshError:
    """The peer's answer as an error of ours."""
    trailers = dict(error.trailing_metadata() or ())
    pushback = trailers.get("grpc-retry-pushback-ms")
    return answer_of(
        error.code().value[0],
        str(trailers.get("densemesh-reason", "")),
        error.details() or "",
        address=address,
        retry_after_ms=int(pushback) if isinstance(pushback, str) and pushback.isdigit() else None,
    )
