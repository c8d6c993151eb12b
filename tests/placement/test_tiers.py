"""Host memory and disk below the device (decision 7): what lies where, in which order transfers wait, and what
they are told. Scenarios `tiers_*` show whole stories."""

from __future__ import annotations

from typing import Any

import pytest

from placement.lifecycle import CopyState, IllegalMove
from placement.limits import HostMode
from placement.messages import (
    Action,
    CopyUnwanted,
    Demote,
    Demoted,
    DropHeld,
    EstimateSize,
    HeldDropped,
    HeldLost,
    LoadFailed,
    LoadFinished,
    MemoryShort,
    StartLoad,
    StartUnload,
    Tick,
    UnloadFinished,
    Unpublish,
)
from placement.records import CopyRecord, CopyStatus, Tier
from tests.placement.pods import START_MS, demoted, model_record, pod_with, where

DEVICE, HOST, DISK = Tier


# What is there


def test_without_capacity_there_is_no_lower_tier() -> None:
    pod = pod_with()
    pod.load("a", 10)
    assert pod.step(CopyUnwanted("a"))[-1] == StartUnload("a")
    record = pod.engine.pod_record()
    assert (record.host_free_bytes, record.disk_free_bytes) == (0, 0)


def test_the_pods_record_tells_what_lower_tiers_could_take() -> None:
    pod = pod_with(host_bytes=20, disk_bytes=30)
    pod.load("a", 4)
    pod.step(CopyUnwanted("a"))
    record = pod.engine.pod_record()
    assert (record.host_free_bytes, record.disk_free_bytes) == (16, 26), "promised bytes are not free"


def test_what_lies_there_is_published_with_its_nearest_tier() -> None:
    pod = pod_with(host_bytes=20, disk_bytes=30)
    demoted(pod, "a", 4)
    held = CopyRecord("a", "p1", CopyStatus.HELD, START_MS, 4, registration=1, tier=HOST, used_ms=START_MS)
    assert pod.published["a"] == held
    pod.queue("b", 10)
    assert pod.published["a"] == held, "the device's room is another matter"


def test_bytes_moved_are_counted_by_where_from_and_where_to() -> None:
    pod = pod_with(host_bytes=20, disk_bytes=30)
    demoted(pod, "a", 4)
    pod.want("a")
    pod.finish("a", 4)
    assert pod.engine.stats.moved_bytes == {
        (None, DEVICE): 4,
        (None, DISK): 4,
        (DEVICE, HOST): 4,
        (HOST, DEVICE): 4,
    }


# Loads


@pytest.mark.parametrize(
    ("tiers", "first", "again"),
    [
        ({"disk_bytes": 9}, {DISK: 4}, (DISK, {})),
        ({"host_bytes": 9}, {}, (HOST, {})),
        ({"host_bytes": 9, "disk_bytes": 9}, {DISK: 4}, (HOST, {})),
        ({"host_bytes": 9, "host_mode": HostMode.INCLUSIVE}, {HOST: 4}, (HOST, {})),
        ({"host_bytes": 9, "disk_bytes": 9, "host_mode": HostMode.INCLUSIVE}, {HOST: 4, DISK: 4}, (HOST, {})),
    ],
)
def test_what_loads_leave_and_where_they_read(
    tiers: dict[str, Any], first: dict[Tier, int], again: tuple[Tier, dict[Tier, int]]
) -> None:
    pod = pod_with(**tiers)
    assert pod.queue("a", 4) == [StartLoad(model_record("a"), None, first)]
    pod.finish("a", 4)
    pod.give_up("a")
    assert pod.want("a")[-1] == StartLoad(model_record("a"), *again)


def test_an_inclusive_host_is_filled_from_disk_as_well() -> None:
    pod = pod_with(host_bytes=4, disk_bytes=20, host_mode=HostMode.INCLUSIVE)
    demoted(pod, "a", 4)
    pod.queue("b", 4)
    pod.dropped("a", HOST)
    pod.finish("b", 4)
    assert (where(pod, "a"), where(pod, "b")) == ([DISK], [HOST, DISK])
    pod.want("a")
    pod.dropped("b", HOST)
    assert pod.below.reading["a"] == StartLoad(model_record("a"), DISK, {HOST: 4})


