"""The measurements of `bench.gpu_campaign`, one function each, on rigs of their own: none disturbs another."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any, Final

import torch

from bench.fleets import Told
from bench.gpu_rig import (
    BareCopy,
    FromSeed,
    Rig,
    cuda,
    encode,
    finish,
    fleet,
    free_bytes,
    has_gpu,
    nvidia_smi,
    runner,
    synchronize,
    used_bytes,
    where,
)
from bench.gpu_scale import FULL, Figures, Scale
from bench.gpu_tenants import cross_tenant
from loaders.memory.device import Move
from loaders.memory.tier import NoRoom


def link(scale: Scale) -> Figures:
    """GB/s of pinned copies by size: up, down, both at once; and pageable memory for the largest."""
    largest = max(scale.link_bytes)
    begun = time.perf_counter()
    with Rig(2 * largest, 2 * largest) as rig:
        opened_s = time.perf_counter() - begun
        down = [Move(largest, 0, largest)]
        rig.device.down(down).wait()
        rows = {}
        for size_bytes in scale.link_bytes:
            up, down = [Move(0, 0, size_bytes)], [Move(largest, largest, size_bytes)]
            ways: dict[str, Callable[[], list[Any]]] = {
                "up": lambda up=up: [rig.device.up(up)],  # type: ignore[misc]
                "down": lambda down=down: [rig.device.down(down)],  # type: ignore[misc]
                "both": lambda up=up, down=down: [rig.device.up(up), rig.device.down(down)],  # type: ignore[misc]
            }
            rows[size_bytes] = {way: size_bytes / 1e9 / _each_s(start, scale) for way, start in ways.items()}
    pageable = BareCopy(largest, pinned=False)
    slow_s = median(pageable.seconds() for _ in range(5))
    opened = {"opened_s": opened_s, "opened_gb_per_s": 2 * largest / 1e9 / opened_s}
    return {"gb_per_s": rows, "pageable_gb_per_s": largest / 1e9 / slow_s, **opened}


def _each_s(start: Callable[[], list[Any]], scale: Scale) -> float:
    """Median seconds of one copy, of at least five."""
    took: list[float] = []
    until = time.perf_counter() + scale.seconds / 16
    while time.perf_counter() < until or len(took) < 5:
        begun = time.perf_counter()
        for copying in start():
            copying.wait()
        took.append(time.perf_counter() - begun)
    return median(took)


def swap(scale: Scale) -> Figures:
    """Swap-in and first output by size, against a bare pinned copy of the same bytes after each swap."""
    return {name: _swaps(architecture, scale) for name, architecture in scale.swapped}


def _swaps(architecture: list[Told], scale: Scale) -> Figures:
    models = fleet(architecture, 4)
    size_bytes = models[0].contents.layout.size_bytes
    tokens = torch.zeros(scale.tokens, dtype=torch.int64, device=where())
    bare = BareCopy(size_bytes)
    with Rig(2 * size_bytes, 4 * size_bytes) as rig, torch.inference_mode():
        store = rig.store
        for n, model in enumerate(models):
            store.fill(n, model)
        here = [0, 1]
        for n in here:
            store.promote(n)
        runs = architecture[0][0] == "embedding"
        warm_s = 0.0
        if runs:
            for n in here:  # graphs of both slots
                with store.using(n) as slot:
                    runner(slot, tokens)
            warm_s = median(_first_output_s(rig, n % 2, tokens) for n in range(20))
        swap_s, bare_s, output_s = list[float](), list[float](), list[float]()
        before = allocations()
        until = time.perf_counter() + scale.seconds
        rng = random.Random(1)
        while time.perf_counter() < until or len(swap_s) < 8:
            comes = rng.choice([n for n in range(4) if n not in here])
            goes = here.pop(rng.randrange(2))
            synchronize()
            begun = time.perf_counter()
            store.drop(goes, store.device)
            store.promote(comes)
            swap_s.append(time.perf_counter() - begun)
            if runs:
                output_s.append(swap_s[-1] + _first_output_s(rig, comes, tokens))
            here.append(comes)
            bare_s.append(bare.seconds())
        after = allocations()
        for n in here:
            _is_right(rig, n, models[n])
    told = {
        "bytes": size_bytes,
        "swaps": len(swap_s),
        "swap_ms": median(swap_s) * 1e3,
        "swap_p99_ms": sorted(swap_s)[int(len(swap_s) * 0.99)] * 1e3,
        "bare_ms": median(bare_s) * 1e3,
        "of_bare": median(bare_s) / median(swap_s),
        "gb_per_s": size_bytes / 1e9 / median(swap_s),
        "allocations": {name: after[name] - before[name] for name in after},
    }
    if output_s:
        told |= {"warm_ms": warm_s * 1e3, "first_output_ms": median(output_s) * 1e3}
        told["first_output_of_bare"] = median(bare_s) / (median(output_s) - warm_s)
    return told


def _first_output_s(rig: Rig, key: int, tokens: torch.Tensor) -> float:
    begun = time.perf_counter()
    with rig.store.using(key) as slot:
        runner(slot, tokens)()
        finish()
    return time.perf_counter() - begun


def allocations() -> dict[str, int]:
    """Of device memory so far: cudaMalloc and cudaFree by torch, and what it was asked for."""
    if not has_gpu():
        return {}
    stats = cuda.memory_stats()
    return {name: int(stats.get(name, 0)) for name in ("num_device_alloc", "num_device_free", "num_ooms")}


def _is_right(rig: Rig, key: int, model: FromSeed) -> None:
    """The bytes on the device are those that the seed gives."""
    with rig.store.using(key) as slot:
        expected = model.run()
        for place in slot.layout.places:
            found = slot.views[place.name].contiguous().view(torch.uint8).flatten()
            if not torch.equal(found, expected[place.offset : place.end]):
                raise RuntimeError(f"{place.name} of model {key} is not what was made")


def density(scale: Scale) -> Figures:
    """Device memory by the number of models, each run once: slope over the bytes of their weights; and how many fit."""
    models = fleet(scale.small_model, max(scale.density))
    size_bytes = models[0].contents.layout.size_bytes
    tokens = torch.zeros(scale.tokens, dtype=torch.int64, device=where())
    _used_with(models[:1], tokens)  # the framework's own, once
    points = [(count, _used_with(models[:count], tokens)) for count in scale.density]
    counts, used = [count for count, _ in points], [used for _, used in points]
    slope = sum((c - mean(counts)) * (u - mean(used)) for c, u in points) / sum((c - mean(counts)) ** 2 for c in counts)
    told = {"points": points, "weights_bytes": size_bytes, "slope_bytes": slope, "slope_of_weights": slope / size_bytes}
    return told | {"intercept_bytes": mean(used) - slope * mean(counts), **_filled(scale, size_bytes, tokens)}


def _used_with(models: list[FromSeed], tokens: torch.Tensor) -> int:
    size_bytes = sum(model.contents.layout.size_bytes for model in models)
    with Rig(size_bytes, 0) as rig, torch.inference_mode():
        for n, model in enumerate(models):
            rig.store.load(n, model)
            with rig.store.using(n) as slot:
                encode(slot.views, tokens)
        del slot
        synchronize()
        return used_bytes()


def _filled(scale: Scale, size_bytes: int, tokens: torch.Tensor) -> Figures:
    """One arena as large as the device allows, full of different models; some of them run and are compared."""
    arena_bytes = min(int(free_bytes() * 0.85), size_bytes * (100_000 if has_gpu() else 16))
    models = fleet(scale.small_model, arena_bytes // size_bytes)
    begun = time.perf_counter()
    loaded = 0
    with Rig(arena_bytes, size_bytes) as rig, torch.inference_mode():
        for n, model in enumerate(models):
            rig.store.load(n, model)
            loaded += 1
            if time.perf_counter() - begun > 8 * scale.seconds:
                break
        answers = set()
        for n in range(0, loaded, max(loaded // 16, 1)):
            _is_right(rig, n, models[n])
            with rig.store.using(n) as slot:
                answers.add(tuple(encode(slot.views, tokens).flatten()[:8].tolist()))
        tried = len(range(0, loaded, max(loaded // 16, 1)))
    return {
        "arena_bytes": arena_bytes,
        "models": loaded,
        "fitting": len(models),
        "different_answers": [len(answers), tried],
    }


def interference(scale: Scale) -> Figures:
    """Latency of a model that stays, alone and while swaps saturate the link."""
    models = fleet(scale.small_model, 5)
    size_bytes = models[0].contents.layout.size_bytes
    tokens = torch.zeros(scale.tokens, dtype=torch.int64, device=where())
    with Rig(3 * size_bytes, 5 * size_bytes) as rig, torch.inference_mode():
        store = rig.store
        for n, model in enumerate(models):
            store.fill(n, model)
        store.promote(0)
        with store.using(0) as slot:
            runner(slot, tokens)

        def runs() -> list[float]:
            took: list[float] = []
            until = time.perf_counter() + scale.seconds
            while time.perf_counter() < until or len(took) < 20:
                took.append(_first_output_s(rig, 0, tokens))
            return sorted(took)

        alone = runs()
        with _swapping(rig, [1, 2, 3, 4]) as moved:
            beside = runs()
    told = {
        f"{name}_p{q}_ms": took[int(len(took) * q / 100)] * 1e3 for name, took in _both(alone, beside) for q in (50, 99)
    }
    told["inflation_p99"] = told["beside_p99_ms"] / told["alone_p99_ms"]
    return told | {"swap_gb_per_s": moved[0] * size_bytes / 1e9 / moved[1], "runs": len(beside)}


def _both(alone: list[float], beside: list[float]) -> tuple[tuple[str, list[float]], ...]:
    return ("alone", alone), ("beside", beside)


@contextmanager
def _swapping(rig: Rig, keys: list[int]) -> Iterator[list[float]]:
    """Another thread swaps those models without pause; how many, and in how many seconds, when it has ended."""
    stopped, moved = threading.Event(), [0.0, 1.0]

    def swaps() -> None:
        begun = time.perf_counter()
        count, here = 0, list[int]()
        while not stopped.is_set():
            if len(here) == 2:
                rig.store.drop(here.pop(0), rig.store.device)
            key = next(key for key in keys[count % len(keys) :] + keys if key not in here)
            rig.store.promote(key)
            here.append(key)
            count += 1
        moved[:] = [count, time.perf_counter() - begun]

    thread = threading.Thread(target=swaps)
    thread.start()
    try:
        yield moved
    finally:
        stopped.set()
        thread.join()


def fragmentation(scale: Scale) -> Figures:
    """Random swaps of models of many sizes with real copies; what is free where a model that would fit is refused."""
    sizes = [
        each for _, architecture in scale.swapped[:3] for each in (architecture, architecture[: len(architecture) // 2])
    ]
    models = [model for told in sizes for model in fleet(told, 3)]
    bytes_of = [model.contents.layout.size_bytes for model in models]
    rng, lost, here, swaps = random.Random(1), list[int](), list[int](), 0
    with Rig(sum(bytes_of) // 2, sum(bytes_of)) as rig:
        store = rig.store
        for n, model in enumerate(models):
            store.fill(n, model)
        before, until = allocations(), time.perf_counter() + 2 * scale.seconds
        while swaps < 10_000 and (time.perf_counter() < until or swaps < 50):
            comes = rng.choice([n for n in range(len(models)) if n not in here])
            refused = 0
            while True:
                free = store.device.arena.free_bytes
                try:
                    store.promote(comes)
                    break
                except NoRoom:
                    refused = max(refused, free) if free >= bytes_of[comes] else refused
                store.drop(here.pop(0), store.device)
            here.append(comes)
            lost.append(refused)
            swaps += 1
        after, capacity = allocations(), store.device.arena.capacity_bytes
        for n in here:
            _is_right(rig, n, models[n])
        spans = [len(resident.spans) for resident in store.device.models.values()]
    percents = {"lost_percent": 100 * mean(lost) / capacity, "lost_max_percent": 100 * max(lost) / capacity}
    changed = {name: after[name] - before[name] for name in after}
    return {"swaps": swaps, **percents, "spans_max": max(spans), "allocations": changed}


def machine(scale: Scale) -> Figures:
    """What it is measured on."""
    told = nvidia_smi("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max")
    return {
        **told,
        "torch": torch.__version__,
        "device": where(),
        "full": scale is FULL,
        "idle_used_bytes": used_bytes(),
    }


STEPS: Final[dict[str, Callable[[Scale], Figures]]] = {
    "machine": machine,
    "link": link,
    "swap": swap,
    "density": density,
    "interference": interference,
    "fragmentation": fragmentation,
    "cross_tenant": cross_tenant,
}
