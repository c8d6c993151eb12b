"""What came of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from placement.simulator.clock import TICKS_PER_MS, Tick


@dataclass(slots=True)
class Tenant:
    """Of one tenant's counted requests."""

    requests: int = 0
    failed: int = 0
    misses: int = 0
    slo_violations: int = 0


@dataclass(slots=True)
class Report:
    """Counts are of requests that arrived after the warm-up; loads, evictions and bytes of the whole run."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    """Requests that waited for a load, or caused one."""
    slo_violations: int = 0
    """Requests that took longer than their model's SLO, or failed."""
    latencies: Counter[Tick] = field(default_factory=Counter)
    """Of requests that were served."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    all_requests: int = 0
    """Those during the warm-up as well."""
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0
    forwards: int = 0
    double_loads: int = 0
    """Loads begun while another pod was loading the model."""
    bytes_moved: Counter[str] = field(default_factory=Counter)
    """By the tier they came from."""
    events: int = 0
    """Of the virtual clock."""
    checks: int = 0
    digest: str = ""
    """Of the run's trace; of these figures, where none was kept."""

    def latency_ms(self, share: float) -> float:
        """The latency that `share` of the served requests did not exceed, e.g. 0.99."""
        left = share * self.latencies.total()
        for tick in sorted(self.latencies):
            left -= self.latencies[tick]
            if left <= 0:
                return tick / TICKS_PER_MS
        return 0.0

    @property
    def miss_rate(self) -> float:
        return self.misses / self.requests if self.requests else 0.0

    def __str__(self) -> str:
        share = 100 / max(1, self.requests)
        lines = [
            f"requests   {self.requests} counted of {self.all_requests}: "
            + ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items())),
            f"latency    p50 {self.latency_ms(0.5):.1f} ms, p99 {self.latency_ms(0.99):.1f} ms, "
            f"p99.9 {self.latency_ms(0.999):.1f} ms",
            f"misses     {self.misses} ({self.misses * share:.2f} %)",
            f"over SLO   {self.slo_violations} ({self.slo_violations * share:.2f} %)",
            f"loads      {self.loads}, of which {self.failed_loads} failed and {self.double_loads} were begun while "
            f"another pod loaded the model; {self.evictions} evictions; {self.forwards} forwards",
            "bytes      " + (", ".join(f"{n} from {tier}" for tier, n in sorted(self.bytes_moved.items())) or "none"),
            f"events     {self.events}, {self.checks} checks",
            f"digest     {self.digest}",
        ]
        return "\n".join(lines)