def test_what_lies_in_a_lower_tier_needs_no_estimate() -> None:
    pod = pod_with(host_bytes=20)
    demoted(pod, "a", 4)
    actions = pod.want("a")
    assert not any(isinstance(action, EstimateSize) for action in actions)
    assert pod.state("a") is CopyState.LOADING
    assert pod.cache.bytes_in(CopyState.LOADING) == 4


def test_a_load_does_not_lose_what_it_reads_to_what_makes_way_for_it() -> None:
    """The host is full of it, and the device's copy would be copied down in its place."""
    pod = pod_with(4, host_bytes=4)
    demoted(pod, "a", 4)
    pod.load("b", 4)
    assert pod.want("a")[-1] == StartUnload("b"), "there is no room for b but a's"
    pod.unload("b")
    assert pod.below.reading["a"].source is HOST
    assert pod.finish("a", 4)[0] == DropHeld("a", HOST)


def test_what_a_queued_load_will_read_stays() -> None:
    pod = pod_with(4, host_bytes=4)
    demoted(pod, "a", 4)
    pod.pin_loaded("b", 4)
    pod.want("a")
    assert pod.state("a") is CopyState.QUEUED
    pod.step(CopyUnwanted("b"))
    pod.unpin(pod.copy("b"))
    assert where(pod, "a") == [HOST]
    assert "b" not in pod.below.keeping


def test_books_are_corrected_to_what_was_kept() -> None:
    pod = pod_with(disk_bytes=9)
    pod.queue("a", 4)
    pod.step(LoadFinished("a", 4, {DISK: 3}))
    assert pod.engine.copies.lower[DISK].resident_bytes == 3


@pytest.mark.parametrize("kept", [{DISK: 5}, {HOST: 4}])
def test_keeping_more_than_was_promised_or_elsewhere_is_a_bug(kept: dict[Tier, int]) -> None:
    pod = pod_with(disk_bytes=9, host_bytes=9)
    pod.queue("a", 4)
    with pytest.raises(IllegalMove):
        pod.engine.step(LoadFinished("a", 4, kept), pod.now_ms)


def test_a_failure_that_may_pass_is_not_the_bytes_fault() -> None:
    pod = pod_with(host_bytes=9)
    demoted(pod, "a", 4)
    pod.want("a")
    pod.step(LoadFailed("a", "out of memory", True))
    assert where(pod, "a") == [HOST]
    pod.now_ms += pod.limits.retryable_expiry_ms
    pod.step(Tick())
    assert pod.published["a"].status is CopyStatus.HELD


# What is given up


def test_a_model_larger_than_a_tier_is_not_kept_there() -> None:
    pod = pod_with(host_bytes=3, disk_bytes=5)
    demoted(pod, "a", 4)
    assert where(pod, "a") == [DISK]


def test_a_copy_down_starts_when_its_room_is_free() -> None:
    """Bytes are free only when a drop has finished, as on the device."""
    pod = pod_with(4, host_bytes=4)
    demoted(pod, "a", 4)
    pod.load("b", 4)
    pod.queue("c", 4)
    assert pod.below.dropping == {("a", HOST)}
    assert not pod.unloading
    assert pod.dropped("a", HOST) == [StartUnload("b", HOST)]
    assert pod.unload("b")[-1] == StartLoad(model_record("c"))


def test_what_the_host_gives_up_goes_to_disk_unless_it_lies_there() -> None:
    pod = pod_with(4, host_bytes=4, disk_bytes=8)
    pod.queue("a", 4)
    pod.finish("a", 4, keeps=False)  # the disk was full, say
    pod.give_up("a")
    pod.load("b", 4)
    pod.step(CopyUnwanted("b"))
    assert pod.below.demoting == {"a": Demote("a", HOST, DISK)}


def test_what_is_copied_down_may_fail_and_is_gone() -> None:
    pod = pod_with(4, host_bytes=4, disk_bytes=8)
    pod.queue("a", 4)
    pod.finish("a", 4, keeps=False)
    pod.give_up("a")
    pod.load("b", 4)
    pod.step(CopyUnwanted("b"))
    assert pod.demote("a", keeps=False) == [DropHeld("a", HOST)]
    pod.dropped("a", HOST)
    assert where(pod, "a") == []
    assert "a" not in pod.published


