"""What does it cost a Python model to live in a process of its own? `python -m bench.isolated`

The comparator is the same function called in this process. `of its own` is memory that ends with a model's process,
`in all` counts what the processes share once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from rich.console import Console

from loaders import loader_for
from loaders.base import Artifact, Tensor

_MODEL: Final = "def predict(inputs):\n    return {'y': inputs['x'] * 2}\n"
_ROUNDS: Final = 3


def median_us(call: Callable[[], object], seconds: float) -> float:
    """Of one call."""
    took: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0, help="measured time per figure and round")
    asked = parser.parse_args()
    lines = ["| | |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(_MODEL)
        loader, artifact = loader_for("python"), Artifact(Path(folder))
        began = time.perf_counter()
        models = [loader.load(artifact)]
        lines.append(f"| load, the first of a pod | {(time.perf_counter() - began) * 1e3:.0f} ms |")
        began = time.perf_counter()
        models += [loader.load(artifact) for _ in range(asked.models - 1)]
        lines.append(f"| load, the others | {(time.perf_counter() - began) / len(models) * 1e3:.1f} ms |")
        for name, size in (("4 floats", 4), ("1 MB", 1 << 18)):
            x: Tensor = np.ones((1, size), np.float32)
            there, here = [], []
            for _ in range(_ROUNDS):
                there.append(median_us(lambda x=x: models[0].infer({"x": x}, ()), asked.seconds))  # type: ignore[misc]
                here.append(median_us(lambda x=x: {"y": x * 2}, asked.seconds))  # type: ignore[misc]
            more_us = statistics.median(there) - statistics.median(here)
            lines.append(f"| a run on {name} | {statistics.median(there):.0f} us, {more_us:.0f} more than in line |")
        own = statistics.median(model.size_bytes for model in models)
        processes = psutil.Process().children(recursive=True)
        shared = sum(process.memory_full_info().pss for process in processes) / len(models)
        lines.append(
            f"| memory of each of {len(models)} | {own / 1e6:.1f} MB of its own, {shared / 1e6:.1f} MB in all |"
        )
        for model in models:
            model.unload()
    Console().print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
