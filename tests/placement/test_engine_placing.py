"""`Engine.route` when nobody has the model, branches 5 and 6 of its docstring: who loads it, or why nobody does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.messages import (
    DrainStarted,
    Forward,
    Hop,
    Join,
    LoadFailed,
    LoadHere,
    Refuse,
    Serve,
    Tick,
    Why,
)
from placement.records import CopyStatus, copy_key
from tests.placement.pods import Pod, held, peer, peers, route

# 5. Nobody has it


def test_5_here_if_this_pod_has_most_room(pod: Pod) -> None:
    pod.view.apply(peer("p2", used_bytes=9))
    assert route(pod) == LoadHere()


def test_5_on_the_pod_that_has(pod: Pod) -> None:
    pod.view.apply(peer("p2", capacity_bytes=100))
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_5_here_if_a_pod_chose_this_one(pod: Pod) -> None:
    pod.view.apply(peer("p2", capacity_bytes=100))
    pod.view.apply(held("p2", "a"))
    assert route(pod, "a", Hop.LOAD_HERE) == LoadHere()


def test_5_what_was_sent_counts_until_the_pod_speaks_again(pod: Pod) -> None:
    """kube-scheduler's assume: a burst is not sent to one pod because its record is late."""
    for model_id in "abc":
        pod.view.apply(held("gone", model_id, size_bytes=40, registration=1))
    pod.view.apply(peer("p2", capacity_bytes=100, revision=1))
    pod.view.apply(peer("p3", capacity_bytes=44, revision=2))
    assert route(pod, "a") == Forward("p2", Hop.LOAD_HERE)
    assert route(pod, "b") == Forward("p2", Hop.LOAD_HERE)
    pod.step(Tick())
    assert route(pod, "c") == Forward("p3", Hop.LOAD_HERE), "only 20 are left on p2"
    pod.view.apply(peer("p2", capacity_bytes=100, used_bytes=20, revision=3))
    assert route(pod, "c") == Forward("p2", Hop.LOAD_HERE), "what it says now replaces what was assumed"


def test_5_what_did_not_arrive_does_not_count(pod: Pod) -> None:
    pod.view.apply(held("gone", "a", size_bytes=40, registration=1))
    pod.view.apply(peer("p2", capacity_bytes=60, revision=1))
    assert route(pod, "a") == Forward("p2", Hop.LOAD_HERE)
    pod.engine.forward_started("p2")
    pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    pod.now_ms += pod.limits.suspect_ms
    pod.view.apply(peer("p3", capacity_bytes=45, used_bytes=5, revision=1))
    assert route(pod, "a") == Forward("p2", Hop.LOAD_HERE)


def test_5_suspects_are_left_out_until_they_answer_or_time_has_passed(pod: Pod) -> None:
    pod.view.apply(peer("p2", capacity_bytes=100))
    pod.engine.forward_started("p2")
    pod.engine.forward_started("p2")
    pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    assert route(pod) == LoadHere()
    pod.engine.forward_ended("p2", reached=True, now_ms=pod.now_ms)
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)
    pod.engine.forward_started("p2")
    pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    pod.now_ms += pod.limits.suspect_ms
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_5_a_suspect_that_was_started_anew_is_none(pod: Pod) -> None:
    pod.view.apply(peer("p2", capacity_bytes=100, created=3))
    pod.engine.forward_started("p2")
    pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    assert route(pod) == LoadHere()
    pod.view.apply(peer("p2", capacity_bytes=100, created=9))
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_5_a_failed_load_is_tried_elsewhere(pod: Pod) -> None:
    pod.want("a")
    pod.step(LoadFailed("a", "corrupt", False))
    peers(pod, "p2", "p3")
    pod.view.apply(held("p2", "a", CopyStatus.FAILED, error="corrupt"))
    assert route(pod) == Forward("p3", Hop.LOAD_HERE)


# 6. Or no pod can


@pytest.mark.parametrize("hop", Hop)
def test_6_unknown_model(pod: Pod, hop: Hop) -> None:
    assert route(pod, "nobody's", hop) == Refuse(Why.UNKNOWN_MODEL)


def test_6_asked_for_a_hit_this_pod_does_not_load(pod: Pod) -> None:
    assert route(pod, "a", Hop.HIT_ONLY) == Refuse(Why.NOT_HERE)
    pod.want("a")
    pod.step(LoadFailed("a", "corrupt", False))
    assert route(pod, "a", Hop.HIT_ONLY) == Refuse(Why.NOT_HERE)


