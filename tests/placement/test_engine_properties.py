"""Any order of events: capacity by the books, pins, single flight and load slots hold, and every request ends (issue 2,
part 8). `tests.placement.world` checks after each step; here are the drivers."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.limits import HostMode
from tests.placement.world import COMMON, RARE, Operation, World

_CHANCE = st.randoms(use_true_random=False)


class AnyOrder(RuleBasedStateMachine):
    """Hypothesis chooses, so that what fails is made short."""

    @initialize(
        pods=st.integers(1, 4),
        capacity_bytes=st.integers(1, 12),
        exact=st.booleans(),
        limits=st.fixed_dictionaries(
            {
                "load_slots": st.integers(1, 3),
                "host_bytes": st.sampled_from([0, 0, 3, 10]),
                "disk_bytes": st.sampled_from([0, 0, 5, 30]),
                "host_mode": st.sampled_from(HostMode),
            }
        ),
    )
    def start(self, pods: int, capacity_bytes: int, exact: bool, limits: dict[str, Any]) -> None:
        self.world = World(pods, capacity_bytes, exact=exact, **limits)

    @rule(operation=st.sampled_from(COMMON + COMMON + RARE), rng=_CHANCE)
    def do(self, operation: Operation, rng: Random) -> None:
        operation(self.world, rng)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle(Random(0))


AnyOrder.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_any_order = AnyOrder.TestCase


@pytest.mark.parametrize("seed", range(24))
def test_long_runs(seed: int) -> None:
    """States that short runs do not reach: full pods, queues, many requests at once. The seed is the bug report."""
    rng = Random(seed)
    tiers = {"host_bytes": rng.choice([0, 8, 20]), "disk_bytes": rng.choice([0, 12, 60])}
    mode = rng.choice(list(HostMode))
    world = World(
        1 + seed % 4, rng.randint(4, 30), exact=seed % 3 == 0, load_slots=1 + seed % 2, host_mode=mode, **tiers
    )
    weights = [rng.choice([1, 2, 4]) for _ in COMMON] + [rng.choice([0, 0.05, 0.3]) for _ in RARE]
    for operation in rng.choices(COMMON + RARE, weights, k=1_800):
        operation(world, rng)
        world.check()
    world.settle(rng)
    assert world.ended > 50
