"""What loading costs, learned from a pod's own loads (issue 4, item 2)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.costs import MAX_MODELS, MIN_MS, LoadCosts, Source
from placement.records import Tier

_MB = 1_000_000


def _learn(costs: LoadCosts, fixed_ms: float, mb_per_ms: float, loads: int, source: Source = Tier.DISK) -> None:
    for number in range(loads):
        size_bytes = (1 + number * 37 % 400) * _MB
        costs.observe(f"m{number}", source, size_bytes, fixed_ms + size_bytes / _MB / mb_per_ms)


def test_a_fixed_part_and_a_bandwidth_are_found() -> None:
    costs = LoadCosts()
    _learn(costs, fixed_ms=20, mb_per_ms=4, loads=300)
    for size_mb in (1, 50, 1_000):
        assert costs.reload_ms("new", Tier.DISK, size_mb * _MB) == pytest.approx(20 + size_mb / 4, rel=0.1)


def test_what_a_disk_was_is_forgotten() -> None:
    costs = LoadCosts()
    _learn(costs, fixed_ms=5, mb_per_ms=10, loads=300)
    _learn(costs, fixed_ms=5, mb_per_ms=1, loads=300)
    assert costs.reload_ms("new", Tier.DISK, 100 * _MB) == pytest.approx(105, rel=0.1)


def test_sources_are_apart_and_start_in_the_order_of_the_tiers() -> None:
    costs = LoadCosts()
    before = [costs.reload_ms("m", source, 100 * _MB) for source in (Tier.HOST, Tier.DISK, None)]
    assert before == sorted(before)
    _learn(costs, fixed_ms=500, mb_per_ms=0.1, loads=300, source=Tier.HOST)
    assert [costs.reload_ms("m", source, 100 * _MB) for source in (Tier.DISK, None)] == before[1:]


def test_a_models_own_last_load_counts_as_much_as_the_line() -> None:
    costs = LoadCosts()
    _learn(costs, fixed_ms=20, mb_per_ms=4, loads=300)
    line_ms = costs.reload_ms("slow", Tier.DISK, 100 * _MB)
    costs.observe("slow", Tier.DISK, 100 * _MB, 1_000)
    expected = (costs.reload_ms("another", Tier.DISK, 100 * _MB) + 1_000) / 2
    assert line_ms < costs.reload_ms("slow", Tier.DISK, 100 * _MB) == pytest.approx(expected)
    changed = costs.reload_ms("slow", Tier.DISK, 101 * _MB)  # not the model it was
    assert changed == costs.reload_ms("another", Tier.DISK, 101 * _MB)


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10**11), st.floats(0, 1e7)), max_size=60))
def test_a_load_costs_something_and_a_larger_one_no_less(loads: list[tuple[int, float]]) -> None:
    """Whatever was measured: nothing negative, nothing infinite, never less for more bytes."""
    costs = LoadCosts()
    for size_bytes, took_ms in loads:
        costs.observe("m", Tier.DISK, size_bytes, took_ms)
    answers = [costs.reload_ms("new", Tier.DISK, 10**power) for power in range(12)]
    assert all(MIN_MS <= answer < 1e12 for answer in answers)
    assert all(small <= large * (1 + 1e-9) for small, large in pairwise(answers))


def test_models_remembered_are_bounded() -> None:
    costs = LoadCosts()
    for number in range(MAX_MODELS + 10):
        costs.observe(f"m{number}", Tier.DISK, _MB, 5)
    assert len(costs._last) == MAX_MODELS
