"""Virtual time: what is due when, in order; what is due at the same moment runs in the order it was asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

TICKS_PER_MS: Final = 10
"""The clock's resolution is 100 us: moments that are nearer to each other are one."""

Tick = int


class Clock:
    """A heap of moments, each with a list of calls: most moments of a busy world have several."""

    def __init__(self) -> None:
        self.now: Tick = 0
        self.calls = 0
        self._moments: list[Tick] = []
        self._due: dict[Tick, list[tuple[Callable[[Any], object], Any]]] = {}

    def after(self, ticks: Tick, call: Callable[[Any], object], argument: Any = None) -> None:
        at = self.now + ticks
        due = self._due.get(at)
        if due is None:
            self._due[at] = [(call, argument)]
            heapq.heappush(self._moments, at)
        else:
            due.append((call, argument))

    def run(self, until: Tick) -> None:
        """Make the calls that are due up to and including `until`; those they ask for as well."""
        moments = self._moments
        while moments and moments[0] <= until:
            self.now = heapq.heappop(moments)
            due = self._due[self.now]
            for call, argument in due:  # may grow meanwhile
                call(argument)
            self.calls += len(due)
            del self._due[self.now]
        self.now = until


def ticks(ms: float) -> Tick:
    """At least one: nothing that takes time takes none."""
    return max(1, round(ms * TICKS_PER_MS))
