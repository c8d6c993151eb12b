"""Workloads: which models there are, and when who asks for which."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random


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
    """Models and the requests for them: Poisson arrivals, popularity by Zipf's law."""

    name: str
    models: Sequence[SimModel]
    requests_per_s: float
    duration_ms: float
    zipf: float = 0.9
    seed: int = 0

    def arrivals(self) -> Iterator[tuple[float, int]]:
        """(ms since the start, index into `models`), in order of time."""
        rng = Random(f"arrivals {self.seed}")
        weights = list(accumulate((rank + 1) ** -self.zipf for rank in range(len(self.models))))
        at_ms, total, draw, gap = 0.0, weights[-1], rng.random, self.requests_per_s / 1e3
        while (at_ms := at_ms + rng.expovariate(gap)) < self.duration_ms:
            yield at_ms, bisect(weights, draw() * total)


def zipf(
    models: int,
    requests_per_s: float,
    duration_ms: float,
    *,
    seed: int = 0,
    size_bytes: tuple[int, int],
    exponent: float = 0.9,
) -> Workload:
    """Models of sizes drawn between two bounds; loads take 100 ms and 1 ms per 500 kB."""
    rng = Random(f"models {seed}")
    sizes = [rng.randint(*size_bytes) for _ in range(models)]
    return Workload(
        "zipf",
        [SimModel(f"m{i}", size, rng.choice([0.5, 2.0, 8.0]), 100 + size / 500e3) for i, size in enumerate(sizes)],
        requests_per_s,
        duration_ms,
        exponent,
        seed,
    )
