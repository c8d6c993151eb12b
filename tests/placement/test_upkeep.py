"""What the leader keeps true of all models (issue 4, item 8; ModelMesh 3.10), and what a pod does before it goes
(acceptance case B; mm#142)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from placement.leader import Leaders, leader_of
from placement.messages import DrainStarted, LoadOn, Tick
from placement.records import CopyStatus, copy_key, pod_key
from placement.upkeep import MOVES, SETTLE_MS
from placement.view import ClusterView
from tests.placement.pods import START_MS, Pod, held, model_record, peer


@pytest.fixture
def pod() -> Pod:
    """The leader, and two more pods with room for ten bytes."""
    pod = Pod()
    pod.view.apply(peer("p1", created=1))
    for number in (2, 3):
        pod.view.apply(peer(f"p{number}", created=number))
    return pod


def register(pod: Pod, *model_ids: str, **how: Any) -> None:
    for model_id in model_ids:
        pod.view.apply(replace(model_record(model_id), **how))


def copy_on(pod: Pod, pod_id: str, model_id: str, status: CopyStatus = CopyStatus.LOADED, **members: Any) -> None:
    pod.view.apply(held(pod_id, model_id, status, **{"registration": 1, "size_bytes": 1, **members}))


def dies(pod: Pod, pod_id: str, *model_ids: str) -> None:
    """The lease ends: all its keys vanish together."""
    for model_id in model_ids:
        pod.view.remove(copy_key(pod_id, model_id))
    pod.view.remove(pod_key(pod_id))


def tick(pod: Pod, passed_ms: int = 500) -> list[tuple[str, str]]:
    """What the leader wants next, as (model, pod)."""
    pod.now_ms += passed_ms
    return [(w.model_id, w.pod_id) for w in pod.step(Tick()) if isinstance(w, LoadOn)]


def names(wishes: list[tuple[str, str]]) -> list[str]:
    return [model_id for model_id, _ in wishes]


# Copies that are to be kept


def test_min_copies_are_kept_on_different_pods(pod: Pod) -> None:
    register(pod, "a", min_copies=2)
    wishes = tick(pod)
    assert names(wishes) == ["a", "a"]
    assert len({pod_id for _, pod_id in wishes}) == 2
    assert tick(pod) == [], "they are on their way"
    for _, pod_id in wishes:
        if pod_id == "p1":
            pod.load("a")
        else:
            copy_on(pod, pod_id, "a")
    assert tick(pod, 60_000) == []
    dies(pod, next(pod_id for _, pod_id in wishes if pod_id != "p1"), "a")
    assert names(tick(pod)) == ["a"]


def test_min_copies_are_kept_on_full_pods_too(pod: Pod) -> None:
    register(pod, "a", min_copies=1)
    for number in (1, 2, 3):
        pod.view.apply(peer(f"p{number}", created=number, used_bytes=10, oldest_used_ms=START_MS - 1, revision=9))
    assert names(tick(pod)) == ["a"]


def test_a_draining_holder_does_not_count(pod: Pod) -> None:
    register(pod, "a", min_copies=1)
    copy_on(pod, "p2", "a")
    assert tick(pod) == []
    pod.view.apply(peer("p2", draining=True, revision=9))
    assert names(tick(pod)) == ["a"]


def test_what_no_pod_can_load_is_not_asked_for(pod: Pod) -> None:
    register(pod, "a", min_copies=2, requires="gpu=h200")
    register(pod, "b", min_copies=1)
    for number in (1, 2, 3):
        copy_on(pod, f"p{number}", "b", CopyStatus.FAILED, error="corrupt")
    assert tick(pod) == []


def test_only_the_leader_asks(pod: Pod) -> None:
    pod.view.apply(peer("p0", created=0))
    register(pod, "a", min_copies=2)
    assert tick(pod) == []
    dies(pod, "p0")
    assert names(tick(pod)) == ["a", "a"]


def test_all_models_come_round_however_many_there_are(pod: Pod) -> None:
    """Bounded work in a tick, and one model that cannot be read or had hides none (MM.java:5930)."""
    pod.view.apply(peer("p2", capacity_bytes=10**9, created=2, revision=9))
    register(pod, *(f"m{number}" for number in range(2_500)), requires="gpu=h200")
    register(pod, "bad", min_copies=3, requires="no label")
    register(pod, "last", min_copies=1)
    assert [name for _ in range(6) for name in names(tick(pod))] == ["last"]


# What went with its pod


def test_what_went_with_its_pod_is_loaded_again_what_was_used_last_first(pod: Pod) -> None:
    """ModelMesh comes to it after 10 to 17 minutes."""
    register(pod, "a", "b", "c")
    for number, model_id in enumerate("abc"):
        copy_on(pod, "p3", model_id, used_ms=START_MS - 1_000 * number, since_ms=1)
    assert tick(pod) == []
    dies(pod, "p3", "a", "b", "c")
    pod.step(Tick())
    wishes = [wish for wish in pod.wishes if isinstance(wish, LoadOn)]
    assert [(wish.model_id, wish.used_ms) for wish in wishes] == [
        ("a", START_MS),
        ("b", START_MS - 1_000),
        ("c", START_MS - 2_000),
    ]
    assert not {wish.pod_id for wish in wishes} - {"p1", "p2"}


def test_only_as_far_as_something_colder_goes_for_it(pod: Pod) -> None:
    for number in (1, 2):
        pod.view.apply(peer(f"p{number}", created=number, used_bytes=10, oldest_used_ms=START_MS - 10_000, revision=9))
    pod.load("full", 10)
    register(pod, "warm", "cold")
    copy_on(pod, "p3", "warm", used_ms=START_MS - 5_000)
    copy_on(pod, "p3", "cold", used_ms=START_MS - 50_000)
    dies(pod, "p3", "warm", "cold")
    assert tick(pod) == [("warm", "p2")]


def test_what_a_pod_has_given_up_stays_so(pod: Pod) -> None:
    """Evicted, idle or unloaded by hand: its pod is still there."""
    register(pod, "a")
    copy_on(pod, "p2", "a", used_ms=START_MS)
    pod.view.remove(copy_key("p2", "a"))
    assert tick(pod) == []
    assert tick(pod, 2 * SETTLE_MS) == []
    assert tick(pod, 2 * SETTLE_MS) == []


def test_nothing_is_lost_while_another_copy_is_there(pod: Pod) -> None:
    register(pod, "a")
    copy_on(pod, "p2", "a")
    copy_on(pod, "p3", "a")
    dies(pod, "p3", "a")
    assert tick(pod) == []


# Ahead


def _settled(pod: Pod) -> None:
    tick(pod)
    tick(pod, SETTLE_MS)


def test_free_room_is_filled_with_what_was_used_last_up_to_a_reserve(pod: Pod) -> None:
    """ModelMesh 3.10: newest first, an eighth of each pod stays free."""
    for number in range(40):
        register(pod, f"m{number:02}", last_used_ms=number + 1)
    pod.view.learn_size("m00", 1, 2)
    assert tick(pod) == [], "not before the mesh has settled"
    _settled(pod)
    wishes = tick(pod)
    assert names(wishes) == [f"m{number:02}" for number in range(39, 27, -1)]
    assert Counter(pod_id for _, pod_id in wishes) == {"p1": 4, "p2": 4, "p3": 4}, "of two bytes each"


def test_models_used_at_the_same_time_are_candidates_each(pod: Pod) -> None:
    """MM.java:6393: a bulk registration collapses to one model a pass."""
    register(pod, "a", "b", "c", last_used_ms=7)
    _settled(pod)
    assert sorted(names(tick(pod))) == ["a", "b", "c"]


def test_full_pods_are_left_alone(pod: Pod) -> None:
    for number in (1, 2, 3):
        pod.view.apply(peer(f"p{number}", created=number, used_bytes=9, oldest_used_ms=1, revision=9))
    pod.load("warm", 9)
    register(pod, "a")
    _settled(pod)
    assert tick(pod) == []


# Balance


def test_a_pod_that_joins_gets_copies_of_what_a_full_one_has(pod: Pod) -> None:
    """A bounded number at a time; what was used last first."""
    for number in (1, 2):
        pod.view.apply(peer(f"p{number}", created=number, used_bytes=10, oldest_used_ms=1, revision=9))
    pod.load("own", 10)
    register(pod, *"abcd")
    for number, model_id in enumerate("abcd"):
        copy_on(pod, "p2", model_id, used_ms=START_MS + number)
    wishes = tick(pod)
    assert wishes == [("d", "p3"), ("c", "p3")]
    assert len(wishes) == MOVES


# Before a pod goes


def _draining(pod: Pod) -> list[LoadOn]:
    return [wish for wish in pod.step(DrainStarted()) if isinstance(wish, LoadOn)]


def test_what_is_in_use_is_loaded_elsewhere_before_the_pod_goes(pod: Pod) -> None:
    """mm#142: ModelMesh takes its own copy away first."""
    pod.now_ms = START_MS * 10
    for age_s, model_id in enumerate(["c", "b", "a"]):
        pod.load(model_id, 2, pod.now_ms - age_s * 1_000)
    pod.load("old", 2, pod.now_ms - 3_600_000)
    wishes = _draining(pod)
    assert [(wish.model_id, wish.used_ms) for wish in wishes] == [
        ("c", pod.now_ms),
        ("b", pod.now_ms - 1_000),
        ("a", pod.now_ms - 2_000),
    ]
    assert not pod.engine.is_replaced(pod.now_ms)
    for wish in wishes:
        assert wish.pod_id in ("p2", "p3")
        copy_on(pod, wish.pod_id, wish.model_id, CopyStatus.LOADING)
    assert not pod.engine.is_replaced(pod.now_ms)
    for wish in wishes:
        copy_on(pod, wish.pod_id, wish.model_id)
    assert pod.engine.is_replaced(pod.now_ms)
    assert pod.cache.copies.keys() == {"a", "b", "c", "old"}, "and all of them serve on"