@pytest.mark.parametrize(("retryable", "why"), [(False, Why.LOAD_FAILED), (True, Why.LOAD_FAILED_FOR_NOW)])
def test_6_asked_to_load_what_failed_here(pod: Pod, retryable: bool, why: Why) -> None:
    pod.want("a")
    pod.step(LoadFailed("a", "corrupt", retryable))
    assert route(pod, "a", Hop.LOAD_HERE) == Refuse(why, "corrupt")
    assert route(pod, "a") == Refuse(why, "pod p1: corrupt")


def test_6_a_load_that_failed_on_enough_pods(pod: Pod) -> None:
    """`load_tries` (ModelMesh: 3), whatever their number."""
    peers(pod, *(f"p{i}" for i in range(2, 9)))
    for number in (2, 3):
        pod.view.apply(held(f"p{number}", "a", CopyStatus.FAILED, error="corrupt"))
        assert isinstance(route(pod), LoadHere | Forward)
    pod.view.apply(held("p4", "a", CopyStatus.FAILED, error="busy", retryable=True))
    refusal = route(pod)
    assert refusal == Refuse(Why.LOAD_FAILED_FOR_NOW, "pod p2: corrupt; pod p3: corrupt; pod p4: busy")
    pod.view.remove(copy_key("p4", "a"))
    assert isinstance(route(pod), LoadHere | Forward)


def test_6_larger_than_any_pod(pod: Pod) -> None:
    pod.view.apply(held("gone", "a", size_bytes=21, registration=1))
    pod.view.apply(peer("p2", capacity_bytes=20))
    assert route(pod) == Refuse(Why.LOAD_FAILED, "needs 21 bytes; the largest pod holds 20 bytes")
    pod.view.apply(peer("p3", capacity_bytes=21))
    assert route(pod) == Forward("p3", Hop.LOAD_HERE)


def test_6_all_that_is_there_is_to_be_kept(pod: Pod) -> None:
    pod.view.apply(held("gone", "a", size_bytes=9, registration=1))
    pod.load("kept", 2)
    pod.view.apply(replace(pod.view.models["kept"], pinned=True, revision=2))
    for _ in range(3):
        pod.step(Tick())
    pod.view.apply(peer("p2", kept_bytes=2))
    refusal = Refuse(Why.NO_ROOM, "needs 9 bytes; copies that are to be kept leave no pod as many")
    assert route(pod) == refusal
    pod.view.apply(peer("p2", kept_bytes=1, revision=2))
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_6_every_pod_that_could_hold_it_was_tried(pod: Pod) -> None:
    peers(pod, "p2")
    refusal = route(pod, "a", Hop.CLIENT, "p1", "p2")
    assert refusal == Refuse(Why.NO_POD, "no pod that could hold it can be reached")


def test_6_draining(pod: Pod) -> None:
    pod.load("a")
    pod.want("b")
    pod.step(DrainStarted())
    assert pod.engine.pod_record().draining
    assert route(pod, "a") == Serve(pod.copy("a"))
    assert route(pod, "b", Hop.LOAD_HERE) == Join(pod.copy("b"))
    assert route(pod, "c", Hop.LOAD_HERE) == Refuse(Why.NOT_HERE)
    assert route(pod, "c") == Refuse(Why.NO_POD, "every pod is draining")
    peers(pod, "p2")
    assert route(pod, "c") == Forward("p2", Hop.LOAD_HERE)


@pytest.mark.parametrize("hop", [Hop.HIT_ONLY, Hop.LOAD_HERE])
def test_what_was_forwarded_is_never_forwarded_again(pod: Pod, hop: Hop) -> None:
    """Two hops at most (docs/ARCHITECTURE.md)."""
    pod.view.apply(peer("p2", capacity_bytes=100))
    pod.view.apply(peer("p3", capacity_bytes=100))
    pod.view.apply(held("p2", "b"))
    pod.view.apply(held("p3", "c", CopyStatus.LOADING))
    pod.want("d")
    pod.step(LoadFailed("d", "corrupt", False))
    for model_id in "abcd":
        assert not isinstance(route(pod, model_id, hop), Forward)
    pod.step(DrainStarted())
    for model_id in "abcd":
        assert not isinstance(route(pod, model_id, hop), Forward)
