"""`Engine.route`, branch by branch as its docstring numbers them, and what it knows of other pods."""

from __future__ import annotations

import pytest

from placement.lifecycle import CopyState
from placement.messages import (
    CopyUnwanted,
    Forward,
    Hop,
    Join,
    LoadFailed,
    LoadHere,
    Serve,
    SizeEstimated,
)
from placement.records import CopyStatus, pod_key
from tests.placement.pods import START_MS, Pod, held, peer, peers, route

# 1. A copy is loaded here


@pytest.mark.parametrize("hop", Hop)
def test_1_a_loaded_copy_serves_whoever_asks(pod: Pod, hop: Hop) -> None:
    copy = pod.load("a")
    peers(pod, "p2")
    pod.view.apply(held("p2", "a"))
    assert route(pod, "a", hop) == Serve(copy)


def test_1_serving_makes_the_copy_the_last_to_go(pod: Pod) -> None:
    pod.load("a", last_used_ms=START_MS - 9)
    pod.load("b", last_used_ms=START_MS - 5)
    route(pod, "a")
    assert list(pod.cache.policy.coldest(0)) == ["b", "a"]


def test_1_served_counts_and_touches_as_route_does(pod: Pod) -> None:
    a = pod.load("a", last_used_ms=START_MS - 9)
    pod.load("b", last_used_ms=START_MS - 5)
    before = pod.engine.stats.hits
    pod.engine.served(a, 3, pod.now_ms)
    assert pod.engine.stats.hits == before + 3
    assert list(pod.cache.policy.coldest(0)) == ["b", "a"]
    pod.engine.pin(a)
    pod.step(CopyUnwanted("a"))
    assert a.state is CopyState.UNLOADING  # and waits for its last request, which was let in before
    pod.engine.served(a, 1, pod.now_ms)
    assert pod.engine.stats.hits == before + 4


def test_1_a_use_may_lie_back_but_not_ahead(pod: Pod) -> None:
    """`lastUsedTime` comes from clients and from pods with other clocks; ahead, it would hold the copy for good."""
    pod.load("a", last_used_ms=START_MS - 9)
    route(pod, "a", used_ms=START_MS - 5)
    assert pod.cache.policy.oldest_used_ms() == START_MS - 5
    route(pod, "a", used_ms=START_MS + 60_000)
    assert pod.cache.policy.oldest_used_ms() == START_MS
    pod.load("b", last_used_ms=START_MS + 60_000)
    pod.want("b", START_MS + 60_000)
    pod.now_ms += 1
    route(pod, "a")
    assert list(pod.cache.policy.coldest(0)) == ["b", "a"]


def test_1_not_if_this_pod_was_tried_in_vain(pod: Pod) -> None:
    pod.load("a")
    peers(pod, "p2")
    assert route(pod, "a", Hop.CLIENT, "p1") == Forward("p2", Hop.LOAD_HERE)


# 2. From a client, and a copy is loaded elsewhere


def test_2_a_holder_is_asked_for_a_hit(pod: Pod) -> None:
    peers(pod, "p2", "p3")
    pod.view.apply(held("p2", "a"))
    pod.view.apply(held("p3", "a", CopyStatus.FAILED))
    assert route(pod) == Forward("p2", Hop.HIT_ONLY)


def test_2_a_holder_comes_before_a_load_under_way_here(pod: Pod) -> None:
    pod.want("a")
    peers(pod, "p2")
    pod.view.apply(held("p2", "a"))
    assert route(pod) == Forward("p2", Hop.HIT_ONLY)


def test_2_a_draining_holder_still_serves(pod: Pod) -> None:
    pod.view.apply(peer("p2", draining=True))
    pod.view.apply(held("p2", "a"))
    assert route(pod) == Forward("p2", Hop.HIT_ONLY)


def test_2_a_draining_holder_only_if_there_is_no_other(pod: Pod) -> None:
    """It goes soon, and what is sent there may have to be sent again."""
    pod.view.apply(peer("p2", draining=True))
    pod.view.apply(peer("p3"))
    pod.view.apply(held("p2", "a"))
    pod.view.apply(held("p3", "a"))
    assert {route(pod) for _ in range(20)} == {Forward("p3", Hop.HIT_ONLY)}


def test_2_the_less_busy_holder(pod: Pod) -> None:
    peers(pod, "p2", "p3")
    pod.view.apply(held("p2", "a"))
    pod.view.apply(held("p3", "a"))
    pod.engine.forward_started("p2")
    assert {route(pod) for _ in range(20)} == {Forward("p3", Hop.HIT_ONLY)}
    pod.engine.forward_ended("p2", reached=True, now_ms=pod.now_ms)
    assert len({route(pod) for _ in range(50)}) == 2


