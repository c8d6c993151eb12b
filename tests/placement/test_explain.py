"""What is said of a model: why it is loaded or not, and what each pod's verdict is (issue 4, item 5)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.explain import Explanation, explain
from placement.messages import LoadFailed
from placement.records import CopyStatus
from tests.placement.pods import Pod, held, model_record, peer, peers


def told(pod: Pod) -> Explanation:
    engine = pod.engine
    return explain(pod.view.models["a"], engine.peers, engine.copies_of("a"), pod.limits.load_tries, pod.now_ms)


def test_a_model_that_is_not_loaded_and_where_it_would_be(pod: Pod) -> None:
    peers(pod, "p2")
    pod.view.apply(peer("p3", capacity_bytes=100))
    found = told(pod)
    assert found.reasons == ("not loaded: the next request for it has it loaded on the first of these pods",)
    assert found.verdicts[0].pod_id == "p3"


@pytest.mark.parametrize(
    ("status", "reason", "against"),
    [
        (CopyStatus.LOADED, "loaded on p2", "has it loaded"),
        (CopyStatus.LOADING, "being loaded on p2", "is loading it"),
        (CopyStatus.FAILED, "its load failed on p2: corrupt", "its load failed there: corrupt"),
    ],
)
def test_a_copy_elsewhere(pod: Pod, status: CopyStatus, reason: str, against: str) -> None:
    peers(pod, "p2")
    pod.view.apply(held("p2", "a", status, error="corrupt" if status is CopyStatus.FAILED else ""))
    found = told(pod)
    assert reason in found.reasons
    assert (found.verdicts[-1].pod_id, found.verdicts[-1].reasons) == ("p2", (against,))


def test_how_busy_a_copy_keeps_its_pod(pod: Pod) -> None:
    peers(pod, "p2", "p3")
    pod.view.apply(held("p3", "a"))
    pod.view.apply(held("p2", "a", busy_percent=60))
    assert told(pod).reasons == ("loaded on p2 (60 % busy), p3",)


def test_this_pods_copy_is_told_as_it_is(pod: Pod) -> None:
    pod.load("a")
    assert told(pod).reasons == ("loaded on p1",)
    assert told(pod).verdicts[0].reasons == ("has it loaded",)


def test_what_stands_against_it(pod: Pod) -> None:
    pod.view.apply(replace(model_record("a"), requires="gpu=h200", min_copies=2))
    peers(pod, "p2")
    assert told(pod).reasons == (
        "not loaded: no pod has the labels gpu=h200, which it requires",
        "2 more copies are to be kept (min_copies 2); 0 pods can load one",
    )


def test_a_load_that_failed_too_often_and_one_too_large(pod: Pod) -> None:
    peers(pod, "p2", "p3", "p4")
    pod.want("a")
    pod.step(LoadFailed("a", "corrupt", False))
    pod.view.apply(held("p2", "a", CopyStatus.FAILED, error="corrupt"))
    pod.view.apply(held("p3", "a", CopyStatus.FAILED, error="corrupt"))
    assert told(pod).reasons[0].startswith("not loaded: its load failed on 3 pods")
    other = Pod()
    other.register("a")
    other.view.learn_size("a", 1, 11)
    assert told(other).reasons == ("not loaded: no pod can load it, see below",)
    assert told(other).verdicts[0].reasons == ("needs 11 bytes, holds 10",)


def test_a_pod_that_does_not_answer(pod: Pod) -> None:
    peers(pod, "p2")
    pod.engine.forward_started("p2")
    pod.engine.forward_ended("p2", reached=False, now_ms=pod.now_ms)
    assert told(pod).verdicts[-1].reasons == ("could not be reached",)
