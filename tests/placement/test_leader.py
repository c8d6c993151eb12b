"""Who finishes the transitions of vmodels, and how (as in ModelMesh: a vmodel's target takes over when it is
loaded; a failed one blocks, and the active model goes on serving)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.leader import leader_of, plan
from placement.messages import DrainStarted, EnsureLoaded, SettleVModel, Tick
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
