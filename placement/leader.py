"""What only one pod does: finish the transitions of vmodels.

The leader is the live pod whose registry key is oldest. Pods may disagree for a moment; every change is a
compare-and-set, so two leaders do no harm. Work is level-based: computed from the view at each tick, not remembered.
"""

from __future__ import annotations

from dataclasses import replace

from placement.messages import Action, EnsureLoaded, SettleVModel
from placement.records import CopyStatus, PodId
from placement.view import ClusterView


def leader_of(view: ClusterView) -> PodId | None:
    """The pod that leads as far as this view can tell; None: no pod is known."""
    pods = [pod for pod in view.pods.values() if not pod.draining] or list(view.pods.values())
    return min(pods, key=lambda pod: (pod.created, pod.pod_id)).pod_id if pods else None


def plan(view: ClusterView, pod_id: PodId) -> list[Action]:
    """The leader's actions now; nothing for any other pod.

    A transition ends when its target is loaded; it is blocked while the target's load has failed, and tried again when
    that failure is forgotten.
    """
    if not view.in_transition or leader_of(view) != pod_id:
        return []
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
