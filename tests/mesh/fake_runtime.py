"""A model server as ModelMesh's adapters make them, in a process of its own: the runtime SPI and V2 on one address,
over grpcio. Its models answer their one input times `scale`.

What it does wrong is told by the key's `parameters` of a model (`Model`), and by JSON lines on its standard input:
{"forget": "m"}, {"freeze": true} (no unload is answered any more).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
import numpy as np

from protos import inference_pb2 as v2
from protos import runtime_pb2 as spi

READY: Final = "ready"


@dataclass
class Model:
    """What a model's key says in `parameters`."""

    scale: float = 1.0
    load_s: float = 0.0
    infer_s: float = 0.0
    fail_load: str = ""
    """A status' name: the load ends with it."""
    fail_infer: str = ""
    size_bytes: int = 1000
    size_later: bool = False
    """The load does not tell the size."""
    max_concurrency: int = 0
    garbage: bool = False
    """It answers with bytes that are no message."""


@dataclass
class Settings:
    """The process's, as JSON on its command line."""

    address: str = ""
    log: str = ""
    """File in which each call is noted: its name and the model's id."""
    capacity_bytes: int = 1 << 20
    max_loading: int = 0
    load_timeout_ms: int = 0
    starting: int = 0
    """How often it says STARTING first."""
    predicts: bool = True
    quirk: str = "NOT_FOUND"
    """How it says that it has no such model: NOT_FOUND, or as Triton or MLServer do."""
    limits: bool = False
    methods: list[str] = field(default_factory=lambda: ["inference.GRPCInferenceService/ModelInfer"])
    metadata: bool = True


_UNKNOWN: Final = {
    "NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "no"),
    "triton": (grpc.StatusCode.UNAVAILABLE, "Request for unknown model: '{}' is not found"),
    "mlserver": (grpc.StatusCode.INVALID_ARGUMENT, "Model {} not found"),
}


