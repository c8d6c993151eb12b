"""A copy's way in and out: room for it, what it is measured to be, its failures (issue 2, part 4)."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from placement.cache import Copy
from placement.lifecycle import CopyState
from placement.messages import (
    CopyUnwanted,
    EstimateSize,
    LoadFailed,
    Publish,
    SizeEstimated,
    StartLoad,
    StartUnload,
    Tick,
    UnloadFinished,
    Unpublish,
    Wake,
)
from placement.records import CopyRecord, CopyStatus
from tests.placement.pods import START_MS, Pod, model_record


@pytest.fixture
def pod() -> Pod:
    pod = Pod()
    pod.register(*"abcdef")
    return pod


# The way of a copy, and its words


def test_the_whole_way(pod: Pod) -> None:
    loading = CopyRecord("a", "p1", CopyStatus.LOADING, START_MS, registration=1)
    assert pod.want("a") == [Publish(loading), EstimateSize(model_record("a"))]
    assert pod.step(SizeEstimated("a", 4)) == [StartLoad(model_record("a"))]
    loaded = CopyRecord("a", "p1", CopyStatus.LOADED, START_MS, 5, registration=1, used_ms=START_MS)
    assert pod.finish("a", 5) == [Publish(loaded), Wake("a")]
    assert pod.step(CopyUnwanted("a")) == [Unpublish("a"), Wake("a"), StartUnload("a")]
    assert pod.step(UnloadFinished("a")) == [Wake("a")]
    assert not pod.cache.copies
    stats = pod.engine.stats
    assert (stats.loads_finished, stats.loads_failed, stats.evictions) == (1, 0, 0)


def test_a_copy_is_not_evicted_while_pinned_and_its_last_release_makes_room(pod: Pod) -> None:
    copy = pod.load("a", 8)
    pod.engine.pin(copy)
    pod.engine.pin(copy)
    pod.queue("b", 5)
    assert pod.state("b") is CopyState.QUEUED
    assert not pod.unpin(copy)
    assert pod.unpin(copy) == [Unpublish("a"), Wake("a"), StartUnload("a")]
    assert pod.engine.stats.evictions == 1


def test_unpinning_what_nobody_pinned_is_a_bug(pod: Pod) -> None:
    copy = pod.load("a")
    with pytest.raises(AssertionError):
        pod.unpin(copy)


def test_who_waits_may_go_without_harm_in_any_state(pod: Pod) -> None:
    """A request's deadline ends while its copy is on the way: the copy goes on without it."""
    pod.want("a")
    copy = pod.copy("a")
    for advance in (lambda: None, lambda: pod.step(SizeEstimated("a", 1)), lambda: pod.finish("a", 1)):
        pod.engine.pin(copy)
        advance()
        assert not pod.unpin(copy)
    assert pod.state("a") is CopyState.LOADED


def test_what_was_measured_is_promised_the_next_time(pod: Pod) -> None:
    pod.queue("a", 2)
    pod.finish("a", 7)
    pod.give_up("a")
    pod.queue("a", 2)
    assert pod.cache.bytes_in(CopyState.LOADING) == 7


# Room


def test_copies_that_need_more_than_pins_leave_are_overtaken(pod: Pod) -> None:
    pod.pin_loaded("a", 6)
    for model_id, size_bytes in [("b", 6), ("c", 5), ("d", 5), ("e", 3), ("f", 3)]:
        pod.queue(model_id, size_bytes)
    assert set(pod.loading) == {"e"}
    pod.finish("e", 3)
    assert pod.unloading == {"e"}, "the only one that may go"
    assert pod.state("f") is CopyState.WAITING


def test_the_queue_is_in_order_of_arrival_not_of_estimates() -> None:
    pod = Pod(load_slots=1)
    pod.register(*"abc")
    for model_id in "abc":
        pod.want(model_id)
    pod.step(SizeEstimated("c", 1))
    pod.step(SizeEstimated("b", 1))
    pod.step(SizeEstimated("a", 1))
    assert set(pod.loading) == {"c"}
    pod.finish("c", 1)
    assert set(pod.loading) == {"a"}


