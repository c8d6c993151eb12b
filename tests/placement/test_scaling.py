"""How many copies a model has, and which goes (issue 4, item 7). ModelMesh's sections are those of its own rules, whose
faults ours must not have: MM.java:5642 (a model in use all the time stays at one copy), 5780 (excluded pods counted
twice), 6275 (an age taken for a time)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.lifecycle import CopyState
from placement.messages import CopyUnwanted, DrainStarted, LoadOn, Tick
from placement.records import CopyStatus, ModelRecord, copy_key
from placement.scaling import COLD_MS, COOL_FULL_MS, COOL_MS, RELAXED, SPARE_MS, STEADY, TARGET, Meter, copies_for
from tests.placement.pods import START_MS, Pod, held, model_record, peer

_SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def placed(pod: Pod, model_id: str = "a", **how: Any) -> None:
    """A registered model is placed in another way."""
    known = pod.view.models.get(model_id) or model_record(model_id)
    pod.view.apply(replace(known, revision=known.revision + 1, **how))


def live(pod: Pod, seconds: int, *, busy_ms: float = 0, runs: int = 1, every_s: int = 1) -> None:
    """Seconds pass, and every `every_s` of them the model runs so often and so long in all."""
    step_s = every_s if busy_ms else 2
    for _ in range(0, seconds, step_s):
        pod.now_ms += step_s * 1_000
        pod.step(Tick({"a": (runs, busy_ms)} if busy_ms else {}))


def asked(pod: Pod, model_id: str = "a") -> list[str]:
    """The pods on which the model was wanted since the last call."""
    wishes, pod.wishes[:] = list(pod.wishes), []
    return [wish.pod_id for wish in wishes if isinstance(wish, LoadOn) and wish.model_id == model_id]


def holder(pod: Pod, pod_id: str, *, since_ms: int = 0, model_id: str = "a", **members: Any) -> None:
    """Another pod has the model."""
    pod.view.apply(held(pod_id, model_id, since_ms=since_ms, registration=1, size_bytes=1, **members))


@pytest.fixture
def pod() -> Pod:
    pod = Pod()
    pod.load("a")
    for number in range(2, 8):
        pod.view.apply(peer(f"p{number}", revision=1))
    return pod


# How many


@_SETTINGS
@given(st.integers(0, 8), st.integers(0, 8), st.floats(0, 2_000), st.booleans(), st.sampled_from([TARGET, RELAXED]))
def test_the_number_keeps_within_what_was_registered(
    least: int, most: int, percent: float, steady: bool, limit: int
) -> None:
    if most and least > most:
        least = most
    model = ModelRecord("m", "f", "p", min_copies=least, max_copies=most)
    count = copies_for(model, percent, limit, steady=steady)
    assert count >= max(1, least)
    assert not most or count <= most
    assert count * limit >= percent - 1e-6 or count == most
    assert copies_for(model, percent, RELAXED, steady=steady) >= copies_for(model, percent, TARGET, steady=steady)


def test_a_model_in_use_all_the_time_gets_a_second_copy(pod: Pod) -> None:
    """Acceptance case F: one request in ten seconds. MM.java:5642 never gives it one."""
    live(pod, 60 * (STEADY - 2), busy_ms=1, every_s=10)
    assert asked(pod) == []
    while not pod.wishes and pod.now_ms < START_MS + 600_000:
        live(pod, 10, busy_ms=1, every_s=10)
    (second,) = asked(pod)
    holder(pod, second, since_ms=pod.now_ms)
    live(pod, 600, busy_ms=1, every_s=10)
    assert asked(pod) == [], "and not a third"


def test_a_model_in_use_now_and_then_does_not(pod: Pod) -> None:
    live(pod, 60 * 30, busy_ms=1, every_s=120)
    assert asked(pod) == []


def test_minutes_pass_one_by_one() -> None:
    meter = Meter()
    for minute in range(30):
        meter.used(minute * 60_000)
        meter.used(minute * 60_000 + 59_999)
        assert meter.used_minutes(minute * 60_000).bit_count() == min(10, minute + 1)
    assert meter.used_minutes(32 * 60_000).bit_count() == 7
    assert meter.used_minutes(10**15) == 0


@pytest.mark.parametrize(("percent", "copies"), [(50, 1), (100, 2), (200, 3)])
def test_as_many_as_the_load_takes(pod: Pod, percent: int, copies: int) -> None:
    """Arrivals times service time, over the pod's threads; several at once."""
    live(pod, 30, busy_ms=10 * percent)
    assert len(set(asked(pod))) == copies - 1


def test_what_waits_counts_too(pod: Pod) -> None:
    """The threads are busy and no more, but 50 requests wait, of which each takes 200 ms."""
    for _ in range(50):
        pod.pinned("a")
    live(pod, 30, busy_ms=1_000, runs=5)
    assert len(set(asked(pod))) == 4


