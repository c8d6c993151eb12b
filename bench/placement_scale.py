"""How does deciding grow with the mesh? `python -m bench.placement_scale [--models 1000,10000,...] [--plot FILE]`

One pod's engine with a view of so many registered models on so many pods, records decoded from their bytes as a pod
gets them. Every pod holds `HELD` copies. Measured on one core, the median of calls on different models:

- hit, forward, miss: `Engine.route` for a model that is loaded here, on another pod, nowhere
- step: `Engine.step` over whole lives of copies on a full pod: wanted, estimated, evicted, loaded, unloaded
- tick: `Engine.step(Tick())`, twice a second on every pod
- memory: what the view takes per registered model, resident memory of the process before and after it was filled

Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Final

import psutil
from rich.console import Console

from placement.engine import Engine
from placement.limits import Limits
from placement.messages import (
    Action,
    CopyWanted,
    Event,
    Forward,
    Hop,
    LoadFinished,
    Refuse,
    Serve,
    SizeEstimated,
    StartUnload,
    Tick,
    UnloadFinished,
)
from placement.policies import POLICIES
from placement.records import (
    CopyRecord,
    CopyStatus,
    ModelRecord,
    PodRecord,
    Record,
    copy_key,
    decode,
    encode,
    model_key,
    pod_key,
)
from placement.view import ClusterView

HELD: Final = 64
SIZE_BYTES: Final = 1 << 20
ROUTES: Final = 20_000
LIVES: Final = 2_000
BATCH: Final = 50
"""Calls between two looks at the clock, which costs a fifth of a hit."""
START_MS: Final = 1_760_000_000_000
GOALS: Final = {"hit_us": 3.0, "forward_us": 3.0, "step_us": 50.0, "memory_bytes": 1024.0}

Figures = dict[str, float]


def model_id(number: int) -> str:
    return f"tenant-{number % 997:03}/model-{number:07}"


def model(number: int) -> ModelRecord:
    path = f"s3://models/tenant-{number % 997:03}/model-{number:07}/1/model.onnx"
    return ModelRecord(model_id(number), "onnx", path, last_used_ms=START_MS - number, created=number + 1)


def fill(view: ClusterView, records: Iterable[tuple[str, Record]]) -> None:
    """As a watch would: from bytes, one by one."""
    for number, (key, record) in enumerate(records, start=1):
        view.apply(decode(key, encode(record), revision=number, created=number))


def copies(models: int, pods: int, held: int) -> Iterator[tuple[str, Record]]:
    """Pod n holds `held` models from n * held on; the first pod's are its own to tell."""
    for pod in range(1, pods):
        for number in range(pod * held, (pod + 1) * held):
            record = CopyRecord(model_id(number % models), f"pod-{pod}", CopyStatus.LOADED, START_MS, SIZE_BYTES)
            yield copy_key(record.pod_id, record.model_id), record


def pod(number: int, held: int) -> tuple[str, Record]:
    pod_id, size_bytes = f"pod-{number}", held * SIZE_BYTES
    record = PodRecord(pod_id, f"{pod_id}:8033", size_bytes, size_bytes, START_MS - number * 1000, loaded=held)
    return pod_key(pod_id), record


def timed(calls: Iterable[Callable[[], object]]) -> float:
    """Median microseconds of a call, from batches."""
    found: list[float] = []
    batch: list[Callable[[], object]] = []
    for call in calls:
        batch.append(call)
        if len(batch) == BATCH:
            started = time.perf_counter()
            for each in batch:
                each()
            found.append((time.perf_counter() - started) / BATCH * 1e6)
            batch.clear()
    return median(found)


def live(engine: Engine, numbers: Iterable[int]) -> list[float]:
    """Microseconds of each step of copies that come and go on a full pod."""
    found: list[float] = []
    now_ms = START_MS

    def step(event: Event) -> list[Action]:
        started = time.perf_counter()
        actions = engine.step(event, now_ms)
        found.append((time.perf_counter() - started) * 1e6)
        return actions

    for number in numbers:
        now_ms += 10_000
        step(CopyWanted(model_id(number), now_ms))
        actions = step(SizeEstimated(model_id(number), SIZE_BYTES))
        for action in actions:
            if isinstance(action, StartUnload):
                step(UnloadFinished(action.model_id))
        step(LoadFinished(model_id(number), SIZE_BYTES))
    return found