def test_a_queue_that_finds_no_room_is_not_searched_copy_by_copy(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as large as one that found no room finds none either: one look at the eviction order, not one each."""
    held = pod.pin_loaded("a", 10)
    for number in range(200):
        pod.register(f"m{number}")
        pod.queue(f"m{number}", 5 + number % 2)
    looks: list[int] = []
    evictable = pod.cache.evictable

    def counted(now_ms: int) -> Generator[Copy, None, None]:
        looks.append(now_ms)
        return evictable(now_ms)

    monkeypatch.setattr(pod.cache, "evictable", counted)
    pod.step(Tick())
    assert looks == [pod.now_ms]
    pod.unpin(held)
    assert pod.state("m0") is CopyState.WAITING


def test_a_model_of_no_bytes(pod: Pod) -> None:
    pod.load("a", 0)
    pod.load("b", 10)
    pod.load("c", 0)
    assert pod.cache.count(CopyState.LOADED) == 3


def test_a_model_that_fills_the_pod(pod: Pod) -> None:
    for model_id in "abc":
        pod.load(model_id, 3)
    pod.queue("d", 10)
    assert pod.unloading == {"a", "b", "c"}
    for model_id in "abc":
        assert not pod.loading
        pod.step(UnloadFinished(model_id))
    assert set(pod.loading) == {"d"}


# Larger than estimated


def test_nothing_starts_while_more_is_in_memory_than_the_books_say(pod: Pod) -> None:
    """Estimates promised 5 + 5; 7 are there. To load the other 5 on top would exceed the pod's memory."""
    pod.load("x", 5)
    pod.queue("a", 5)
    pod.queue("b", 5)
    assert pod.state("b") is CopyState.WAITING
    pod.finish("a", 7)
    pod.step(UnloadFinished("x"))
    assert not pod.loading
    pod.now_ms += pod.limits.room_patience_ms
    pod.step(Tick())
    assert pod.unloading == {"a"}
    assert not pod.loading
    pod.step(UnloadFinished("a"))
    assert set(pod.loading) == {"b"}


def test_a_copy_too_large_for_what_pins_leave_waits_then_gives_way(pod: Pod) -> None:
    held = pod.pin_loaded("x", 6)
    pod.queue("a", 4)
    pod.finish("a", 5)
    pod.now_ms += pod.limits.room_patience_ms - 1
    pod.step(Tick())
    assert pod.state("a") is CopyState.SIZING
    pod.now_ms += 1
    pod.step(Tick())
    assert pod.unloading == {"a"}
    pod.step(UnloadFinished("a"))
    assert pod.published["a"].status is CopyStatus.FAILED
    assert pod.published["a"].retryable
    assert "loaded as 5 bytes instead of 4" in pod.published["a"].error
    pod.unpin(held)


def test_a_copy_too_large_for_what_pins_leave_settles_when_they_go(pod: Pod) -> None:
    held = pod.pin_loaded("x", 6)
    pod.queue("a", 4)
    pod.finish("a", 5)
    pod.unpin(held)
    pod.step(UnloadFinished("x"))
    assert pod.state("a") is CopyState.LOADED


@pytest.mark.parametrize("order", ["bc", "cb"])
def test_loads_that_turn_out_larger_do_not_wait_for_each_other_for_good(pod: Pod, order: str) -> None:
    """With a small loaded copy beside them that could go but does not suffice (a dead-lock, once)."""
    pod.load("a", 1)
    pod.queue("b", 4)
    pod.queue("c", 4)
    for model_id in order:
        pod.finish(model_id, 7)
    assert pod.cache.count(CopyState.SIZING) == 2
    pod.now_ms += pod.limits.room_patience_ms
    pod.step(Tick())
    pod.step(UnloadFinished(order[0]))
    assert pod.state(order[1]) is CopyState.LOADED


def test_one_that_turns_out_smaller_makes_room_for_one_that_waits(pod: Pod) -> None:
    pod.queue("a", 5)
    pod.queue("b", 5)
    pod.finish("a", 6)
    pod.now_ms += pod.limits.room_patience_ms
    pod.finish("b", 3)
    assert pod.state("a") is pod.state("b") is CopyState.LOADED


def test_measured_larger_than_the_pod(pod: Pod) -> None:
    pod.queue("a", 5)
    copy = pod.pinned("a")
    assert pod.finish("a", 11) == [Unpublish("a"), Wake("a")]
    assert pod.unpin(copy) == [StartUnload("a")]
    pod.step(UnloadFinished("a"))
    assert pod.published["a"].error == "needs 11 bytes; this pod holds 10 bytes"
    assert not pod.published["a"].retryable


def test_a_copy_given_up_as_too_large_is_not_wanted_again_by_itself(pod: Pod) -> None:
    """Wanted while it unloads: the failure is told to who waits, and nothing comes back when it expires."""
    pod.queue("a", 5)
    pod.finish("a", 11)
    pod.want("a")
    pod.step(UnloadFinished("a"))
    assert pod.state("a") is CopyState.FAILED
    pod.now_ms += pod.limits.failure_expiry_ms
    pod.step(Tick())
    assert not pod.cache.copies


# Failures


@pytest.mark.parametrize("when", ["estimate", "load"])
@pytest.mark.parametrize(("retryable", "expiry_ms"), [(False, 60_000), (True, 5_000)])
def test_a_failure_is_told_remembered_and_forgotten(pod: Pod, when: str, retryable: bool, expiry_ms: int) -> None:
    pod.want("a")
    if when == "load":
        pod.step(SizeEstimated("a", 4))
    failed = CopyRecord("a", "p1", CopyStatus.FAILED, START_MS, 0, "corrupt", retryable, registration=1)
    assert pod.step(LoadFailed("a", "corrupt", retryable)) == [Publish(failed), Wake("a")]
    assert pod.cache.committed_bytes == 0
    pod.now_ms += expiry_ms - 1
    assert not pod.step(Tick())
    pod.now_ms += 1
    assert pod.step(Tick()) == [Unpublish("a"), Wake("a")]
    assert pod.state("a") is CopyState.GONE
    assert pod.engine.stats.loads_failed == 1


def test_wanting_a_failed_copy_does_not_load_it_before_its_expiry(pod: Pod) -> None:
    pod.want("a")
    pod.step(LoadFailed("a", "corrupt", False))
    assert not pod.want("a")
    assert pod.state("a") is CopyState.FAILED
