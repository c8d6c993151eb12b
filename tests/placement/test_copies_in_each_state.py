"""A model removed, registered anew, or answered for without having been asked, in each state of its copy (issue 2,
part 4: races of registration and removal)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from placement.lifecycle import CopyState, IllegalMove
from placement.messages import (
    CopyUnwanted,
    CopyWanted,
    LoadFailed,
    LoadFinished,
    SizeEstimated,
    StartUnload,
    UnloadFinished,
    Unpublish,
    Wake,
)
from tests.placement.pods import START_MS, Pod, model_record


@pytest.fixture
def pod() -> Pod:
    pod = Pod()
    pod.register(*"ab")
    return pod


def _queued(pod: Pod) -> None:
    pod.want("a")


def _estimated(pod: Pod) -> None:
    pod.pin_loaded("x", 10)
    pod.queue("a", 2)


def _waiting(pod: Pod) -> None:
    pod.load("x", 10)
    pod.queue("a", 2)


def _loading(pod: Pod) -> None:
    pod.queue("a", 2)


def _sizing(pod: Pod) -> None:
    pod.pin_loaded("x", 8)
    pod.queue("a", 2)
    pod.finish("a", 3)


def _loaded(pod: Pod) -> None:
    pod.load("a", 2)


def _unloading(pod: Pod) -> None:
    pod.load("a", 2)
    pod.step(CopyUnwanted("a"))


def _given_up(pod: Pod) -> None:
    pod.queue("a", 2)
    pod.finish("a", 11)


def _overdue(pod: Pod) -> None:
    pod.queue("a", 2)
    pod.expire()


def _failed(pod: Pod) -> None:
    pod.queue("a", 2)
    pod.step(LoadFailed("a", "corrupt", False))


_STATES = [
    (_queued, CopyState.QUEUED, True),
    (_estimated, CopyState.QUEUED, False),
    (_waiting, CopyState.WAITING, False),
    (_loading, CopyState.LOADING, True),
    (_sizing, CopyState.SIZING, True),
    (_loaded, CopyState.LOADED, True),
    (_unloading, CopyState.UNLOADING, True),
    (_given_up, CopyState.UNLOADING, True),
    (_overdue, CopyState.OVERDUE, True),
    (_failed, CopyState.FAILED, False),
]
"""How a copy gets there, and whether something must end before it is gone."""


@pytest.mark.parametrize(("bring", "state", "busy"), _STATES)
def test_removed(pod: Pod, bring: Callable[[Pod], None], state: CopyState, busy: bool) -> None:
    """Others do not hear of the copy any more, who waits is woken, and it goes as soon as nobody is at work on it."""
    bring(pod)
    assert pod.state("a") is state
    waiter = pod.wait("a")
    pod.view.remove("models/a")
    pod.step(CopyUnwanted("a"))
    assert "a" not in pod.published
    assert waiter.woken or state is CopyState.UNLOADING, "who waits for an unload is woken when it ends"
    assert (pod.state("a") is not CopyState.GONE) is busy
    pod.step(CopyUnwanted("a"))  # again: a resumed watch repeats itself
    pod.settle()
    assert pod.state("a") is CopyState.GONE
    assert waiter.woken
    assert "a" not in pod.memory


@pytest.mark.parametrize(("bring", "state", "busy"), _STATES)
@pytest.mark.parametrize("wanted_at_once", [True, False])
def test_registered_anew(
    pod: Pod, bring: Callable[[Pod], None], state: CopyState, busy: bool, wanted_at_once: bool
) -> None:
    """No copy of the old contents serves; the new are loaded from the new record when the old are out of memory."""
    bring(pod)
    assert pod.view.apply(model_record("a", created=2)) == "a"
    pod.step(CopyUnwanted("a"))
    if wanted_at_once:
        pod.want("a")
        assert (pod.estimating.get("a") == model_record("a", 2)) is not busy
    pod.settle()
    pod.want("a")
    assert pod.copy("a").model.created == 2
    pod.settle()
    assert pod.state("a") is CopyState.LOADED


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("bring", [_queued, _loading])
def test_a_doomed_copys_answer_is_not_the_new_registrations(
    pod: Pod, bring: Callable[[Pod], None], fails: bool
) -> None:
    bring(pod)
    pod.view.apply(model_record("a", created=2))
    pod.step(CopyUnwanted("a"))
    if fails:
        pod.step(LoadFailed("a", "corrupt", False))
        assert pod.state("a") is CopyState.GONE, "the failure was the old contents'"
    else:
        pod.settle()
    assert pod.view.measured("a") is None, "and so was the size"
    assert "a" not in pod.published


def test_a_pinned_copy_of_a_removed_model_is_unloaded_when_its_request_ends(pod: Pod) -> None:
    copy = pod.pin_loaded("a", 4)
    assert pod.step(CopyUnwanted("a")) == [Unpublish("a"), Wake("a")]
    assert pod.cache.free_bytes == 6
    assert pod.unpin(copy) == [StartUnload("a")]


def test_room_promised_to_a_removed_model_goes_to_the_next(pod: Pod) -> None:
    pod.load("x", 10)
    pod.queue("a", 8)
    pod.queue("b", 8)
    pod.step(CopyUnwanted("a"))
    assert pod.state("b") is CopyState.WAITING


def test_giving_up_what_is_not_here_is_fine(pod: Pod) -> None:
    assert not pod.step(CopyUnwanted("a"))


# Events that fit no copy's state are bugs of the caller


@pytest.mark.parametrize("event", [SizeEstimated("a", 1), LoadFinished("a", 1), UnloadFinished("a")])
def test_an_answer_for_a_copy_that_is_not_there(pod: Pod, event: SizeEstimated | LoadFinished | UnloadFinished) -> None:
    with pytest.raises(KeyError):
        pod.engine.step(event, START_MS)


def test_wanting_what_is_not_registered(pod: Pod) -> None:
    with pytest.raises(KeyError):
        pod.engine.step(CopyWanted("nobody's", START_MS), START_MS)


_EVENTS = [SizeEstimated("a", 1), LoadFinished("a", 1), LoadFailed("a", "x", False), UnloadFinished("a")]
_EXPECTED: dict[Callable[[Pod], None], set[type]] = {
    _queued: {SizeEstimated, LoadFailed},
    _loading: {LoadFinished, LoadFailed},
    _overdue: {LoadFinished, LoadFailed},
    _unloading: {UnloadFinished},
    _given_up: {UnloadFinished},
}


@pytest.mark.parametrize(
    ("bring", "event"), [(b, e) for b, _, _ in _STATES for e in _EVENTS if type(e) not in _EXPECTED.get(b, set())]
)
def test_an_answer_to_what_was_not_asked(
    pod: Pod, bring: Callable[[Pod], None], event: SizeEstimated | LoadFinished | LoadFailed | UnloadFinished
) -> None:
    bring(pod)
    before = (repr(pod.engine), repr(pod.copy("a")), repr(pod.engine.stats))
    with pytest.raises(IllegalMove):
        pod.engine.step(event, START_MS)
    assert (repr(pod.engine), repr(pod.copy("a")), repr(pod.engine.stats)) == before
    pod.check()


def test_an_unload_that_waits_for_a_request_cannot_have_finished(pod: Pod) -> None:
    pod.pin_loaded("a", 4)
    pod.step(CopyUnwanted("a"))
    with pytest.raises(IllegalMove):
        pod.engine.step(UnloadFinished("a"), START_MS)
