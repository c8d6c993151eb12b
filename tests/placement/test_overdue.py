"""Loads that do not end in time (ModelMesh: loadTimeoutMs; a loader's thread cannot be ended): the copy has failed, its
slot is another's, and its bytes are taken until the loader answers."""

from __future__ import annotations

import pytest

from placement.lifecycle import CopyState
from placement.messages import CopyUnwanted, Forward, Hop, LoadFailed, Refuse, StartLoad, StartUnload, Tick, Why
from placement.records import CopyStatus
from tests.placement.pods import Pod, peers, route


@pytest.fixture
def pod() -> Pod:
    pod = Pod(load_slots=1)
    pod.register(*"abcd")
    return pod


def test_its_slot_is_anothers_and_its_bytes_are_its_own(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.queue("b", 6)
    pod.queue("c", 7)
    pod.now_ms += pod.limits.load_timeout_ms - 1
    pod.step(Tick())
    assert pod.state("a") is CopyState.LOADING
    waiter = pod.wait("a")
    pod.now_ms += 1
    actions = pod.step(Tick())
    assert [action.model.model_id for action in actions if isinstance(action, StartLoad)] == ["b"]
    assert waiter.woken
    assert (pod.published["a"].status, pod.published["a"].error) == (CopyStatus.FAILED, "not loaded after 90 s")
    assert pod.cache.free_bytes == 0
    assert pod.engine.stats.loads_overdue == 1
    pod.finish("b", 6)
    assert pod.state("c") is CopyState.QUEUED, "there are only 6 bytes that could be had for it"
    pod.check()


@pytest.mark.parametrize("size_bytes", [3, 4, 10])
def test_what_comes_late_serves_after_all(pod: Pod, size_bytes: int) -> None:
    """Or a model that takes longer than the limit would never be served, and loaded again and again."""
    pod.queue("a", 4)
    pod.expire()
    pod.now_ms += 1_000
    pod.finish("a", size_bytes)
    assert pod.state("a") is CopyState.LOADED
    assert (pod.published["a"].status, pod.published["a"].error) == (CopyStatus.LOADED, "")
    assert pod.cache.free_bytes == 10 - size_bytes
    assert pod.engine.copies.costs.reload_ms("a", None, size_bytes) > pod.limits.load_timeout_ms / 2
    pod.check()


def test_what_comes_late_and_has_no_room_goes(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.expire()
    pod.pin_loaded("b", 6)
    pod.finish("a", 5)
    pod.now_ms += pod.limits.room_patience_ms
    assert StartUnload("a") in pod.step(Tick())


def test_what_comes_late_for_a_removed_model_is_unloaded(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.expire()
    pod.view.remove("models/a")
    pod.step(CopyUnwanted("a"))
    assert StartUnload("a") in pod.finish("a", 4)
    pod.unload("a")
    assert pod.state("a") is CopyState.GONE


def test_a_failure_that_comes_late_is_a_failure(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.expire()
    pod.step(LoadFailed("a", "corrupt", False))
    assert pod.published["a"].error == "corrupt"
    assert pod.cache.free_bytes == 10


def test_requests_go_elsewhere_or_are_told(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.expire()
    assert route(pod) == Refuse(Why.LOAD_FAILED_FOR_NOW, "pod p1: not loaded after 90 s")
    assert route(pod, "a", Hop.LOAD_HERE) == Refuse(Why.LOAD_FAILED_FOR_NOW, "not loaded after 90 s")
    peers(pod, "p2")
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_another_model_of_that_name_is_not_waited_for(pod: Pod) -> None:
    pod.queue("a", 4)
    pod.expire()
    pod.register("a", created=2)
    pod.step(CopyUnwanted("a"))
    peers(pod, "p2")
    assert route(pod) == Forward("p2", Hop.LOAD_HERE)


def test_only_so_many_are_given_up(pod: Pod) -> None:
    """Each keeps a thread."""
    names = [f"m{number}" for number in range(pod.limits.max_overdue + 1)]
    pod.register(*names, "n")
    for name in names:
        pod.queue(name, 1)
        pod.expire()
    assert pod.cache.count(CopyState.OVERDUE) == pod.limits.max_overdue
    assert pod.state(names[-1]) is CopyState.LOADING
    pod.queue("n", 1)
    pod.finish(names[0], 1)
    pod.expire()
    assert pod.state("n") is CopyState.LOADING