def test_a_pod_does_not_wait_for_what_cannot_be(pod: Pod) -> None:
    pod.load("a")
    pod.load("b")
    pod.view.apply(peer("p2", draining=True, revision=9))
    wishes = _draining(pod)
    assert {wish.pod_id for wish in wishes} == {"p3"}
    copy_on(pod, "p3", "a", CopyStatus.FAILED, error="corrupt")
    assert not pod.engine.is_replaced(pod.now_ms)
    pod.view.apply(peer("p3", draining=True, revision=9))
    assert pod.engine.is_replaced(pod.now_ms)


def test_a_pod_alone_goes_at_once() -> None:
    pod = Pod()
    pod.load("a")
    assert _draining(pod) == []
    assert pod.engine.is_replaced(pod.now_ms)


def test_replacements_are_asked_for_a_few_at_a_time(pod: Pod) -> None:
    for number in range(10):
        pod.load(f"m{number}")
    first = _draining(pod)
    assert len(first) == 8
    for wish in first:
        copy_on(pod, wish.pod_id, wish.model_id)
    assert len(tick(pod)) == 2


# Who leads


def test_the_leader_is_found_again_when_it_goes_drains_or_comes_anew() -> None:
    view, leaders = ClusterView(), Leaders()
    assert leaders.leader(view) is None
    for number in (1, 2, 3):
        view.apply(peer(f"p{number}", created=number))
    assert leaders.leader(view) == leader_of(view) == "p1"
    view.apply(peer("p1", created=9))
    assert leaders.leader(view) == leader_of(view) == "p2"
    view.apply(peer("p2", created=2, draining=True))
    assert leaders.leader(view) == leader_of(view) == "p3"
    view.remove("pods/p3")
    assert leaders.leader(view) == leader_of(view) == "p1"


def test_pods_whose_copies_are_all_to_be_kept_are_not_asked(pod: Pod) -> None:
    register(pod, "a", min_copies=1)
    for number in (1, 2, 3):
        pod.view.apply(peer(f"p{number}", created=number, used_bytes=10, kept_bytes=10, oldest_used_ms=1, revision=9))
    pod.load("own", 10)
    pod.view.apply(replace(model_record("own"), pinned=True, revision=2))
    pod.step(Tick())
    pod.step(Tick())
    assert pod.engine.pod_record().kept_bytes == 10
    pod.wishes.clear()
    assert tick(pod, 60_000) == []