def test_the_loads_of_all_copies_count_and_one_holder_decides(pod: Pod) -> None:
    """Two holders at 100 and 90 percent: three copies. Of the two, only one asks."""
    other = Pod(pod_id="p2", view=pod.view)
    other.load("a")
    pod.view.apply(peer("p1", revision=1))
    holder(pod, "p2", busy_percent=90)
    holder(pod, "p1", busy_percent=100)
    live(pod, 30, busy_ms=1_000)
    live(other, 30, busy_ms=900)
    both = [asked(pod), asked(other)]
    assert sorted(len(set(pods)) for pods in both) == [0, 1]
    assert not set(both[0] + both[1]) & {"p1", "p2"}


def test_more_than_max_copies_are_not_asked_for(pod: Pod) -> None:
    placed(pod, max_copies=2)
    live(pod, 30, busy_ms=5_000)
    assert len(set(asked(pod))) == 1


def test_pods_that_may_not_load_it_are_counted_once(pod: Pod) -> None:
    """MM.java:5780 subtracts them twice, and asks for none. Three of six may: all three are asked."""
    placed(pod, requires="gpu=h200")
    for number in range(2, 5):
        pod.view.apply(peer(f"p{number}", labels="gpu=h200", revision=2))
    live(pod, 30, busy_ms=5_000)
    assert set(asked(pod)) == {"p2", "p3", "p4"}


def test_a_copy_that_is_asked_for_is_not_asked_for_again_until_it_could_have_shown(pod: Pod) -> None:
    live(pod, 8, busy_ms=1_000)
    first = asked(pod)
    assert len(first) == 1
    holder(pod, first[0], status=CopyStatus.LOADING)
    live(pod, 20, busy_ms=1_000)
    assert asked(pod) == []
    pod.view.remove(copy_key(first[0], "a"))
    live(pod, 3, busy_ms=1_000)
    assert len(asked(pod)) == 1


