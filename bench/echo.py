"""A comparator: a bare grpc.aio generic server that gives every message back, as a job; `bench.echo [PORT]`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import grpc.aio

from bench.jobs import tell


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Any unary method; messages stay bytes, as in a pod's front end."""

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(_echo)


async def _echo(message: bytes, context: Any) -> bytes:
    return message


async def _serve(port: str) -> None:
    server = grpc.aio.server(handlers=(_Echo(),))
    tell({"port": server.add_insecure_port(f"127.0.0.1:{port}")})
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    sys.exit(asyncio.run(_serve(*sys.argv[1:] or ["0"])))
