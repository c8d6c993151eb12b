"""The order of loads and of transfers on a link (issue 4, item 4): by class, by weighted shortest remaining time, and
without starving anybody."""

from __future__ import annotations

from itertools import count
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from placement.lifecycle import CopyState
from placement.link import OLDEST_EVERY, Transfer, next_transfer, turn_key
from placement.messages import CopyWanted, SizeEstimated
from placement.records import ModelRecord, Priority, TenantRecord
from tests.placement.pods import Pod

NAMES = st.text("abc", min_size=1, max_size=2)
TRANSFERS = st.lists(
    st.builds(
        Transfer,
        model_id=NAMES,
        since_ms=st.integers(0, 5),
        remaining=st.integers(1, 100),
        requests=st.integers(0, 9),
        priority=st.sampled_from(Priority),
        is_prefetch=st.booleans(),
    ),
    unique_by=lambda t: t.model_id,
    max_size=6,
)


def first(*transfers: Transfer, turn: int = 0) -> str | None:
    return next_transfer(transfers, turn)


# The order


def test_what_many_wait_for_and_little_is_left_of_goes_first() -> None:
    """Weighted SRPT: the order of remaining time over weight minimises the weighted sum of waiting times."""
    large, small = Transfer("large", 0, 900), Transfer("small", 0, 100)
    assert first(large, small) == "small"
    assert first(Transfer("large", 0, 900, requests=9), Transfer("small", 0, 100)) == "large"
    assert first(large, Transfer("begun", 0, 50)) == "begun"


def test_classes_come_before_sizes() -> None:
    high = Transfer("high", 0, 10_000, priority=Priority.HIGH)
    low = Transfer("low", 0, 1, requests=99, priority=Priority.LOW)
    assert first(low, Transfer("normal", 0, 100), high) == "high"
    assert first(low, Transfer("normal", 0, 100)) == "normal"


def test_nothing_waits() -> None:
    assert first() is None


@given(TRANSFERS, st.integers(0, 100))
def test_a_prefetch_moves_only_while_nothing_else_does(transfers: list[Transfer], turn: int) -> None:
    chosen = next((t for t in transfers if t.model_id == next_transfer(transfers, turn)), None)
    assert (chosen is None) == (not transfers)
    if chosen is not None and chosen.is_prefetch:
        assert all(t.is_prefetch for t in transfers)


@given(st.integers(0, 2**32), st.integers(0, 4))
def test_with_n_before_it_each_moves_within_so_many_turns(seed: int, older: int) -> None:
    """The bound, against an endless stream of whatever would go first."""
    rng = Random(seed)
    waiting = {f"older{n}": Transfer(f"older{n}", n, 10**9, priority=Priority.LOW) for n in range(older)}
    waiting["it"] = Transfer("it", older, 10**9, priority=Priority.LOW)
    start = rng.randrange(OLDEST_EVERY)
    for turn in count(start):
        assert turn - start < OLDEST_EVERY * (older + 1), "starved"
        waiting[f"new{turn}"] = Transfer(f"new{turn}", older + 1 + turn, 1, 9, Priority.HIGH)
        chosen = next_transfer(waiting.values(), turn)
        assert chosen is not None
        del waiting[chosen]
        if chosen == "it":
            break


# The load queue


def queued(pod: Pod, model_id: str, size_bytes: int = 1, pins: int = 0, **members: object) -> None:
    pod.view.apply(ModelRecord(model_id, "synthetic", f"/models/{model_id}", revision=1, created=1, **members))  # type: ignore[arg-type]
    pod.queue(model_id, size_bytes)
    for _ in range(pins):
        pod.pinned(model_id)


def busy_pod() -> Pod:
    """One slot, taken by `x`; sizes tell in load times (`costs`: 100 MB take longer than 1)."""
    pod = Pod(10**10, load_slots=1)
    pod.register("x")
    pod.queue("x", 1)
    return pod