def measure(models: int, pods: int, policy: str) -> Figures:
    """Figures of one size."""
    held = max(1, min(HELD, models // (4 * pods)))  # most models are loaded nowhere
    process, view = psutil.Process(), ClusterView()
    gc.collect()
    before = process.memory_info().rss
    fill(view, ((model_key(model_id(n)), model(n)) for n in range(models)))
    gc.collect()
    memory_bytes = (process.memory_info().rss - before) / models
    fill(view, (pod(n, held) for n in range(pods)))
    fill(view, copies(models, pods, held))
    gc.freeze()
    gc.disable()
    engine = Engine("pod-0", "pod-0:8033", Limits(held * SIZE_BYTES), view, POLICIES[policy], Random(1))
    live(engine, range(held))
    rng = Random(2)
    here = [model_id(rng.randrange(held)) for _ in range(ROUTES)]
    there = [model_id(rng.randrange(held, pods * held)) for _ in range(ROUTES)]
    nowhere = [model_id(rng.randrange(pods * held, models)) for _ in range(ROUTES // 20)]
    assert isinstance(engine.route(here[0], Hop.CLIENT, set(), START_MS), Serve)
    assert isinstance(engine.route(there[0], Hop.CLIENT, set(), START_MS), Forward)
    assert not isinstance(engine.route(nowhere[0], Hop.CLIENT, set(), START_MS), (Refuse, Serve))
    found: Figures = {"models": models, "pods": pods, "memory_bytes": memory_bytes}
    for name, names in (("hit", here), ("forward", there), ("miss", nowhere)):
        found[f"{name}_us"] = timed(partial(engine.route, m, Hop.CLIENT, frozenset(), START_MS) for m in names)
    steps = live(engine, range(pods * held, pods * held + min(LIVES, models - pods * held)))
    found["step_us"], found["step_p99_us"] = median(steps), sorted(steps)[len(steps) * 99 // 100]
    found["tick_us"] = timed([partial(engine.step, Tick(), START_MS)] * BATCH * 3)
    return found


def plot(rows: list[Figures], path: Path) -> None:
    """How times and memory grow, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    models = [row["models"] for row in rows]
    for name in ("hit", "forward", "miss", "step", "tick"):
        times.plot(models, [row[f"{name}_us"] for row in rows], marker="o", label=name)
    memory.plot(models, [row["memory_bytes"] for row in rows], marker="o", color="tab:gray")
    memory.axhline(GOALS["memory_bytes"], linestyle=":", color="tab:gray")
    times.set(xscale="log", yscale="log", xlabel="registered models", ylabel="microseconds, median", title="deciding")
    memory.set(xscale="log", ylim=0, xlabel="registered models", ylabel="bytes per model", title="a pod's view")
    times.legend(ncols=5, loc="center", bbox_to_anchor=(0.5, 0.36), frameon=False, columnspacing=1, handlelength=1)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1000,10000,100000,1000000", help="sizes, comma-separated")
    parser.add_argument("--pods", type=int, default=1_000, help="at most a quarter of the models")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="lru")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw them: a file ending in .svg or .png")
    asked = parser.parse_args()
    console, rows = Console(highlight=False, soft_wrap=True), []
    columns = ("hit_us", "forward_us", "miss_us", "step_us", "step_p99_us", "tick_us", "memory_bytes")
    console.print("| models x pods | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for models in map(int, asked.models.split(",")):
            with console.status(f"{models:,} models"):
                row = pool.apply(measure, (models, min(asked.pods, models // 4), asked.policy))
            rows.append(row)
            cells = (f"{row[c]:,.2f}" if row[c] < 10 else f"{row[c]:,.0f}" for c in columns)
            console.print(f"| {models:,} x {int(row['pods']):,} | " + " | ".join(cells) + " |")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if asked.plot:
        plot(rows, asked.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
