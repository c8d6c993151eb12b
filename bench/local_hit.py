"""What does the mesh add to a request that the asked pod can answer itself?

An identity and a small ONNX network on the pod that is asked, against a bare grpc.aio server that gives the same bytes
back: the ratio is what peeking, routing, pinning, decoding, the model and encoding cost on top of gRPC itself.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from bench.jobs import Job, JobError
from bench.load import run_load
from bench.rig import CONCURRENCY, INFER, Bench, Mesh, Variant, infer_message, main, write_mlp
from mesh.load_generator import Load

TITLE = "local hit, against a bare grpc.aio echo server"

MODELS: Final = ("identity", "onnx-mlp")


async def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        path = Path(directory) / "model.onnx"
        write_mlp(path, 128)
        async with Job("bench.echo") as echo, Mesh(1) as mesh:
            told = await echo.line()
            if told is None:
                raise JobError("the echo server has ended")
            await mesh.register("identity", "synthetic", "synthetic", load=True)
            await mesh.register("onnx-mlp", "onnx", str(path), load=True)
            address = f"127.0.0.1:{told['port']}"
            pod, message = mesh.pods[0], infer_message

            for shape in CONCURRENCY:
                load, seconds = "x".join(map(str, shape)), bench.seconds
                bare = Load(address, INFER, [message("identity")], *shape, seconds=seconds, server_pids=[echo.pid])
                own = [partial(mesh.load, pod, [message(name)], shape, seconds=seconds) for name in MODELS]
                await bench.compare(
                    Variant("bare echo", load, partial(run_load, bare)),
                    *(Variant(name, load, run, than="bare echo") for name, run in zip(MODELS, own, strict=True)),
                )


if __name__ == "__main__":
    sys.exit(main(TITLE, run, seconds=0.7))