def order(pod: Pod) -> list[str]:
    """Let one load after the other end; which began when."""
    begun = []
    while pod.loading:
        (model_id,) = pod.loading
        begun.append(model_id)
        pod.finish(model_id, pod.copy(model_id).size_bytes)
    return begun[1:]


MB = 10**6


def test_the_queue_is_by_load_time_and_requests_that_wait() -> None:
    pod = busy_pod()
    queued(pod, "large", 500 * MB)
    queued(pod, "wanted", 500 * MB, pins=20)
    queued(pod, "small", 50 * MB)
    assert order(pod) == ["wanted", "small", "large"]


def test_a_join_counts_and_so_does_a_leave() -> None:
    pod = busy_pod()
    queued(pod, "a", 100 * MB, pins=2)
    queued(pod, "b", 100 * MB, pins=1)
    for _ in range(2):
        pod.pinned("b")
    assert min(("a", "b"), key=lambda m: turn_key(pod.copy(m))) == "b"
    for _ in range(2):
        pod.unpin(pod.copy("b"))
    assert order(pod) == ["a", "b"]


def test_priority_is_the_models_or_that_of_a_request_if_higher() -> None:
    pod = busy_pod()
    queued(pod, "low", priority=Priority.LOW)
    queued(pod, "raised", priority=Priority.LOW)
    queued(pod, "normal")
    queued(pod, "high", 500 * MB, priority=Priority.HIGH)
    pod.engine.join(pod.copy("raised"), Priority.HIGH)
    pod.engine.join(pod.copy("high"), Priority.LOW)
    assert order(pod) == ["raised", "high", "normal", "low"]


def test_prefetches_come_last_until_somebody_asks() -> None:
    pod = busy_pod()
    for model_id in ("ahead", "asked", "later"):
        pod.register(model_id)
        pod.step(CopyWanted(model_id, pod.now_ms, is_prefetch=model_id != "later"))
        pod.step(SizeEstimated(model_id, 1 if model_id == "ahead" else 100 * MB))
    pod.step(CopyWanted("ahead", pod.now_ms, is_prefetch=True))
    pod.step(CopyWanted("asked", pod.now_ms))
    assert order(pod) == ["asked", "later", "ahead"]


def test_a_prefetch_takes_no_room_that_a_request_waits_for() -> None:
    pod = Pod(10)
    pod.register("a", "b", "c")
    held = pod.pin_loaded("a", 6)
    pod.queue("b", 6)
    pod.step(CopyWanted("c", pod.now_ms, is_prefetch=True))
    pod.step(SizeEstimated("c", 3))
    assert pod.state("c") is CopyState.QUEUED
    pod.unpin(held)
    pod.unload("a")
    assert set(pod.loading) == {"b", "c"}


@given(st.integers(0, 3))
def test_no_load_is_starved(older: int) -> None:
    """However many smaller ones come after it, also if they are another tenant's with all the weight."""
    pod = busy_pod()
    pod.view.apply(TenantRecord("storm", weight=1_000))
    for n in range(older):
        queued(pod, f"older{n}", 900 * MB)
        pod.now_ms += 1
    queued(pod, "it", 900 * MB)
    for loads in count(1):
        pod.now_ms += 1
        queued(pod, f"new{loads}", 1, pins=1, tenant="storm", priority=Priority.HIGH)
        (model_id,) = pod.loading
        pod.finish(model_id, pod.copy(model_id).size_bytes)
        assert loads <= OLDEST_EVERY * (older + 1)
        if "it" in pod.loading:
            break


def test_what_is_queued_and_under_way_is_told_as_time() -> None:
    pod = busy_pod()
    assert pod.engine.pod_record().queue_ms == pod.copy("x").load_ms > 0
    queued(pod, "a", 100 * MB)
    expected_ms = pod.copy("x").load_ms + pod.copy("a").load_ms
    assert pod.engine.pod_record().queue_ms == expected_ms
    order(pod)
    assert pod.engine.pod_record().queue_ms == 0
