"""What a policy could do that knew the future: a reference, not a bound.

Belady's rule, to give up what is needed last (1966), with sizes and costs: the value of `SloDensity`, with one over the
time until the next request in place of the rate. The optimum itself is NP-hard once sizes differ; this is greedy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator

from placement.policies.slo_density import SloDensity
from placement.records import ModelId
from placement.simulator.scenario import Workload


class Offline(SloDensity):
    """Gives up the copy with the least cost per byte and time until its next request; all it needs is the workload."""

    def __init__(self, workload: Workload, start_ms: float) -> None:
        """`start_ms`: when the workload begins by the clock that pods see."""
        super().__init__()
        self._uses_ms: dict[ModelId, list[float]] = {model.model_id: [] for model in workload.models}
        for at_ms, index in workload.arrivals():
            self._uses_ms[workload.models[index].model_id].append(start_ms + at_ms)
        self._now_ms = 0

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        self._now_ms = now_ms
        self._sorted_waits = sorted(self._waits)
        yield from sorted(self._entries, key=self._value)

    def _rate(self, model_id: ModelId) -> float:
        uses_ms = self._uses_ms[model_id]
        following = bisect_right(uses_ms, self._now_ms)
        return 1 / max(1.0, uses_ms[following] - self._now_ms) if following < len(uses_ms) else 0.0
