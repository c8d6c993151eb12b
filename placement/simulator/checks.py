"""Runs the invariants of `pod_checks` and `world_checks`, and looks after dead pods' leases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from placement.messages import Action, Event
from placement.records import ModelId, VModelRecord
from placement.simulator.pod_checks import AFTER_EVENT, OF_POD, allowed_side
from placement.simulator.world_checks import AT_REST, OF_REQUEST

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod
    from placement.simulator.requests import Request
    from placement.simulator.world import World


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, said: str, pod: SimPod | None = None, model_id: ModelId = "") -> None:
        super().__init__(f"{invariant}: {said}")
        self.invariant = invariant
        self.pod = pod
        self.model_id = model_id


class Checks:
    """Runs them; raises the first Violation."""

    def __init__(self, every: int) -> None:
        self.count = 0
        self._every = every
        self._left = every

    def after(self, pod: SimPod, event: Event | None, actions: Sequence[Action]) -> None:
        self.count += len(AFTER_EVENT)
        for name, check in AFTER_EVENT.items():
            wrong = check(pod, event, actions)
            if wrong:
                raise Violation(name, wrong, pod, _model_of(event))
        self._left -= 1
        if self._left <= 0:
            self._left = self._every
            self.pod(pod)

    def pod(self, pod: SimPod) -> None:
        self.count += len(OF_POD)
        for name, check in OF_POD.items():
            wrong = check(pod)
            if wrong:
                raise Violation(name, wrong, pod)

    def ended(self, world: World, request: Request) -> None:
        self.count += len(OF_REQUEST)
        for name, check in OF_REQUEST.items():
            wrong = check(world, request)
            if wrong:
                raise Violation(name, wrong, None, request.model.model_id)

    def sided(self, pod: SimPod, vmodel: VModelRecord, model_id: ModelId) -> None:
        """A request for a vmodel is to go there."""
        self.count += 1
        wrong = allowed_side(pod, vmodel, model_id)
        if wrong:
            raise Violation("no request goes to a side that it must not", wrong, pod, model_id)

    def lease(self, dead: SimPod) -> None:
        """A dead pod's lease has run out: whoever has seen that has forgotten its copies, and only those of the next
        pod of its name are left."""
        world, session = dead.world, dead.publisher.session
        if session is not None and (session.alive or session.keys):
            raise Violation("a dead pod's copies go with its lease", f"the registry has {list(session.keys)}", dead)
        for pod in world.pods.values():
            world.clock.after(pod.lag + 100, self._seen_to_be_dead, (pod, dead, world.registry.revision))

    def _seen_to_be_dead(self, what: tuple[SimPod, SimPod, int]) -> None:
        pod, dead, revision = what
        pod.sync()
        self.count += 1
        if pod.alive and pod.view.seen >= revision and pod.world.pods[dead.pod_id] is dead:
            for model_id in pod.world.models:
                if dead.pod_id in pod.view.copies(model_id):
                    raise Violation("a dead pod's copies go with its lease", "it still sees some", pod, model_id)

    def at_rest(self, world: World) -> None:
        self.count += len(AT_REST)
        for name, check in AT_REST.items():
            wrong = check(world)
            if wrong:
                raise Violation(name, wrong)


def _model_of(event: Event | None) -> ModelId:
    model_id: ModelId = getattr(event, "model_id", "")
    return model_id