@pytest.mark.parametrize("lost", ["excluded", "suspect", "dead", "not told yet", "own record of an earlier life"])
def test_2_not_a_holder_that_cannot_answer(pod: Pod, lost: str) -> None:
    if lost != "not told yet":
        peers(pod, "p2")
    pod.view.apply(held("p1" if lost.startswith("own") else "p2", "a"))
    if lost == "suspect":
        pod.engine.forward_started("p2")
        pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    if lost == "dead":
        pod.view.remove(pod_key("p2"))
    found = route(pod, "a", Hop.CLIENT, *(["p2"] if lost == "excluded" else []))
    assert not isinstance(found, Forward) or found.hop is Hop.LOAD_HERE


# 3. A copy is on its way here


@pytest.mark.parametrize("hop", Hop)
def test_3_join_a_copy_in_any_state_on_its_way(pod: Pod, hop: Hop) -> None:
    """Single flight: however many ask, there is one estimate and one load."""
    pod.load("b", 10)
    pod.want("a")
    states = []

    def join() -> None:
        assert route(pod, "a", hop) == Join(pod.copy("a"))
        states.append(pod.state("a"))

    join()
    pod.step(SizeEstimated("a", 6))
    join()
    pod.unload("b")
    join()
    pod.queue("c", 4)
    pod.finish("c", 4)
    pod.pinned("c")
    pod.finish("a", 8)
    join()
    assert states == [CopyState.QUEUED, CopyState.WAITING, CopyState.LOADING, CopyState.SIZING]
    assert not pod.estimating
    assert not pod.loading


def test_3_joining_counts_as_use(pod: Pod) -> None:
    pod.want("a", START_MS - 3_600_000)
    route(pod, "a", used_ms=START_MS - 60_000)
    assert pod.copy("a").used_ms == START_MS - 60_000
    route(pod, "a", used_ms=START_MS - 70_000)
    pod.want("a", START_MS - 80_000)
    assert pod.copy("a").used_ms == START_MS - 60_000


def test_3_many_requests_one_load(pod: Pod) -> None:
    routes = []
    for _ in range(100):
        routes.append(route(pod))
        if isinstance(routes[-1], LoadHere):
            pod.want("a")
    assert [type(route) for route in routes] == [LoadHere] + [Join] * 99
    assert list(pod.step(SizeEstimated("a", 1))).count(pod.started("a")) == 1
    pod.want("a")
    assert list(pod.loading) == ["a"]


# 4. From a client, and a copy is on its way elsewhere


def test_4_a_load_under_way_elsewhere_is_joined_there(pod: Pod) -> None:
    """LOAD_HERE, not HIT_ONLY: should the copy be gone when the request arrives, it is loaded again."""
    peers(pod, "p2", "p3")
    pod.view.apply(held("p3", "a", CopyStatus.LOADING))
    assert route(pod) == Forward("p3", Hop.LOAD_HERE)
    pod.want("a")
    assert route(pod) == Join(pod.copy("a")), "here comes before there"


# What the pod says of itself


def test_the_pods_own_record(pod: Pod) -> None:
    pod.load("a", 3, START_MS - 500)
    pod.queue("b", 2)
    pod.want("c")
    pod.step(LoadFailed("c", "corrupt", False))
    record = pod.engine.pod_record("1.2")
    assert record == peer(
        "p1",
        used_bytes=5,
        oldest_used_ms=START_MS - 500,
        loaded=1,
        loading=1,
        failed=1,
        version="1.2",
        queue_ms=record.queue_ms,
        load_fixed_ms=record.load_fixed_ms,
        load_bytes_per_ms=record.load_bytes_per_ms,
    )


def test_copies_of_a_model_this_pod_by_itself_others_by_the_registry(pod: Pod) -> None:
    pod.view.apply(held("p1", "a", CopyStatus.FAILED))
    pod.view.apply(held("p2", "a"))
    assert set(pod.engine.copies_of("a")) == {"p2"}
    pod.load("a")
    assert {p: c.status for p, c in pod.engine.copies_of("a").items()} == {
        "p1": CopyStatus.LOADED,
        "p2": CopyStatus.LOADED,
    }


def test_every_attempt_is_counted_once(pod: Pod) -> None:
    peers(pod, "p2")
    pod.load("a")
    pod.want("b")
    pod.view.apply(held("p2", "c"))
    for model_id in "abc":
        route(pod, model_id)
    route(pod, "d", Hop.LOAD_HERE)
    route(pod, "d", Hop.HIT_ONLY)
    stats = pod.engine.stats
    assert (stats.hits, stats.joins, stats.forwards, stats.loads, stats.refusals) == (1, 1, 1, 1, 1)


def test_repr_tells_the_books(pod: Pod) -> None:
    pod.load("a", 3)
    pod.want("b")
    assert repr(pod.engine) == "<Engine p1 loaded=3 loading=0 unloading=0 promised=0 of 10 queued=1>"
