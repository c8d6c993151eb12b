"""Workloads are what their sources say (research cited in `placement.simulator.scenario`)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import mean, pstdev

import pytest

from placement.simulator.scenario import (
    HOUR_MS,
    Hardware,
    Workload,
    maf,
    maf_rates,
    maf_variations,
    mixed_models,
    mixed_sizes,
    replay,
    zipf,
)

_LOG = ["time_s,model,tenant,exec_s\n", "5,a,t1,1.5\n", "5.5,b,t2,\n", '7,"a",t3,2\n']


def _share(values: list[float], at_most: float) -> float:
    return sum(value <= at_most for value in values) / len(values)


def test_sizes_have_the_quantiles_of_gshare() -> None:
    sizes: list[float] = [*mixed_sizes(1_000, seed=3)]
    assert min(sizes) >= 100e3
    assert max(sizes) <= 16e9
    assert _share(sizes, 1e9) == pytest.approx(0.664, abs=0.02)
    assert _share(sizes, 4e9) == pytest.approx(0.781, abs=0.02)


def test_rates_and_variations_have_the_quantiles_of_azure_functions() -> None:
    """Shahrad et al., ATC 2020, within two points."""
    rates, variations = maf_rates(1_000, seed=3), maf_variations(1_000, seed=3)
    assert _share(rates, 1) == pytest.approx(0.45, abs=0.02)
    assert _share(rates, 60) == pytest.approx(0.81, abs=0.02)
    assert sum(sorted(rates)[-186:]) / sum(rates) == pytest.approx(0.996, abs=0.02)
    assert 1 - _share(variations, 1) == pytest.approx(0.40, abs=0.02)
    assert _share(variations, 0.05) == pytest.approx(0.15, abs=0.02)


def test_arrivals_have_the_quantiles_too() -> None:
    """Counted, not taken from the parameters: of a thousand hours that go by a thousand times as fast."""
    models = mixed_models(400, seed=1)
    counts = Counter(index for _, index in maf(models, 20 * HOUR_MS, rate_scale=0.05, seed=1).arrivals())
    rates = [counts[index] / (20 * 0.05) for index in range(len(models))]
    assert _share(rates, 60) == pytest.approx(0.81, abs=0.02)
    assert sum(sorted(rates)[-round(0.186 * 400) :]) / sum(rates) == pytest.approx(0.996, abs=0.02)


def test_each_models_arrivals_vary_as_told() -> None:
    models, seed = mixed_models(80, seed=2), 2
    times: dict[int, list[float]] = {}
    for at_ms, index in maf(models, HOUR_MS, rate_scale=0.2, seed=seed).arrivals():
        times.setdefault(index, []).append(at_ms)
    busiest = [index for index, at in times.items() if len(at) >= 500]
    assert len(busiest) >= 4
    for index in busiest:
        gaps = [after - before for before, after in pairwise(times[index])]
        told = maf_variations(len(models), seed)[index]
        assert pstdev(gaps) / mean(gaps) == pytest.approx(told, rel=0.35)


def test_a_day_gives_half_of_the_models_busy_and_quiet_hours() -> None:
    models = mixed_models(60, seed=1)

    def unevenness(day_ms: float) -> float:
        """How much the busiest of four quarters stands out, at the median model."""
        quarters: dict[int, Counter[int]] = {}
        for at_ms, index in maf(models, HOUR_MS, rate_scale=0.3, day_ms=day_ms, seed=5).arrivals():
            quarters.setdefault(index, Counter())[int(4 * at_ms / HOUR_MS)] += 1
        peaks = [max(each.values()) / each.total() for each in quarters.values() if each.total() >= 200]
        return sorted(peaks)[len(peaks) // 2 + len(peaks) // 4]

    assert unevenness(HOUR_MS) > unevenness(0.0) + 0.05


def test_zipf_asks_by_rank() -> None:
    workload = zipf(mixed_models(50, seed=1), 1_000, 20_000, exponent=1.0, seed=1)
    counts = Counter(index for _, index in workload.arrivals())
    assert counts.total() == pytest.approx(20_000, rel=0.03)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize(
    "workload",
    [
        zipf(mixed_models(20, seed=1), 100, 10_000, seed=7),
        maf(mixed_models(20, seed=1), HOUR_MS, rate_scale=0.05, day_ms=HOUR_MS, seed=7),
        replay("log", _LOG),
    ],
    ids=["zipf", "maf", "replay"],
)
def test_a_workload_is_in_order_of_time_and_the_same_each_time(workload: Workload) -> None:
    requests = list(workload.arrivals())
    assert requests == sorted(requests, key=lambda request: request[0])
    assert requests == list(workload.arrivals())
    assert all(0 <= index < len(workload.models) for _, index in requests)


def test_a_log_is_replayed_from_its_first_request_on() -> None:
    workload = replay("log", _LOG, speedup=2)
    assert [(model.model_id, model.tenant) for model in workload.models] == [("a", "t1"), ("b", "t2")]
    assert list(workload.arrivals()) == [(0.0, 0), (250.0, 1), (1000.0, 0)]
    assert replay("log", ["model,time_s\n", "a,1\n"]).models[0].tenant == ""
    assert list(replay("none", ["time_s,model\n"]).arrivals()) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the header must name the columns time_s and model, model is missing"),
        (["time_s,name\n"], "the header must name the columns time_s and model, model is missing"),
        (["time_s,model\n", "soon,a\n"], "line 2: time_s must be a number of seconds from 0 to 1e12, found 'soon'"),
        (["time_s,model\n", "nan,a\n"], "line 2: time_s must be a number of seconds from 0 to 1e12, found 'nan'"),
        (["time_s,model\n", "-1,a\n"], "line 2: time_s must be a number of seconds from 0 to 1e12, found '-1'"),
        (["time_s,model\n", "1\n"], "line 2: model must have 1 to 253 characters, and tenant no more than that"),
        (["time_s,model\n", f"1,{'x' * 254}\n"], "line 2: model must have 1 to 253 characters"),
        (["time_s,model\n", "2,a\n", "1,a\n"], "line 3: time_s must not go back, found '1' after a later one"),
        (["time_s,model\n", '1,"a"b\n'], "expected CSV"),
        (["time_s,model\n", f"1,{'x' * 200_000}\n"], "expected CSV"),
    ],
)
def test_a_log_that_cannot_be_replayed_is_refused_in_a_sentence(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        replay("log", lines)
    assert said in str(refused.value)


def test_what_models_cost_follows_from_their_size_and_the_hardware() -> None:
    model = Hardware(load_fixed_ms=2, load_bytes_per_ms=50e6, run_fixed_ms=3, run_bytes_per_ms=2e9).model("m", 10**10)
    assert (model.load_ms, model.run_ms) == (202, 8)
