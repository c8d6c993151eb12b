"""The grpcio (asyncio) front end of `mesh.rpc`: the reference, and the fallback where throughput does not matter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio

from mesh import uds
from mesh.errors import DeadlineExceeded, InternalError, MeshError, shown
from mesh.rpc import Call, Handlers, Stream, Unary
from mesh.tls import Tls

log = logging.getLogger(__name__)

_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class GrpcioServer:
    """Serves `Handlers` on one or more addresses: `listen`, `start`, `stop`."""

    def __init__(self, *, max_message_bytes: int, default_timeout_s: float, tls: Tls | None = None) -> None:
        """`tls`: for all that is no Unix socket."""
        self._tls = tls
        self._default_timeout_s = default_timeout_s
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ]
        )

    def listen(self, address: str) -> int:
        """Bind to `host:port` or `unix:path`; the port that was given.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            if address.startswith("unix:"):
                self._server.add_insecure_port(f"unix:{uds.free(address)}")
                return 0
            if self._tls is not None:
                return int(self._server.add_secure_port(address, _credentials(self._tls)))
            return int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise OSError(str(error).partition(";")[0]) from None  # what follows is grpcio's advice to its own users

    async def start(self, handlers: Handlers) -> None:
        """Begin to take calls."""
        methods = {
            **{path: self._unary(path, handler) for path, handler in handlers.unary.items()},
            **{path: self._stream(path, handler) for path, handler in handlers.streams.items()},
        }
        self._server.add_generic_rpc_handlers((_ByPath(methods),))
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end within `grace_s`, then cancel them. Safe to repeat."""
        await self._server.stop(grace_s)

    def _unary(self, path: str, handler: Unary) -> grpc.RpcMethodHandler:
        async def serve(message: bytes, context: Any) -> bytes:
            call = self._call(path, context)
            try:
                async with asyncio.timeout_at(call.deadline):
                    response = await handler(call, message)
            except TimeoutError:
                await _abort(context, DeadlineExceeded("the deadline passed before the request was served"), call)
            except MeshError as error:
                await _abort(context, error, call)
            except Exception:
                log.exception("%s broke", path)
                await _abort(context, InternalError(), call)
            if call.reply_metadata:
                await context.send_initial_metadata(tuple(call.reply_metadata.items()))
            return response

        return grpc.unary_unary_rpc_method_handler(serve)

    def _stream(self, path: str, handler: Stream) -> grpc.RpcMethodHandler:
        async def serve(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            call = self._call(path, context)
            try:
                async for response in handler(call, messages):
                    yield response
            except MeshError as error:
                await _abort(context, error, call)
            except Exception:
                log.exception("%s broke", path)
                await _abort(context, InternalError(), call)

        return grpc.stream_stream_rpc_method_handler(serve)

    def _call(self, path: str, context: Any) -> Call:
        remaining_s = context.time_remaining()
        timeout_s = self._default_timeout_s if remaining_s is None else remaining_s
        metadata = [(key, value) for key, value in context.invocation_metadata()]
        deadline = asyncio.get_running_loop().time() + timeout_s
        return Call(path, metadata, deadline, keys=frozenset([key for key, _ in metadata]))


class _ByPath(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Looks handlers up by path; messages stay bytes. An unknown path is UNIMPLEMENTED (gRPC over HTTP/2)."""

    def __init__(self, methods: dict[str, grpc.RpcMethodHandler]) -> None:
        self._methods = methods

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        return self._methods.get(details.method)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    """grpcio asks before each handshake whether there are others."""

    def current() -> Any:
        pems = tls.pems
        return grpc.ssl_server_certificate_configuration([(pems["key"], pems["cert"])], pems["client_ca"] or None)

    return grpc.dynamic_ssl_server_credentials(current(), current, bool(tls.files.client_ca))


async def _abort(context: Any, error: MeshError, call: Call) -> NoReturn:
    """End the RPC with the error's status; raises inside grpcio, so it never returns."""
    trailers = []
    if error.reason:
        trailers.append(("densemesh-reason", error.reason))
    if error.retry_after_ms is not None:
        trailers.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    if call.reply_metadata:
        await context.send_initial_metadata(tuple(call.reply_metadata.items()))
    await context.abort(_STATUS[error.code], shown(str(error)), tuple(trailers))
    raise AssertionError("abort returned")
