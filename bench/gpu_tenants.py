"""Requests to many tenants' networks of one architecture, on a GPU: one by one, in CUDA graphs, and in one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from bench.gpu_rig import cuda, has_gpu, synchronize, where
from bench.gpu_scale import Figures, Scale


def cross_tenant(scale: Scale) -> Figures:
    """Requests per second of one row for each of many tenants' networks: one by one, in graphs, and batched."""
    return {
        name: _tenants(sizes, scale)
        for name, sizes in (("64-128-10", (64, 128, 10)), ("512-512-512-128", (512, 512, 512, 128)))
    }


def _tenants(sizes: tuple[int, ...], scale: Scale) -> Figures:
    count = scale.tenants
    layers = list(pairwise(sizes))
    drawn = torch.Generator(where()).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        made: torch.Tensor = torch.randn(shape, generator=drawn, device=where()) * shape[-2] ** -0.5
        return made

    weights = [normal(count, rows, columns) for rows, columns in layers]
    biases = [normal(count, 1, columns) for _, columns in layers]
    given = normal(count, 1, sizes[0])

    def one(tenant: int) -> torch.Tensor:
        row = given[tenant]
        for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            row = torch.addmm(bias[tenant], row, weight[tenant])
            row = row.relu() if n < len(layers) - 1 else row
        return row

    def batched() -> torch.Tensor:
        rows = given
        for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            rows = torch.baddbmm(bias, rows, weight)
            rows = rows.relu() if n < len(layers) - 1 else rows
        return rows

    with torch.inference_mode():
        ways: dict[str, Callable[[], Any]] = {"one_by_one": lambda: [one(n) for n in range(count)], "batched": batched}
        if has_gpu():
            graphs = [_graph(lambda n=n: one(n)) for n in range(count)]  # type: ignore[misc]
            ways["one_by_one_graphs"] = lambda: [graph.replay() for graph in graphs]
            ways["batched_graph"] = _graph(batched).replay
        told = {f"{name}_per_s": count / _run_s(way, scale) for name, way in ways.items()}
        alone = torch.stack([one(n) for n in range(count)])
        torch.testing.assert_close(batched(), alone, rtol=1e-3, atol=1e-4)
    best_alone = max(told.get("one_by_one_graphs_per_s", 0.0), told["one_by_one_per_s"])
    return told | {
        "batched_of_one_by_one": max(told["batched_per_s"], told.get("batched_graph_per_s", 0.0)) / best_alone
    }


def _run_s(way: Callable[[], Any], scale: Scale) -> float:
    took: list[float] = []
    until = time.perf_counter() + scale.seconds / 4
    while time.perf_counter() < until or len(took) < 10:
        synchronize()
        begun = time.perf_counter()
        way()
        synchronize()
        took.append(time.perf_counter() - begun)
    return median(took)


def _graph(run: Callable[[], Any]) -> Any:
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        run()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        run()
    return graph
