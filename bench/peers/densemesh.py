"""Our own pods, with either front end."""

from __future__ import annotations

import sys

from bench.peers.base import IDENTITY, Peer, check
from bench.rig import Mesh
from mesh.load_generator import tree_cpu_s


class H2(Peer):
    """On `mesh.http2`."""

    name = "densemesh"
    frontend = "h2"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"densemesh, {self.frontend}"

    def command(self) -> list[str]:
        settings = {
            "models": str(self.repository),
            "host": "127.0.0.1",
            "grpc-port": str(self.port),
            "metrics-port": "0",
            "frontend": self.frontend,
            "log-level": "WARNING",
        }
        return [sys.executable, "-m", "mesh", "serve", *(f"--{key}={value}" for key, value in settings.items())]


class Grpcio(H2):
    """On grpcio, the reference."""

    name = "densemesh-grpcio"
    frontend = "grpcio"


class Hop(Peer):
    """The hop: of two pods the one that does not hold the model."""

    name = "densemesh-hop"
    models = (IDENTITY,)
    is_proxy = True

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return "densemesh, h2, forwarding"

    async def start(self) -> None:
        self._mesh = Mesh(2, log_level="WARNING")
        await self._mesh.__aenter__()
        await self._mesh.register(IDENTITY, "synthetic", "synthetic", load=True)
        holder = await self._mesh.holder(IDENTITY)
        (self._forwarder,) = (pod for pod in self._mesh.pods if pod is not holder)
        self.port = self._forwarder.grpc_port
        await check(self.address, IDENTITY)

    async def stop(self) -> None:
        await self._mesh.__aexit__(None, None, None)

    def cpu_s(self) -> float:
        assert self._forwarder.pid is not None
        return tree_cpu_s(self._forwarder.pid)
