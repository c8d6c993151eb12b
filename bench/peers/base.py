"""What a comparator of `bench.dataplane` is: a server, or a proxy before one of ours, started and stopped by the bench.

Peers live in system packages or in virtual environments of their own, `HOME/<peer>`, never in ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

import grpc
import grpc.aio
import numpy as np

from mesh.child import free_ports, spawn
from mesh.inference import SERVICE
from mesh.load_generator import tree_cpu_s
from protos import inference_pb2 as pb

INFER: Final = SERVICE + "ModelInfer"
IDENTITY, MLP = "model", "mlp"
"""The models of every peer: one that gives its input back, and `rig.write_mlp`'s."""
START_S: Final = 90.0
STOP_S: Final = 10.0


class PeerError(Exception):
    """A peer does not start, or answers wrongly; carries its last words."""


class Peer:
    """One server process, with its descendants."""

    name: ClassVar[str]
    models: ClassVar[Sequence[str]] = (IDENTITY, MLP)
    is_echo: ClassVar[bool] = False
    """Gives the request's bytes back, instead of a ModelInferResponse."""
    is_proxy: ClassVar[bool] = False
    """Forwards to `upstream`, a pod of ours."""

    def __init__(self, home: Path, scratch: Path, repository: Path) -> None:
        """`repository`: the models as our pods take them, with the MLP at `mlp/model.onnx`."""
        self.home = home / self.name
        self.scratch = scratch / self.name
        self.repository = repository
        self.upstream = ""
        self.port, self._spare_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    # What a peer says of itself

    def missing(self) -> str | None:
        """How to install it, in one line; None: it is there."""
        raise NotImplementedError

    def version(self) -> str:
        """For the table."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """Starts it on 127.0.0.1 and `port`; files it needs are written to `scratch` before."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {}

    # Its life

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Return when it answers rightly.

        Raises:
            PeerError
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = spawn(self.command(), output=log, environment={**os.environ, **self.environment()})
        try:
            async with asyncio.timeout(START_S):
                for model in self.models:
                    while not await self._answers(model):
                        if self._process.poll() is not None:
                            raise PeerError(f"{self.name} has ended; its log ends with:\n{self._last_words()}")
                        await asyncio.sleep(0.2)
        except TimeoutError:
            raise PeerError(f"{self.name} does not answer after {START_S:.0f} s:\n{self._last_words()}") from None

    async def stop(self) -> None:
        """Safe to repeat."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                await asyncio.to_thread(self._process.wait, STOP_S)
        self._process = None

    def cpu_s(self) -> float:
        """CPU time of its processes so far."""
        assert self._process is not None
        return tree_cpu_s(self._process.pid)

    async def _answers(self, model: str) -> bool:
        try:
            await check(self.address, model, is_echo=self.is_echo)
        except grpc.aio.AioRpcError:
            return False
        return True

    @property
    def _log(self) -> Path:
        return self.scratch / "log"

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


class VenvPeer(Peer):
    """A Python package in a virtual environment of its own."""

    title: ClassVar[str]
    packages: ClassVar[Sequence[str]]
    """As pip takes them; the first one is what is measured, with its version."""

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def missing(self) -> str | None:
        if self.python.exists():
            return None
        return f"python -m venv {self.home} && {self.python} -m pip install {' '.join(self.packages)}"

    def version(self) -> str:
        return f"{self.title} {self.packages[0].partition('==')[2]}"


def message(model: str, floats: int = 64) -> bytes:
    """A ModelInfer request with one row of so many FP32."""
    row = np.arange(floats, dtype="<f4") / np.float32(floats)
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[row.tobytes()])
    request.inputs.add(name="input" if model == MLP else "INPUT0", datatype="FP32", shape=[1, floats])
    encoded: bytes = request.SerializeToString()
    return encoded


async def check(address: str, model: str, floats: int = 64, *, is_echo: bool = False) -> int:
    """Ask with grpcio's own client, compare, and tell the answer's size in bytes.

    Raises:
        PeerError: the answer is wrong.
        grpc.aio.AioRpcError
    """
    asked = message(model, floats)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        answer: bytes = await channel.unary_unary(INFER)(asked, timeout=10)
    if is_echo:
        right = answer == asked
    else:
        said = pb.ModelInferResponse.FromString(answer)
        (raw,) = said.raw_output_contents or [b""]
        if model == IDENTITY:
            right = [raw] == pb.ModelInferRequest.FromString(asked).raw_input_contents
        else:  # probabilities of ten classes
            right = len(raw) == 40 and abs(float(np.frombuffer(raw, "<f4").sum()) - 1) < 1e-4
    if not right:
        raise PeerError(f"{address} answers {model!r} wrongly: {answer[:200]!r}")
    return len(answer)
