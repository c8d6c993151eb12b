"""Workloads: which models there are, and when who asks for which.

What is drawn comes from seeds alone; a workload may be gone through as often as one likes. Requests are told as
(ms since the start, index into the models), in order of time.
"""

from __future__ import annotations

import csv
import heapq
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import cos, exp, inf, log, pi
from random import Random
from typing import Any, Final

from placement.records import TenantRecord

Arrivals = Iterator[tuple[float, int]]

HOUR_MS: Final = 3_600_000.0


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
    placement: Mapping[str, Any] = field(default_factory=dict)
    """Further members of its record that say how it is to be placed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Models, and the requests for them."""

    name: str
    models: Sequence[SimModel]
    arrivals: Callable[[], Arrivals]
    grants: Sequence[TenantRecord] = ()

    @property
    def size_bytes(self) -> int:
        """Of all models."""
        return sum(model.size_bytes for model in self.models)


# Models

SIZES: Final = ((0.0, 100e3), (0.664, 1e9), (0.781, 4e9), (1.0, 16e9))
"""Quantiles of model sizes in bytes, log-linear in between: gShare (ASPLOS 2026) found 66.4 % of its production models
below 1 GB and 78.1 % below 4 GB."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What loads and runs take; by default one GPU's PCIe 5 link, and its memory's bandwidth."""

    load_fixed_ms: float = 2.0
    load_bytes_per_ms: float = 50e6
    run_fixed_ms: float = 3.0
    run_bytes_per_ms: float = 2e9

    def model(self, model_id: str, size_bytes: int, tenant: str = "", slo_ms: float = 100.0) -> SimModel:
        run_ms = self.run_fixed_ms + size_bytes / self.run_bytes_per_ms
        load_ms = self.load_fixed_ms + size_bytes / self.load_bytes_per_ms
        return SimModel(model_id, size_bytes, run_ms, load_ms, tenant, slo_ms)


def mixed_sizes(count: int, seed: int) -> list[int]:
    """Bytes of `count` models, from 100 KB to 16 GB, in a random order: the quantiles of `SIZES`."""
    sizes = [round(_quantile(SIZES, (number + 0.5) / count)) for number in range(count)]
    Random(f"sizes {seed}").shuffle(sizes)
    return sizes


def _quantile(points: Sequence[tuple[float, float]], share: float) -> float:
    """The value at a share of the whole, log-linear between the points."""
    (low, least), (high, most) = next(ends for ends in pairwise(points) if share <= ends[1][0])
    return least * exp(log(most / least) * (share - low) / (high - low))


def mixed_models(count: int, seed: int, hardware: Hardware = Hardware()) -> list[SimModel]:
    return [hardware.model(f"m{i}", size_bytes) for i, size_bytes in enumerate(mixed_sizes(count, seed))]


# Zipf


def zipf(
    models: Sequence[SimModel], requests_per_s: float, duration_ms: float, *, exponent: float = 0.9, seed: int = 0
) -> Workload:
    """Poisson arrivals; the model of rank r is asked for in proportion to 1 / r^exponent.

    Less skewed than any real trace of model servers we know, whose slopes are 1.7 to 2.9.
    """
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(len(models))))

    def arrivals() -> Arrivals:
        rng = Random(f"zipf {seed}")
        at_ms = 0.0
        while (at_ms := at_ms + rng.expovariate(requests_per_s / 1e3)) < duration_ms:
            yield at_ms, bisect(weights, rng.random() * weights[-1])

    return Workload(f"zipf-{exponent:g}", models, arrivals)


# Like Azure Functions

RATES: Final = ((0.0, 1 / 168), (0.45, 1.0), (0.81, 60.0), (1.0, 46_000.0))
"""Quantiles of requests per hour, log-linear in between. Shahrad et al., Serverless in the Wild (ATC 2020): 45 % of
applications at most once an hour, 81 % at most once a minute; the ends are what makes the top 18.6 % carry 99.6 % of
the load, as there."""
VARIATIONS: Final = ((0.15, 0.05, 0.05), (0.45, 0.5, 1.0), (0.40, 1.0, 8.0))
"""Share of models, and the bounds between which the coefficient of variation of their inter-arrival times lies
(uniform): timers, the steady, and the bursty; in that paper 40 % are above 1."""


def maf_rates(count: int, seed: int) -> list[float]:
    """Requests per hour of each model, in a random order: the quantiles of `RATES`."""
    rates = [_quantile(RATES, (number + 0.5) / count) for number in range(count)]
    Random(f"rates {seed}").shuffle(rates)
    return rates


