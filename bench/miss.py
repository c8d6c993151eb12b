"""How long does the first request to a model take, and how many models can be swapped in per second?

A cold request (registered, not loaded; one after the other) against ONNX Runtime by hand: make a session, run it once.
And a pod with memory for a few of the models only, with requests that go round more of them: every request evicts and
loads, which by hand is dropping the last session.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bench.jobs import JobError, result_of
from bench.rig import ROUNDS, Bench, Mesh, Variant, infer_message, main, write_mlp
from loaders import loader_for
from loaders.base import Artifact
from mesh.load_generator import Result

TITLE = "cold requests, against an ONNX Runtime session made and run by hand"
HIDDEN: Final = {"100 kB": 128, "1 MB": 480}
"""Width of the hidden layers, by what the model weighs on disk."""
MODELS: Final = 90
"""Cold requests per size, each to a model of its own; a multiple of the rounds."""
HELD: Final = 4
"""Models that fit while swapping ..."""
ROUND: Final = 12
"""... of so many that requests go round."""


async def run(bench: Bench) -> None:
    for size, hidden in HIDDEN.items():
        with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
            paths = [Path(directory) / f"{n}.onnx" for n in range(MODELS)]
            for n, path in enumerate(paths):
                write_mlp(path, hidden, seed=n)
            largest_bytes = max(loader_for("onnx").estimate_bytes(Artifact(path)) for path in paths)
            async with Mesh(1) as roomy, Mesh(1, capacity=str(HELD * largest_bytes)) as tight:
                await _register(roomy, paths)
                await _register(tight, paths[:ROUND])
                await _compare(bench, size, paths, roomy, tight)


async def _register(mesh: Mesh, paths: list[Path]) -> None:
    for n, path in enumerate(paths):
        await mesh.register(f"m-{n}", "onnx", str(path))
    await mesh.register("first", "onnx", str(paths[0]), load=True)  # imports ONNX Runtime


async def _compare(bench: Bench, size: str, paths: list[Path], roomy: Mesh, tight: Mesh) -> None:
    messages = [infer_message(f"m-{n}") for n in range(len(paths))]
    never_asked = iter(np.split(np.arange(len(paths)), ROUNDS))
    (roomy_pod,), (tight_pod,) = roomy.pods, tight.pods

    async def by_hand() -> Result:
        return Result(**await result_of("bench.by_hand", str(bench.seconds), *map(str, paths)))

    async def cold() -> Result:
        """One request to each of some models, none of which was ever loaded."""
        asked = [messages[n] for n in next(never_asked)]
        return await roomy.load(roomy_pod, asked, (1, 1), requests=len(asked))

    async def swap(connections: int) -> Result:
        """Requests go round more models than fit: the one asked for next is always the one evicted longest ago."""
        before = await tight.evictions()
        result = await tight.load(tight_pod, messages[:ROUND], (connections, 1), seconds=bench.seconds)
        evictions = await tight.evictions() - before
        if evictions < result.requests * 0.9:
            raise JobError(f"only {evictions} evictions for {result.requests} requests: this is no swapping")
        return result

    base = f"{size}, by hand"
    await bench.compare(
        Variant(base, "1x1", by_hand),
        Variant(f"{size}, cold request", "1x1", cold, than=base),
        Variant(f"{size}, evict and load", "1x1", partial(swap, 1), than=base),
        Variant(f"{size}, two evict and load", "2x1", partial(swap, 2), than=base),
    )


if __name__ == "__main__":
    sys.exit(main(TITLE, run, seconds=1.0))