def test_what_was_given_up_by_request_stays_below_what_was_removed_does_not() -> None:
    pod = pod_with(host_bytes=9)
    demoted(pod, "a", 4)
    pod.step(CopyUnwanted("a"))
    assert where(pod, "a") == [HOST]
    pod.view.remove("models/a")
    assert pod.step(CopyUnwanted("a")) == [Unpublish("a"), DropHeld("a", HOST)]
    pod.dropped("a", HOST)
    assert where(pod, "a") == []


@pytest.mark.parametrize("when", ["promised", "demoting"])
def test_a_model_removed_on_its_way_to_disk(when: str) -> None:
    pod = pod_with(4, host_bytes=4, disk_bytes=4)
    pod.queue("a", 4)
    pod.finish("a", 4, keeps=False)
    pod.give_up("a")
    pod.load("b", 4)  # leaves a copy on disk, which a's will need
    pod.step(CopyUnwanted("b"))
    if when == "demoting":
        pod.dropped("b", DISK)
    pod.view.remove("models/a")
    pod.step(CopyUnwanted("a"))
    pod.settle()
    assert where(pod, "a") == []
    assert where(pod, "b") == [HOST]


@pytest.mark.parametrize(
    "event", [UnloadFinished("a", kept=True), Demoted("a", DISK, True), HeldDropped("a", DISK)], ids=repr
)
def test_answers_to_what_nobody_asked_are_bugs(event: Any) -> None:
    pod = pod_with(disk_bytes=9)
    pod.load("a", 4)
    pod.step(CopyUnwanted("a"))
    with pytest.raises((IllegalMove, KeyError)):
        pod.engine.step(event, pod.now_ms)


def test_what_is_given_up_before_its_size_is_settled_is_not_kept() -> None:
    """Room below is promised by the books, which do not have its true size yet."""
    pod = pod_with(host_bytes=9)
    held = pod.pin_loaded("x", 6)
    pod.queue("a", 4)
    pod.finish("a", 5)
    assert pod.state("a") is CopyState.SIZING
    assert pod.step(CopyUnwanted("a"))[-1] == StartUnload("a")
    pod.unpin(held)


def test_what_a_tier_has_lost_is_not_told_any_more() -> None:
    pod = pod_with(disk_bytes=9)
    pod.load("a", 4)
    pod.give_up("a")
    pod.below.held[DISK].pop("a")
    assert pod.step(HeldLost("a", DISK)) == [Unpublish("a")]
    assert pod.step(HeldLost("a", DISK)) == [], "it is known by now"
    assert pod.engine.pod_record().disk_free_bytes == 9
    pod.want("a")
    assert pod.estimating, "its load starts from the store"
    pod.settle()


def test_what_a_load_reads_is_not_lost_until_that_has_ended() -> None:
    pod = pod_with(disk_bytes=9)
    pod.load("a", 4)
    pod.give_up("a")
    pod.want("a")
    assert pod.step(HeldLost("a", DISK)) == []
    pod.settle()


def test_the_coldest_go_where_memory_is_short_but_not_who_asks() -> None:
    pod = pod_with(12)
    for at, model_id in enumerate("abc"):
        pod.load(model_id, 4, START_MS + at)
    assert pod.step(MemoryShort("a", 5))[-1] == StartUnload("c")
    assert [pod.state(model_id) for model_id in "abc"] == [CopyState.LOADED, CopyState.UNLOADING, CopyState.UNLOADING]
    pod.settle()


# What an earlier process has left


def test_what_is_found_on_disk_at_the_start_is_taken_up() -> None:
    pod = pod_with(disk_bytes=9)
    pod.below.held[DISK]["a"] = (1, 4)
    actions: list[Action] = []
    assert pod.engine.copies.adopt("a", 1, DISK, 4, pod.now_ms, actions)
    pod.carry_out(actions)
    assert pod.published["a"].tier is DISK
    pod.want("a")
    assert pod.below.reading["a"].source is DISK


@pytest.mark.parametrize(
    ("model_id", "registration", "size_bytes"),
    [("a", 2, 4), ("unregistered", 1, 4), ("a", 1, 6), ("b", 1, 1)],
    ids=["registered anew", "removed", "no room", "there already"],
)
def test_what_is_of_no_use_is_not(model_id: str, registration: int, size_bytes: int) -> None:
    pod = pod_with(disk_bytes=9)
    pod.load("b", 4)
    actions: list[Action] = []
    assert not pod.engine.copies.adopt(model_id, registration, DISK, size_bytes, pod.now_ms, actions)
    assert not actions
    pod.check()
