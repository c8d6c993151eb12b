"""The simulator (issue 4): worlds without and with faults, the same run from the same seed, views shared and own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mesh import router
from placement.simulator import checks, requests
from placement.simulator.drawn import Clients, draw
from placement.simulator.options import Faults, Options
from placement.simulator.report import Report
from placement.simulator.world import World

CALM = Options(seed=11, pods=4, duration_ms=10_000)
CLIENTS = Clients(models=40, requests_per_s=100)


def run(options: Options, clients: Clients) -> Report:
    return World(options, clients.workload(options)).run()


def test_requests_walk_as_the_router_lets_them() -> None:
    assert checks.ATTEMPTS == router.ATTEMPTS
    assert requests.MOVED_MS == router._MOVED_S * 1e3


def test_a_world_without_faults_serves_every_request() -> None:
    report = run(replace(CALM, warmup=0.5), CLIENTS)
    assert report.outcomes.keys() == {"ok"}
    assert 0 < report.misses < report.requests < report.all_requests
    assert report.loads > 20
    assert report.evictions > 0
    assert report.latency_ms(0.5) < report.latency_ms(0.99)


@pytest.mark.parametrize("seed", range(5))
def test_a_view_seen_with_lag_is_the_view_a_pod_would_have_of_its_own(seed: int) -> None:
    """Without restarts: a pod that starts anew has forgotten sizes which the shared view knows."""
    options, clients = draw(seed)
    faults = replace(options.faults, crashes=0, drains=0, registrations=20, compactions=2)
    options = replace(options, duration_ms=20_000, faults=faults)
    digests = {run(replace(options, own_views=own), clients).digest for own in (False, True)}
    assert len(digests) == 1


def test_the_same_seed_is_the_same_run() -> None:
    """Across processes, whose sets and dicts of strings are ordered differently (PYTHONHASHSEED)."""
    command = [sys.executable, "-m", "placement.simulator", "--drawn", "--seed", "4", "--duration-ms", "20000"]
    runs = {subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert "digest" in runs.pop()


def test_no_faults_are_none() -> None:
    assert not Faults().any
    assert not replace(Faults(), down_ms=1).any
    assert Faults(crashes=1).any
