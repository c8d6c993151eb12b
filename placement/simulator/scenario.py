"""Workloads: which models there are, and when who asks for which."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

Arrivals = Iterator[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class SimModel:
    """What the world knows of a model."""

    model_id: str
    size_bytes: int
    run_ms: float
    load_ms: float
    """From the store."""
    tenant: str = ""
    slo_ms: float = 100.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Models, and the requests for them: (ms since the start, index into `models`), in order of time."""

    name: str
    models: Sequence[SimModel]
    arrivals: Callable[[], Arrivals]


def zipf(
    models: Sequence[SimModel], requests_per_s: float, duration_ms: float, *, exponent: float = 0.9, seed: int = 0
) -> Workload:
    """Poisson arrivals; the model of rank r is asked for in proportion to 1 / r^exponent."""
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(len(models))))

    def arrivals() -> Arrivals:
        rng = Random(f"zipf {seed}")
        at_ms = 0.0
        while (at_ms := at_ms + rng.expovariate(requests_per_s / 1e3)) < duration_ms:
            yield at_ms, bisect(weights, rng.random() * weights[-1])

    return Workload(f"zipf-{exponent:g}", models, arrivals)
