"""Calls between pods: each message takes its own time, so that they overtake each other; some never arrive."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from placement.simulator.clock import TICKS_PER_MS, Tick
from placement.simulator.requests import Call, Outcome

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod
    from placement.simulator.world import World

_SILENCE: Final = (3_000 * TICKS_PER_MS, 5_000 * TICKS_PER_MS)
"""When a peer that has gone silent is given up (`mesh.h2_client`: keepalive)."""


class Transport:
    def __init__(self, world: World) -> None:
        self.cut: set[frozenset[int]] = set()
        """Pairs of pods that cannot reach each other."""
        self._world = world
        self._clock = world.clock
        self._draw = Random(f"transport {world.options.seed}").random
        self._mean = 2 * world.options.network_ms * TICKS_PER_MS
        faults = world.options.faults
        self._lost, self._slow = faults.lost_messages, faults.slow_messages

    def send(self, sender: SimPod, call: Call) -> None:
        """Take a call to the pod it is for; one that cannot be reached, or does not answer, is POD_UNAVAILABLE."""
        if self._vanishes(sender, call.pod):
            self._clock.after(self._silence(), self._returned, (call, Outcome.POD_UNAVAILABLE))
        else:
            self._clock.after(self._latency(), self._arrived, call)

    def answer(self, call: Call, outcome: Outcome) -> None:
        """Take an answer back to the caller."""
        caller = call.caller.pod if call.caller is not None else call.pod
        if self._vanishes(call.pod, caller):
            self._clock.after(self._silence(), self._returned, (call, Outcome.POD_UNAVAILABLE))
        else:
            self._clock.after(self._latency(), self._returned, (call, outcome))

    def _arrived(self, call: Call) -> None:
        call.pod = self._world.pods[call.pod.pod_id]  # it may have been started anew meanwhile
        if call.pod.serving:
            self._world.begin(call)
        else:
            self.answer(call, Outcome.POD_UNAVAILABLE)

    def _returned(self, what: tuple[Call, Outcome]) -> None:
        call, outcome = what
        caller = call.caller
        if caller is not None and caller.awaits is call and caller.answer is None:
            caller.answer = outcome
            self._world.go(caller)
        elif caller is None and call.request.on_end is not None:
            call.request.on_end(outcome)

    def _latency(self) -> Tick:
        latency = 1 + int(self._draw() * self._mean)
        return latency * 100 if self._slow and self._draw() < self._slow else latency

    def _silence(self) -> Tick:
        return int(_SILENCE[0] + self._draw() * (_SILENCE[1] - _SILENCE[0]))

    def _vanishes(self, a: SimPod, b: SimPod) -> bool:
        if self.cut and frozenset((a.number, b.number)) in self.cut:
            return True
        return bool(self._lost) and self._draw() < self._lost