class Server:
    """Both services."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, Model] = {}
        self.frozen = False
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    def note(self, *said: object) -> None:
        with Path(self.settings.log).open("a") as log:
            print(*said, file=log)

    async def runtime_status(self, request: Any, context: Any) -> Any:
        self.note("runtimeStatus", len(self.models))
        if self.settings.starting:
            self.settings.starting -= 1
            return spi.RuntimeStatusResponse(status=spi.RuntimeStatusResponse.STARTING)
        self.models.clear()
        answer = spi.RuntimeStatusResponse(
            status=spi.RuntimeStatusResponse.READY,
            capacityInBytes=self.settings.capacity_bytes,
            maxLoadingConcurrency=self.settings.max_loading,
            modelLoadingTimeoutMs=self.settings.load_timeout_ms,
            defaultModelSizeInBytes=500,
            runtimeVersion="1.2",
            limitModelConcurrency=self.settings.limits,
        )
        for name in self.settings.methods:
            answer.methodInfos[name].idInjectionPath.append(1)
        return answer

    async def load_model(self, request: Any, context: Any) -> Any:
        self.note("loadModel", request.modelId, request.modelType, request.modelPath, request.modelKey)
        model = Model(**json.loads(request.modelKey).get("parameters", {}))
        if model.fail_load:
            await context.abort(grpc.StatusCode[model.fail_load], f"no {request.modelId} today")
        self.models[request.modelId] = model  # also if it is cancelled: what adapters do wrong
        try:
            await asyncio.sleep(model.load_s)
        except asyncio.CancelledError:
            self.note("cancelled", request.modelId)
            raise
        size_bytes = 0 if model.size_later else model.size_bytes
        return spi.LoadModelResponse(sizeInBytes=size_bytes, maxConcurrency=model.max_concurrency)

    async def unload_model(self, request: Any, context: Any) -> Any:
        self.note("unloadModel", request.modelId)
        if self.frozen:
            await context.abort(grpc.StatusCode.INTERNAL, "cannot unload")
        self.models.pop(request.modelId, None)
        return spi.UnloadModelResponse()

    async def predict_model_size(self, request: Any, context: Any) -> Any:
        self.note("predictModelSize", request.modelId)
        if not self.settings.predicts:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        return spi.PredictModelSizeResponse(sizeInBytes=900)

    async def model_size(self, request: Any, context: Any) -> Any:
        return spi.ModelSizeResponse(sizeInBytes=self.models[request.modelId].size_bytes)

    async def server_live(self, request: Any, context: Any) -> Any:
        return v2.ServerLiveResponse(live=True)

    async def model_ready(self, request: Any, context: Any) -> Any:
        return v2.ModelReadyResponse(ready=request.name in self.models)

    async def model_metadata(self, request: Any, context: Any) -> Any:
        if not self.settings.metadata:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        answer = v2.ModelMetadataResponse(name=request.name, platform="fake")
        answer.inputs.add(name="INPUT0", datatype="FP32", shape=[-1, -1])
        answer.outputs.add(name="OUTPUT0", datatype="FP32", shape=[-1, -1])
        return answer

    async def model_infer(self, request: Any, context: Any) -> Any:
        model = self.models.get(request.model_name)
        if model is None:
            code, said = _UNKNOWN[self.settings.quirk]
            await context.abort(code, said.format(request.model_name))
            raise AssertionError("abort raises")
        if model.fail_infer:
            await context.abort(grpc.StatusCode[model.fail_infer], "the server's own words: not found")
        if model.garbage:
            return b"\x0a\x7fshort"
        self.running[request.model_name] += 1
        self.most[request.model_name] = max(self.most[request.model_name], self.running[request.model_name])
        try:
            await asyncio.sleep(model.infer_s)
        except asyncio.CancelledError:
            self.note("infer cancelled", request.model_name)
            raise
        finally:
            self.running[request.model_name] -= 1
        x = np.frombuffer(request.raw_input_contents[0], "<f4")
        answer = v2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        answer.outputs.add(name="OUTPUT0", datatype="FP32", shape=request.inputs[0].shape)
        answer.raw_output_contents.append(np.multiply(x, model.scale, dtype=np.float32).tobytes())
        answer.parameters["most"].int64_param = self.most[request.model_name]
        return answer


_METHODS: Final = {
    "mmesh.ModelRuntime": (
        spi,
        {
            "runtimeStatus": ("RuntimeStatusRequest", Server.runtime_status),
            "loadModel": ("LoadModelRequest", Server.load_model),
            "unloadModel": ("UnloadModelRequest", Server.unload_model),
            "predictModelSize": ("PredictModelSizeRequest", Server.predict_model_size),
            "modelSize": ("ModelSizeRequest", Server.model_size),
        },
    ),
    "inference.GRPCInferenceService": (
        v2,
        {
            "ServerLive": ("ServerLiveRequest", Server.server_live),
            "ModelReady": ("ModelReadyRequest", Server.model_ready),
            "ModelMetadata": ("ModelMetadataRequest", Server.model_metadata),
            "ModelInfer": ("ModelInferRequest", Server.model_infer),
        },
    ),
}


async def serve(settings: Settings) -> None:
    """Until standard input ends."""
    loop, server = asyncio.get_running_loop(), Server(settings)
    listener = grpc.aio.server()
    for service, (module, methods) in _METHODS.items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                handler.__get__(server),
                request_deserializer=getattr(module, request).FromString,
                response_serializer=lambda answer: answer if isinstance(answer, bytes) else answer.SerializeToString(),
            )
            for name, (request, handler) in methods.items()
        }
        listener.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    listener.add_insecure_port(settings.address)
    await listener.start()
    ended = asyncio.Event()

    def listen() -> None:
        for line in sys.stdin:
            told = json.loads(line)
            server.models.pop(told.get("forget", ""), None)
            server.frozen = told.get("freeze", server.frozen)
            print("done", flush=True)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    print(READY, flush=True)
    await ended.wait()
    await listener.stop(0)


class FakeRuntime:
    """The process, for a test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.address = f"unix:{folder}/runtime.sock"
        self._log = folder / "calls"
        self._log.touch()
        self._settings = {"address": self.address, "log": str(self._log), **settings}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def calls(self) -> list[str]:
        """What it was asked, in order: `loadModel m ...`."""
        return self._log.read_text().splitlines()

    def count(self, call: str) -> int:
        return sum(line.startswith(call) for line in self.calls)

    def start(self, **settings: Any) -> None:
        """Return when it listens."""
        self._settings |= settings
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mesh.fake_runtime", json.dumps(self._settings)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == READY

    def tell(self, **what: Any) -> None:
        """Have it misbehave from now on."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline().strip() == "done"

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self._process = None
        Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)


if __name__ == "__main__":
    asyncio.run(serve(Settings(**json.loads(sys.argv[1]))))
