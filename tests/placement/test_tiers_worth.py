"""What eviction policies are told of the tiers, and what they may not give up yet (issue 4, item 4)."""

from __future__ import annotations

import pytest

from placement.lifecycle import CopyState
from placement.limits import HostMode
from placement.messages import (
    CopyWanted,
    SizeEstimated,
    Tick,
)
from placement.moves import MAX_GUARD_MS
from placement.policies.base import Worth
from placement.policies.lru import Lru
from placement.records import Priority, Tier
from tests.placement.pods import START_MS, demoted, pod_with, route

DEVICE, HOST, DISK = Tier


# What policies are told


class Recorder(Lru):
    """Remembers what each model is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.worth: dict[str, Worth] = {}

    def insert(self, model_id: str, worth: Worth, used_ms: int, uses: int = 1) -> None:
        super().insert(model_id, worth, used_ms, uses)
        self.worth[model_id] = worth

    def revalue(self, model_id: str, worth: Worth) -> None:
        self.worth[model_id] = worth


def test_each_tier_has_a_policy_of_its_own_that_knows_the_next_ones_cost() -> None:
    pod = pod_with(host_bytes=20, disk_bytes=20, policy=Recorder)
    demoted(pod, "a", 4)
    device, host, disk = (pod.cache.policy, *(books.policy for books in pod.engine.copies.lower.values()))
    assert isinstance(device, Recorder)
    assert isinstance(host, Recorder)
    assert isinstance(disk, Recorder)
    costs = pod.engine.copies.costs
    assert device.worth["a"].reload_ms == costs.reload_ms("a", HOST, 4)
    assert host.worth["a"].reload_ms == costs.reload_ms("a", DISK, 4)
    assert disk.worth["a"].reload_ms == costs.reload_ms("a", None, 4)


def test_a_copy_is_worth_more_when_the_tier_below_has_given_it_up() -> None:
    pod = pod_with(host_bytes=4, host_mode=HostMode.INCLUSIVE, policy=Recorder)
    policy = pod.cache.policy
    assert isinstance(policy, Recorder)
    pod.queue("a", 4)
    pod.now_ms += 500
    pod.finish("a", 4)
    cheap = policy.worth["a"].reload_ms
    pod.queue("b", 4)
    assert policy.worth["a"].reload_ms > cheap


def test_uses_on_the_device_count_where_it_is_copied_down_to() -> None:
    pod = pod_with(8, host_bytes=8)
    for model_id in "ab":
        pod.load(model_id, 4)
        pod.now_ms += 1
    route(pod, "a")
    for model_id in "ba":
        pod.give_up(model_id)
    assert list(pod.engine.copies.lower[HOST].policy.coldest(pod.now_ms)) == ["b", "a"]


# What was just loaded


@pytest.mark.parametrize(("priority", "is_prefetch"), [(None, True), (Priority.LOW, False)])
def test_what_was_just_loaded_does_not_go_for_a_lesser_one(priority: Priority | None, is_prefetch: bool) -> None:
    pod = pod_with()
    copy = pod.load("a", 10)
    pod.step(CopyWanted("b", pod.now_ms, priority, is_prefetch))
    pod.step(SizeEstimated("b", 5))
    assert pod.state("b") is CopyState.QUEUED
    assert START_MS < copy.guarded_until_ms <= START_MS + MAX_GUARD_MS
    pod.now_ms = copy.guarded_until_ms
    pod.step(Tick())
    assert pod.unloading == {"a"}


def test_it_goes_for_an_equal_and_a_prefetch_always_may() -> None:
    pod = pod_with()
    pod.step(CopyWanted("a", pod.now_ms, is_prefetch=True))
    pod.step(SizeEstimated("a", 10))
    pod.finish("a", 10)
    pod.step(CopyWanted("b", pod.now_ms, is_prefetch=True))
    pod.step(SizeEstimated("b", 10))
    assert pod.unloading == {"a"}
    pod.unload("a")
    pod.finish("b", 10)
    pod.queue("c", 10)
    assert pod.unloading == {"b"}
