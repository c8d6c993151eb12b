"""Who leads, and what it does for vmodels: finish their transitions. (What it does for copies is `placement.upkeep`.)

The leader is the live pod whose registry key is oldest. Pods may disagree for a moment; every change is a
compare-and-set, so two leaders do no harm. Work is level-based: computed from the view at each tick, not remembered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from placement.messages import Action, EnsureLoaded, LoadOn, SettleVModel
from placement.peers import Peers
from placement.records import CopyStatus, ModelId, PodId, PodRecord, VModelRecord
from placement.scaling import AT_ONCE, COLD_MS
from placement.view import IN_MEMORY, ClusterView

MATCH_MS: Final = 120_000
"""How long a target that is loaded may take to get as many copies as the active model has; within what a `sync` call
waits."""
_SURE_EVERY: Final = 16
"""Ticks."""


def leader_of(view: ClusterView) -> PodId | None:
    """The pod that leads as far as this view can tell; None: no pod is known."""
    pods = [pod for pod in view.pods.values() if not pod.draining] or list(view.pods.values())
    return min(pods, key=lambda pod: (pod.created, pod.pod_id)).pod_id if pods else None


class Leaders:
    """`leader_of`, asked at every tick: the answer holds while that pod is there, because others come after it."""

    def __init__(self) -> None:
        self._last: PodRecord | None = None
        self._left = 0

    def leader(self, view: ClusterView) -> PodId | None:
        """As `leader_of`, of which it makes sure from time to time."""
        last = self._last
        now = view.pods.get(last.pod_id) if last is not None else None
        self._left -= 1
        if now is None or last is None or now.draining or now.created != last.created or self._left < 0:
            pod_id, self._left = leader_of(view), _SURE_EVERY
            self._last = view.pods[pod_id] if pod_id is not None else None
            return pod_id
        return now.pod_id


def plan(view: ClusterView, peers: Peers, now_ms: int) -> list[Action]:
    """The leader's actions now.

    A transition ends when its target is loaded, and as often as the active model if there is room; it is blocked while
    the target's load has failed, and tried again when that failure is forgotten. A canary's does not end; its target is
    kept loaded while it has a share and the active model is in memory too.
    """
    actions: list[Action] = []
    for vmodel_id in sorted(view.in_transition):
        vmodel = view.vmodels[vmodel_id]
        statuses = {copy.status: copy for copy in view.copies(vmodel.target).values()}
        failed = statuses.get(CopyStatus.FAILED)
        if CopyStatus.LOADED in statuses:
            actions += _loaded(view, peers, vmodel, now_ms)
        elif why := _cannot_load(view, vmodel.target):
            if vmodel.failed != why:
                actions.append(SettleVModel(vmodel, replace(vmodel, failed=why)))
        elif failed is not None and CopyStatus.LOADING not in statuses:
            if vmodel.failed != failed.error:
                actions.append(SettleVModel(vmodel, replace(vmodel, failed=failed.error)))
        elif not vmodel.canary or (vmodel.canary_percent and _is_in_memory(view, vmodel)):
            actions.append(EnsureLoaded(vmodel.target))
    return actions


def _cannot_load(view: ClusterView, target: ModelId) -> str:
    model = view.models.get(target)
    if model is None:
        return "target model is not registered"
    return "target model is stopped" if model.stopped else ""


def _is_in_memory(view: ClusterView, vmodel: VModelRecord) -> bool:
    return any(copy.status in IN_MEMORY for copy in view.copies(vmodel.active).values())


def _loaded(view: ClusterView, peers: Peers, vmodel: VModelRecord, now_ms: int) -> list[Action]:
    """What follows for a vmodel whose target is loaded."""
    if vmodel.canary:
        return [SettleVModel(vmodel, replace(vmodel, failed=""))] if vmodel.failed else []
    wishes = _to_match(view, peers, vmodel, now_ms)
    if wishes is not None:
        return list(wishes)
    return [SettleVModel(vmodel, replace(vmodel, active=vmodel.target, failed="", canary_percent=0, since_ms=0))]


def _to_match(view: ClusterView, peers: Peers, vmodel: VModelRecord, now_ms: int) -> list[LoadOn] | None:
    """Copies to ask for before the target takes over; None: it has as many as the active model, or as there is room
    for, or it took too long (decision 0012)."""
    model = view.models.get(vmodel.target)
    loaded_ms = [c.since_ms for c in view.copies(vmodel.target).values() if c.status is CopyStatus.LOADED]
    if model is None or now_ms - max(vmodel.since_ms, min(loaded_ms)) >= MATCH_MS:
        return None
    wanted = len(peers.holders(vmodel.active))
    if model.max_copies:
        wanted = min(wanted, model.max_copies)
    holders = set(peers.holders(vmodel.target))
    if len(holders) >= wanted:
        return None
    coming = peers.to_come(vmodel.target, now_ms) - holders
    wishes: list[LoadOn] = []
    while len(wishes) < min(wanted - len(holders) - len(coming), AT_ONCE):
        wish = peers.ask(model, now_ms, cold_ms=COLD_MS)
        if wish is None:
            break
        wishes.append(wish)
    return wishes if wishes or coming else None
