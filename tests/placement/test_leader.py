"""Who finishes the transitions of vmodels, and how (as in ModelMesh: a vmodel's target takes over when it is
loaded; a failed one blocks, and the active model goes on serving), and on as many pods as model-mesh.proto promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import leader
from placement.leader import MATCH_MS, leader_of
from placement.messages import Action, DrainStarted, EnsureLoaded, LoadOn, SettleVModel, Tick
from placement.records import CopyStatus, VModelRecord
from placement.view import ClusterView
from tests.placement.pods import Pod, held, model_record, peer

_MOVING = VModelRecord("v", "old", "new", revision=3)


@pytest.fixture
def view() -> ClusterView:
    view = ClusterView()
    for record in (peer("p1", created=5), peer("p2", created=2), model_record("old"), model_record("new"), _MOVING):
        view.apply(record)
    return view


def plan(view: ClusterView, now_ms: int = 1_000) -> list[Action]:
    """Of a leader that was told nothing before."""
    return leader.plan(view, Pod(pod_id="p2", view=view).engine.peers, now_ms)


def _failed(view: ClusterView, error: str, pod_id: str = "p1") -> None:
    view.apply(held(pod_id, "new", CopyStatus.FAILED, error=error))


def test_the_oldest_pod_leads_a_draining_one_only_if_all_are(view: ClusterView) -> None:
    assert leader_of(view) == "p2"
    view.apply(peer("p2", created=2, draining=True))
    assert leader_of(view) == "p1"
    view.apply(peer("p1", created=5, draining=True))
    assert leader_of(view) == "p2"
    assert leader_of(ClusterView()) is None


def test_nothing_to_do_without_a_transition(view: ClusterView) -> None:
    view.apply(VModelRecord("v", "new", "new", revision=4))
    assert plan(view) == []


def test_the_target_takes_over_when_it_is_loaded_anywhere(view: ClusterView) -> None:
    view.apply(held("p1", "new", CopyStatus.LOADING))
    assert plan(view) == [EnsureLoaded("new")]
    _failed(view, "corrupt", "p2")
    view.apply(held("p1", "new"))
    assert plan(view) == [SettleVModel(_MOVING, replace(_MOVING, active="new"))]


def test_a_failed_load_blocks_once_and_is_tried_again_when_it_is_forgotten(view: ClusterView) -> None:
    _failed(view, "corrupt")
    blocked = replace(_MOVING, failed="corrupt")
    assert plan(view) == [SettleVModel(_MOVING, blocked)]
    view.apply(replace(blocked, revision=4))
    assert plan(view) == []
    _failed(view, "still corrupt")
    assert plan(view) == [SettleVModel(blocked, replace(blocked, failed="still corrupt"))]
    view.remove("copies/p1/new")
    assert plan(view) == [EnsureLoaded("new")]
    view.apply(held("p1", "new"))
    assert plan(view) == [SettleVModel(blocked, replace(_MOVING, active="new"))], "and the reason is gone"


def test_a_load_elsewhere_may_do_better_than_one_that_failed(view: ClusterView) -> None:
    _failed(view, "corrupt")
    view.apply(held("p2", "new", CopyStatus.LOADING))
    assert plan(view) == [EnsureLoaded("new")]


def test_a_target_that_is_not_registered_blocks_until_it_is(view: ClusterView) -> None:
    view.remove("models/new")
    blocked = replace(_MOVING, failed="target model is not registered")
    assert plan(view) == [SettleVModel(_MOVING, blocked)]
    view.apply(replace(blocked, revision=4))
    assert plan(view) == []
    view.apply(model_record("new", created=9))
    assert plan(view) == [EnsureLoaded("new")]


def test_all_transitions_in_a_fixed_order(view: ClusterView) -> None:
    for name in ("w", "u"):
        view.apply(VModelRecord(name, "new", "old"))
    assert plan(view) == [EnsureLoaded("old"), EnsureLoaded("new"), EnsureLoaded("old")]


def test_plans_come_with_every_tick_of_the_leader(view: ClusterView) -> None:
    """Level-based: nothing is remembered, so nothing is lost with a leader."""
    leader, other = Pod(pod_id="p2", view=view), Pod(pod_id="p1", view=view)
    for pod in (leader, other):
        pod.step(Tick())
        pod.step(Tick())
        pod.step(DrainStarted())
    assert leader.wishes == [EnsureLoaded("new")] * 2
    assert other.wishes == []


# As many copies as the active model has


@pytest.fixture
def busy(view: ClusterView) -> ClusterView:
    """Four pods, three with the active model, one with the target."""
    for pod_id in ("p3", "p4"):
        view.apply(peer(pod_id, created=9))
    for pod_id in ("p1", "p2", "p3"):
        view.apply(replace(held(pod_id, "old"), since_ms=500))
    view.apply(replace(_MOVING, since_ms=900, revision=4))
    view.apply(replace(held("p4", "new"), since_ms=950))
    return view


def _moved(view: ClusterView) -> list[Action]:
    """What ends the transition."""
    vmodel = view.vmodels["v"]
    return [SettleVModel(vmodel, replace(vmodel, active="new", canary_percent=0, since_ms=0))]


def _own_are_loaded(view: ClusterView) -> Pod:
    """The leader, `p2`, with a copy of the active model."""
    pod = Pod(pod_id="p2", view=view)
    pod.load("old")
    return pod


def _asked(pod: Pod, now_ms: int = 1_000) -> list[Action]:
    return leader.plan(pod.view, pod.engine.peers, now_ms)


def test_the_target_is_loaded_as_often_as_the_active_model_before_it_takes_over(busy: ClusterView) -> None:
    pod = _own_are_loaded(busy)
    wishes = _asked(pod)
    assert [type(wish) for wish in wishes] == [LoadOn, LoadOn]
    pods = {wish.pod_id for wish in wishes if isinstance(wish, LoadOn)}
    assert len(pods) == 2
    assert "p4" not in pods
    assert _asked(pod) == [], "they are on their way"
    for pod_id in ("p1", "p3"):
        busy.apply(held(pod_id, "new"))
    assert _asked(pod) == _moved(busy)


def test_what_was_asked_for_and_failed_is_not_waited_for(busy: ClusterView) -> None:
    pod = _own_are_loaded(busy)
    assert len(_asked(pod)) == 2
    for pod_id in ("p1", "p2", "p3"):
        busy.apply(held(pod_id, "new", CopyStatus.FAILED, error="no"))
    assert _asked(pod) == _moved(busy)


def test_without_room_for_more_the_target_takes_over_with_what_it_has(busy: ClusterView) -> None:
    for pod_id in ("p1", "p3"):
        busy.apply(peer(pod_id, used_bytes=10, kept_bytes=10))
    pod = Pod(pod_id="p2", view=busy)
    pod.pin_loaded("old", 10)
    busy.apply(held("p4", "new", size_bytes=5))
    assert _asked(pod) == _moved(busy)


def test_a_target_that_may_have_one_copy_needs_one(busy: ClusterView) -> None:
    busy.apply(replace(model_record("new"), max_copies=1))
    assert plan(busy) == _moved(busy)


@pytest.mark.parametrize("since_ms", [0, 900])
def test_the_wait_for_copies_has_an_end(busy: ClusterView, since_ms: int) -> None:
    """From when the transition was asked for or the target's first copy was loaded; records of versions that did not
    wait tell only the latter."""
    busy.apply(replace(_MOVING, since_ms=since_ms, revision=5))
    pod = _own_are_loaded(busy)
    assert len(_asked(pod, 949 + MATCH_MS)) == 2
    assert _asked(pod, 950 + MATCH_MS) == _moved(busy)


# Canaries

_CANARY = replace(_MOVING, canary=True, canary_percent=10)


def test_a_canary_stays_one_when_it_is_loaded(view: ClusterView) -> None:
    view.apply(replace(_CANARY, revision=4))
    view.apply(held("p1", "new"))
    assert plan(view, 1 << 40) == []


def test_a_canary_that_failed_says_so_until_it_is_loaded(view: ClusterView) -> None:
    view.apply(replace(_CANARY, revision=4))
    _failed(view, "corrupt")
    blocked = replace(_CANARY, failed="corrupt")
    assert plan(view) == [SettleVModel(_CANARY, blocked)]
    view.apply(replace(blocked, revision=5))
    assert plan(view) == []
    view.apply(held("p1", "new"))
    assert plan(view) == [SettleVModel(blocked, _CANARY)]


def test_a_canary_with_a_share_is_kept_loaded_beside_an_active_model_that_is(view: ClusterView) -> None:
    view.apply(replace(_CANARY, revision=4))
    assert plan(view) == [], "both are idle: the first request loads the active model"
    view.apply(held("p1", "old"))
    assert plan(view) == [EnsureLoaded("new")]
    view.apply(replace(_CANARY, canary_percent=0, revision=5))
    assert plan(view) == [], "nothing is to go there"


def test_a_promoted_canary_is_a_transition_like_any_other(busy: ClusterView) -> None:
    promoted = replace(_MOVING, canary_percent=50, since_ms=900, revision=5)
    busy.apply(promoted)
    pod = _own_are_loaded(busy)
    assert len(_asked(pod)) == 2
    for pod_id in ("p1", "p3"):
        busy.apply(held(pod_id, "new"))
    assert _asked(pod) == _moved(busy), "and the record does not remember the share"