def maf_variations(count: int, seed: int) -> list[float]:
    """The coefficient of variation of each model's inter-arrival times."""
    rng = Random(f"variations {seed}")
    shares = list(accumulate(share for share, _, _ in VARIATIONS))
    kinds = [min(bisect(shares, (number + 0.5) / count), len(shares) - 1) for number in range(count)]
    rng.shuffle(kinds)
    return [rng.uniform(*VARIATIONS[kind][1:]) for kind in kinds]


def maf(
    models: Sequence[SimModel], duration_ms: float, *, rate_scale: float = 1.0, day_ms: float = 0.0, seed: int = 0
) -> Workload:
    """Like Microsoft Azure Functions: rates and variations as above, each model's arrivals a Gamma renewal process.

    With `day_ms`, half of the models follow a sinusoid of that period, between none and the double of their rate.
    """
    rates, variations = maf_rates(len(models), seed), maf_variations(len(models), seed)

    def of_model(index: int) -> Arrivals:
        rng = Random(f"maf {seed} {index}")
        mean_ms = HOUR_MS / (rates[index] * rate_scale)
        shape = 1 / variations[index] ** 2
        phase = rng.random()
        in_step = bool(day_ms) and rng.random() < 0.5
        at_ms = 0.0
        while True:
            at_ms += rng.gammavariate(shape, mean_ms / shape) * (rng.random() if at_ms == 0.0 else 1.0)
            shown_ms = _by_day(at_ms, day_ms, phase) if in_step else at_ms
            if shown_ms >= duration_ms:
                return
            yield shown_ms, index

    return Workload("maf", models, lambda: heapq.merge(*(of_model(index) for index in range(len(models)))))


def _by_day(at_ms: float, day_ms: float, phase: float) -> float:
    """When a process that runs at the rate 1 + sin(day) has come as far as one of rate 1 at `at_ms`: bisection."""

    def work(ms: float) -> float:
        return ms + day_ms / (2 * pi) * (cos(2 * pi * phase) - cos(2 * pi * (ms / day_ms + phase)))

    low, high = max(0.0, at_ms - day_ms), at_ms + day_ms
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if work(middle) < at_ms else (low, middle)
    return high


# What was recorded

MAX_REQUESTS: Final = 10_000_000
MAX_MODELS: Final = 1_000_000
MAX_ID_CHARS: Final = 253


def replay(
    name: str, lines: Iterable[str], *, speedup: float = 1.0, seed: int = 0, hardware: Hardware = Hardware()
) -> Workload:
    """A log of requests as CSV with a header: `time_s`, `model`, and perhaps `tenant`; other columns are not looked at.

    Times count from the first and go `speedup` times as fast. Logs tell no sizes: models get `mixed_sizes`, and the
    first tenant that asked for them.

    Raises:
        ValueError: one sentence that names the line and what was expected.
    """
    rows = csv.DictReader(lines, strict=True)
    indices: dict[str, int] = {}
    tenants: list[str] = []
    requests: list[tuple[float, int]] = []
    start_s: float | None = None
    try:
        missing = {"time_s", "model"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"the header must name the columns time_s and model, {sorted(missing)[0]} is missing")
        for row in rows:
            where = f"line {rows.line_num}"
            model, tenant = row["model"] or "", row.get("tenant") or ""
            at_s = _seconds(where, row["time_s"] or "")
            start_s = at_s if start_s is None else start_s
            if not 0 < len(model) <= MAX_ID_CHARS or len(tenant) > MAX_ID_CHARS:
                raise ValueError(
                    f"{where}: model must have 1 to {MAX_ID_CHARS} characters, and tenant no more than that"
                )
            if len(requests) == MAX_REQUESTS or len(indices) == MAX_MODELS:
                raise ValueError(f"{where}: at most {MAX_REQUESTS} requests for {MAX_MODELS} models are replayed")
            index = indices.setdefault(model, len(indices))
            if index == len(tenants):
                tenants.append(tenant)
            requests.append(((at_s - start_s) * 1e3 / speedup, index))
            if len(requests) > 1 and requests[-1][0] < requests[-2][0]:
                raise ValueError(f"{where}: time_s must not go back, found {row['time_s']!r} after a later one")
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: expected CSV ({error})") from None
    sizes = mixed_sizes(len(indices), seed)
    models = [hardware.model(*known) for known in zip(indices, sizes, tenants, strict=True)]
    return Workload(name, models, lambda: iter(requests))


def _seconds(where: str, text: str) -> float:
    try:
        at_s = float(text)
    except ValueError:
        at_s = inf
    if not 0 <= at_s <= 1e12:
        raise ValueError(f"{where}: time_s must be a number of seconds from 0 to 1e12, found {text[:40]!r}")
    return at_s
