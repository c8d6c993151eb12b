"""What does it cost to ask a pod that does not hold the model?

The same request to the pod that holds the model and to the other one, which forwards it. CPU is that of both pods; the
asked pod alone, in parentheses, is the one that forwards and never decodes a tensor.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.rig import CONCURRENCY, Bench, Mesh, Variant, infer_message, main, write_mlp

TITLE = "forward to the pod that holds the model, against asking it directly"


async def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        path = Path(directory) / "model.onnx"
        write_mlp(path, 128)
        async with Mesh(2) as mesh:
            await mesh.register("identity", "synthetic", "synthetic", load=True)
            await mesh.register("onnx-mlp", "onnx", str(path), load=True)
            for shape in CONCURRENCY:
                variants: list[Variant] = []
                for model_id in ("identity", "onnx-mlp"):
                    holder = await mesh.holder(model_id)
                    other = next(pod for pod in mesh.pods if pod is not holder)
                    ask = partial(mesh.load, messages=[infer_message(model_id)], shape=shape, seconds=bench.seconds)
                    hit, load = f"{model_id}, hit", "x".join(map(str, shape))
                    variants.append(Variant(hit, load, partial(ask, holder)))
                    variants.append(Variant(f"{model_id}, forward", load, partial(ask, other), than=hit))
                await bench.compare(*variants)


if __name__ == "__main__":
    sys.exit(main(TITLE, run, seconds=0.5))
