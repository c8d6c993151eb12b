"""gRPC's own servers at their leanest: any message comes back as it is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc

from bench.jobs import ROOT
from bench.peers.base import IDENTITY, Peer, PeerError

_SOURCE: Final = Path(__file__).with_name("inside") / "grpc_echo.cc"


class GrpcCpp(Peer):
    """gRPC C++ on one completion queue, compiled by the bench."""

    name = "grpcio-cpp"
    models = (IDENTITY,)
    is_echo = True

    def missing(self) -> str | None:
        known = shutil.which("g++") and shutil.which("pkg-config")
        if known and not subprocess.run(["pkg-config", "--exists", "grpc++"], check=False).returncode:
            return None
        return "apt-get install g++ pkg-config libgrpc++-dev"

    def version(self) -> str:
        said = subprocess.run(["pkg-config", "--modversion", "grpc++"], capture_output=True, text=True, check=True)
        return f"gRPC C++ {said.stdout.strip()}, completion queue, echo"

    def command(self) -> list[str]:
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "grpc++"], capture_output=True, text=True, check=True
        )
        program = self.scratch / "grpc_echo"
        compiler = ["g++", "-O2", "-std=c++17", "-o", str(program), str(_SOURCE), *shlex.split(flags.stdout)]
        compiled = subprocess.run(compiler, capture_output=True, text=True, check=False)
        if compiled.returncode:
            raise PeerError(f"{_SOURCE.name} does not compile:\n{compiled.stderr[-2000:]}")
        return [str(program), str(self.port)]


class GrpcAio(Peer):
    """grpc.aio with a generic handler: bytes in, bytes out."""

    name = "grpc-aio"
    models = (IDENTITY,)
    is_echo = True

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"grpc.aio {grpc.__version__}, echo"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.echo", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(ROOT)}