def test_copies_keep_apart(pod: Pod) -> None:
    """Nodes first: p2 and p3 stand beside this pod's copy, and beside each other."""
    pod.view.apply(peer("p1", labels="node=n1"))
    for number in range(2, 8):
        pod.view.apply(peer(f"p{number}", labels=f"node=n{number // 2}", revision=2))
    live(pod, 30, busy_ms=2_500)
    found = asked(pod)
    assert len({int(pod_id[1:]) // 2 for pod_id in found}) == len(set(found)) == 3


# Room


def _fill(pod: Pod, idle_ms: int) -> None:
    for number in range(2, 8):
        oldest_ms = pod.now_ms - idle_ms
        pod.view.apply(peer(f"p{number}", used_bytes=10, oldest_used_ms=oldest_ms, revision=9))


def test_full_pods_give_way_to_load_if_something_there_is_cold(pod: Pod) -> None:
    pod.now_ms += 2 * SPARE_MS
    _fill(pod, COLD_MS // 3)
    live(pod, 5, busy_ms=1_000)
    assert asked(pod) == []
    _fill(pod, COLD_MS)
    live(pod, 20, busy_ms=1_000)
    assert asked(pod) != []


def test_full_pods_give_way_to_a_steady_second_copy_if_something_there_was_not_used_for_an_hour(pod: Pod) -> None:
    """ModelMesh: only if the coldest of the cluster is 20 hours old."""
    pod.now_ms += 2 * SPARE_MS
    _fill(pod, SPARE_MS // 2)
    live(pod, 600, busy_ms=1, every_s=10)
    assert asked(pod) == []
    _fill(pod, SPARE_MS)
    live(pod, 20, busy_ms=1, every_s=10)
    assert asked(pod) != []


# Fewer


def _two(pod: Pod, *, mine_ms: int = START_MS, theirs_ms: int = START_MS + 1) -> None:
    pod.copy("a").since_ms = mine_ms
    holder(pod, "p2", since_ms=theirs_ms)


def gone(pod: Pod) -> bool:
    return pod.state("a") is not CopyState.LOADED


def test_the_copy_that_was_loaded_first_goes_after_a_while(pod: Pod) -> None:
    """MM.java:6275 takes a time for an age and always waits five hours."""
    _two(pod)
    live(pod, COOL_MS // 1_000)
    assert not gone(pod)
    live(pod, 4)
    assert gone(pod)


def test_sooner_where_room_is_short(pod: Pod) -> None:
    _two(pod)
    pod.load("full", 9)
    live(pod, COOL_FULL_MS // 1_000 + 4)
    assert gone(pod)


def test_the_last_one_stays_and_so_does_the_newer_of_two(pod: Pod) -> None:
    live(pod, 3 * COOL_MS // 1_000)
    assert not gone(pod)
    _two(pod, mine_ms=START_MS + 2)
    live(pod, 3 * COOL_MS // 1_000)
    assert not gone(pod)


@pytest.mark.parametrize("how", ["draining", "dead", "suspect", "loading"])
def test_only_a_holder_that_serves_and_stays_is_a_reason_to_go(pod: Pod, how: str) -> None:
    _two(pod)
    match how:
        case "draining":
            pod.view.apply(peer("p2", draining=True, revision=2))
        case "dead":
            pod.view.remove("pods/p2")
        case "loading":
            holder(pod, "p2", since_ms=START_MS + 1, status=CopyStatus.LOADING)
    for _ in range(3 * COOL_MS // 1_000):
        if how == "suspect":
            pod.engine.forward_started("p2")
            pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms + 2_000)
        live(pod, 1)
    assert not gone(pod)


def test_load_between_the_two_bounds_changes_nothing(pod: Pod) -> None:
    """Hysteresis: 120 percent of two copies is under TARGET each, and would be over RELAXED on one."""
    _two(pod)
    holder(pod, "p2", since_ms=START_MS + 1, busy_percent=60)
    live(pod, 3 * COOL_MS // 1_000, busy_ms=600)
    assert not gone(pod)
    assert asked(pod) == []


def test_min_copies_stay_and_max_copies_are_kept_to(pod: Pod) -> None:
    placed(pod, min_copies=2)
    _two(pod)
    live(pod, 3 * COOL_MS // 1_000)
    assert not gone(pod)
    placed(pod, min_copies=0, max_copies=1)
    live(pod, COOL_MS // 1_000 + 2, busy_ms=900)
    assert gone(pod)


@_SETTINGS
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=5), st.integers(1, 3))
def test_however_views_lag_as_many_as_are_to_stay_do(copies: list[tuple[int, bool]], keep: int) -> None:
    """Each holder decides by a view in which some of the others may be missing; all that want to go do, at once."""
    pods = []
    for number, _ in enumerate(copies):
        pod = Pod(pod_id=f"p{number}")
        pod.register("a")
        placed(pod, min_copies=keep)
        pod.load("a")
        pods.append(pod)
    for number, (since_ms, sees_all) in enumerate(copies):
        pods[number].copy("a").since_ms = START_MS + since_ms
        for other, (others_ms, _) in enumerate(copies):
            if other != number and (sees_all or (number + other) % 2):
                pods[number].view.apply(peer(f"p{other}"))
                holder(pods[number], f"p{other}", since_ms=START_MS + others_ms)
    for pod in pods:
        live(pod, 2)
        pod.now_ms += COOL_MS
        live(pod, 2)
    assert sum(not gone(pod) for pod in pods) >= min(keep, len(pods))


# Idle


def test_an_idle_model_is_unloaded(pod: Pod) -> None:
    """mm#102 and others asked ModelMesh for it."""
    placed(pod, idle_unload_s=60)
    live(pod, 100, busy_ms=1, every_s=50)
    live(pod, 58)
    assert not gone(pod)
    live(pod, 4)
    assert gone(pod)


def test_what_is_loaded_with_an_old_use_is_not_idle_yet(pod: Pod) -> None:
    placed(pod, "b", idle_unload_s=60)
    pod.load("b", last_used_ms=1)
    live(pod, 30)
    assert pod.state("b") is CopyState.LOADED


@pytest.mark.parametrize("how", [{"min_copies": 1}, {"pinned": True}])
def test_what_is_to_be_kept_is_never_idle(pod: Pod, how: dict[str, Any]) -> None:
    placed(pod, idle_unload_s=60, **how)
    live(pod, 600)
    assert not gone(pod)


# What does not go for room


@pytest.mark.parametrize(("how", "others", "kept"), [
    ({"pinned": True}, 0, True),
    ({"pinned": True}, 1, True),
    ({"min_copies": 1}, 0, True),
    ({"min_copies": 1}, 1, False),
    ({}, 0, False),
])  # fmt: skip
def test_pins_and_min_copies_are_not_evicted_for_room(pod: Pod, how: dict[str, Any], others: int, kept: bool) -> None:
    placed(pod, **how)
    for number in range(others):
        holder(pod, f"p{number + 2}")
    pod.register("b")
    pod.queue("b", 10)
    assert gone(pod) is not kept


def test_a_pinned_copy_goes_when_it_is_told_to(pod: Pod) -> None:
    placed(pod, pinned=True)
    pod.step(CopyUnwanted("a"))
    assert gone(pod)


# What others hear


def test_loads_and_uses_are_told_coarsely(pod: Pod) -> None:
    live(pod, 30, busy_ms=500)
    told = pod.published["a"]
    assert 40 <= told.busy_percent <= 50
    live(pod, 30, busy_ms=520)
    assert pod.published["a"] == told
    live(pod, 60)
    assert pod.published["a"].busy_percent == 0
    used_ms = pod.published["a"].used_ms
    live(pod, 500, busy_ms=1, every_s=5)
    assert pod.published["a"].used_ms == used_ms
    live(pod, 600, busy_ms=1, every_s=5)
    assert pod.published["a"].used_ms > used_ms


def test_a_draining_pod_is_no_holder(pod: Pod) -> None:
    pod.step(DrainStarted())
    live(pod, 30, busy_ms=5_000)
    assert not {"p1"} & set(asked(pod))
