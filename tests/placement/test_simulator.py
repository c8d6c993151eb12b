"""The simulator (issue 4): worlds without and with faults, the same run from the same seed, views shared and own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import pytest

from mesh import router
from placement.cache import Cache, Copy
from placement.lifecycle import CopyState, Move
from placement.messages import Wake
from placement.records import TenantRecord
from placement.simulator import __main__ as simulator
from placement.simulator import pods, requests, world_checks
from placement.simulator.checks import Violation
from placement.simulator.drawn import Clients, draw
from placement.simulator.options import Faults, Options
from placement.simulator.pods import SimPod
from placement.simulator.report import Report
from placement.simulator.views import OwnView
from placement.simulator.world import World
from placement.tenants import Shares, Tenants
from placement.view import ClusterView
from tests.sim import broken

CALM = Options(seed=11, pods=4, duration_ms=10_000)
CLIENTS = Clients(models=40, requests_per_s=100)


def run(options: Options, clients: Clients) -> Report:
    return World(options, clients.workload(options)).run()


def test_requests_walk_as_the_router_lets_them() -> None:
    assert world_checks.ATTEMPTS == router.ATTEMPTS
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


# Planted bugs: a check has to find each, say so, and tell how to see it again.


def evict_pinned(cache: Cache, now_ms: int) -> Generator[Copy, None, None]:
    """As `Cache.evictable`, with a wrong look at pins."""
    with closing(cache.policy.coldest(now_ms)) as coldest:
        copies = [cache.copies[model_id] for model_id in coldest]
    yield from sorted(copies, key=lambda copy: -copy.pins)


def free_early(cache: Cache, copy: Copy, move: Move, now_ms: int) -> None:
    """Bytes are free when an unload begins, not when it has finished."""
    if move is Move.EVICT:
        cache.capacity_bytes += copy.size_bytes
    MOVE(cache, copy, move, now_ms)


def miscount(cache: Cache, copy: Copy, move: Move, now_ms: int) -> None:
    MOVE(cache, copy, move, now_ms)
    if move is Move.SETTLE:
        cache._bytes[CopyState.LOADED] -= 1


MOVE = Cache.move


def forget_wake(pod: SimPod, action: object) -> None:
    """Nobody who waits for a copy hears of it."""


def serve_what_is_not_there(view: ClusterView, key: str, revision: int | None = None) -> str | None:
    """A dead pod's copies stay in the view."""
    return None if key.startswith("copies/") else REMOVE(view, key, revision)


REMOVE = ClusterView.remove

BUGS = {
    "no copy is evicted while in use": lambda patch: patch.setattr(Cache, "evictable", evict_pinned),
    "a load starts only into memory that is free": lambda patch: patch.setattr(Cache, "move", free_early),
    "books equal sums": lambda patch: patch.setattr(Cache, "move", miscount),
    "all work ends": lambda patch: patch.setitem(pods.CARRY_OUT, Wake, forget_wake),
    "views converge": lambda patch: patch.setattr(OwnView, "remove", serve_what_is_not_there),
}


@pytest.mark.parametrize("invariant", BUGS)
def test_a_planted_bug_is_found_and_named(
    invariant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    BUGS[invariant](monkeypatch)
    arguments = "--seed 5 --pods 2 --models 20 --requests-per-s 60 --duration-ms 10000 --run-ms 50 --own-views"
    monkeypatch.setattr(sys, "argv", ["simulator", *arguments.split()])
    assert simulator.main() == 1
    told = capsys.readouterr().out
    assert told.startswith("Options(seed=5, pods=2,")
    assert f": {invariant}: " in told
    assert told.endswith(f"replay: python -m placement.simulator {arguments}\n")


@pytest.mark.parametrize("seed", [*range(4), *(random.SystemRandom().randrange(1 << 32) for _ in range(2))])
def test_no_invariant_breaks(seed: int) -> None:
    """A few of the worlds of `make sim`, which are a thousand; the drawn seeds are in the tests' names."""
    assert not broken(seed)


def of_tenants() -> World:
    """Three tenants whose grants are short."""
    options = Options(seed=3, pods=2, capacity_bytes=1 << 20, duration_ms=20_000, load_slots=4)
    workload = Clients(models=40, requests_per_s=40.0, load_ms=200.0, fill=0.2, tenants=3).workload(options)
    mesh_bytes = options.pods * options.capacity_bytes
    grants = [
        TenantRecord("t0", guaranteed_bytes=mesh_bytes // 2),
        TenantRecord("t1", max_bytes=mesh_bytes // 8, weight=5),
        TenantRecord("t2", max_loads=1, weight=5),
    ]
    return World(options, replace(workload, grants=grants))


def test_tenants_get_what_they_are_granted() -> None:
    report = of_tenants().run()
    assert report.evictions > 0
    assert report.outcomes["ok"] > 0.9 * report.requests


@pytest.mark.parametrize(
    ("invariant", "broken_rule", "answer"),
    [
        ("others leave a tenant what it is guaranteed", (Shares, "floor_bytes"), 0),
        ("no tenant is above its limit", (Tenants, "above_limit_bytes"), 0),
        ("no more loads of a tenant than it may have", (Tenants, "may_start"), True),
    ],
)
def test_tenants_rules_are_checked(
    invariant: str, broken_rule: tuple[type, str], answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that is not kept is named by its check."""
    monkeypatch.setattr(*broken_rule, lambda *_: answer)
    with pytest.raises(Violation, match=invariant):
        of_tenants().run()
