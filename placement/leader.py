"""Who leads, and what it does for vmodels: finish their transitions. (What it does for copies is `placement.upkeep`.)

The leader is the live pod whose registry key is oldest. Pods may disagree for a moment; every change is a
compare-and-set, so two leaders do no harm. Work is level-based: computed from the view at each tick, not remembered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from placement.messages import Action, EnsureLoaded, SettleVModel
from placement.records import CopyStatus, PodId, PodRecord
from placement.view import ClusterView

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


def plan(view: ClusterView) -> list[Action]:
    """The leader's actions now.

    A transition ends when its target is loaded; it is blocked while the target's load has failed, and tried again when
    that failure is forgotten.
    """
    actions: list[Action] = []
    for vmodel_id in sorted(view.in_transition):
        vmodel = view.vmodels[vmodel_id]
        statuses = {copy.status: copy for copy in view.copies(vmodel.target).values()}
        failed = statuses.get(CopyStatus.FAILED)
        if CopyStatus.LOADED in statuses:
            actions.append(SettleVModel(vmodel, replace(vmodel, active=vmodel.target, failed="")))
        elif vmodel.target not in view.models:
            if not vmodel.failed:
                actions.append(SettleVModel(vmodel, replace(vmodel, failed="target model is not registered")))
        elif failed is not None and CopyStatus.LOADING not in statuses:
            if vmodel.failed != failed.error:
                actions.append(SettleVModel(vmodel, replace(vmodel, failed=failed.error)))
        else:
            actions.append(EnsureLoaded(vmodel.target))
    return actions
