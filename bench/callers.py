"""Real clients as load generators, each in a process of its own: jobs of `bench.clients`.

`python -m bench.callers KIND PLAN` keeps connections x streams calls under way for some seconds. Every call has a model
of its own, in the message and in ModelMesh's header, a trace id that was never used, and a deadline. It tells when it
has warmed up, and in the end how many calls were answered since.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bench.jobs import tell

WARM_UP_S: Final = 0.5
_OPTIONS: Final = [("grpc.use_local_subchannel_pool", 1)]


class Plan:
    """What to call, and how many calls were answered."""

    def __init__(self, path: Path) -> None:
        said = json.loads(path.read_text())
        self.address: str = said["address"]
        self.method: str = said["method"]
        self.connections: int = said["connections"]
        self.streams: int = said["streams"]
        self.seconds: float = said["seconds"]
        self.messages = [(model_id, b64decode(message)) for model_id, message in said["messages"]]
        self.answered = self.failed = 0
        self.running = True
        self._numbers = itertools.count(1)
        self._rng = np.random.default_rng(7)

    def calls(self) -> Iterator[tuple[str, bytes, list[tuple[str, str]], float]]:
        """Model, message, metadata and deadline in seconds of one call after the other, while the time lasts."""
        while self.running:
            number = next(self._numbers)
            model_id, message = self.messages[number * 7919 % len(self.messages)]
            trace = f"00-{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}-{number:016x}-01"
            yield model_id, message, [("mm-model-id", model_id), ("traceparent", trace)], 10.0 + number % 20_000 / 1e3

    async def measure(self) -> None:
        """Wait for the plan's time, and tell."""
        await asyncio.sleep(WARM_UP_S)
        answered, failed = self.answered, self.failed
        tell({"begun": True})
        await asyncio.sleep(self.seconds)
        tell({"answered": self.answered - answered, "failed": self.failed - failed})
        self.running = False


async def aio(plan: Plan) -> None:
    async def stream(channel: Any) -> None:
        rpc = channel.unary_unary(plan.method)
        for _, message, metadata, timeout_s in plan.calls():
            try:
                await rpc(message, metadata=metadata, timeout=timeout_s)
                plan.answered += 1
            except grpc.aio.AioRpcError:
                plan.failed += 1

    channels = [grpc.aio.insecure_channel(plan.address, options=_OPTIONS) for _ in range(plan.connections)]
    streams = [stream(channel) for channel in channels for _ in range(plan.streams)]
    await asyncio.gather(plan.measure(), *streams)
    for channel in channels:
        await channel.close()


async def threads(plan: Plan, make: Callable[[Plan], Callable[..., object]], errors: type[Exception]) -> None:
    """`make` opens a connection and gives the call."""

    def stream(call: Callable[..., object]) -> None:
        for arguments in plan.calls():
            try:
                call(*arguments)
                plan.answered += 1
            except errors:
                plan.failed += 1

    calls = [make(plan) for _ in range(plan.connections)]
    workers = [threading.Thread(target=stream, args=(call,)) for call in calls for _ in range(plan.streams)]
    for worker in workers:
        worker.start()
    await plan.measure()
    for worker in workers:
        worker.join()


def grpcio_call(plan: Plan) -> Callable[..., object]:
    rpc = grpc.insecure_channel(plan.address, options=_OPTIONS).unary_unary(plan.method)

    def call(model_id: str, message: bytes, metadata: list[tuple[str, str]], timeout_s: float) -> object:
        return rpc(message, metadata=metadata, timeout=timeout_s)

    return call


def triton_call(plan: Plan) -> Callable[..., object]:
    client = triton.InferenceServerClient(plan.address, channel_args=_OPTIONS)
    row = np.zeros((1, 64), np.float32)

    def call(model_id: str, message: bytes, metadata: list[tuple[str, str]], timeout_s: float) -> object:
        given = triton.InferInput("INPUT0", row.shape, "FP32")
        given.set_data_from_numpy(row)
        return client.infer(model_id, [given], headers=dict(metadata), client_timeout=timeout_s)

    return call


def main() -> int:
    kind, plan = sys.argv[1], Plan(Path(sys.argv[2]))
    if kind == "grpc.aio":
        asyncio.run(aio(plan))
    elif kind == "grpcio":
        asyncio.run(threads(plan, grpcio_call, grpc.RpcError))
    else:
        asyncio.run(threads(plan, triton_call, InferenceServerException))
    return 0


if __name__ == "__main__":
    sys.exit(main())
