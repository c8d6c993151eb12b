"""What a run is made of. Everything else follows from it, so that a seed and its options are a bug report."""

from __future__ import annotations

from dataclasses import dataclass, field

from placement.limits import HostMode


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong. Rates are per pod and minute of virtual time; shares are of what they speak of."""

    crashes: float = 0.0
    """A pod's process ends at once; it starts anew, empty, after `down_ms`."""
    drains: float = 0.0
    """A pod is asked to stop, finishes its requests, and starts anew."""
    down_ms: int = 5_000
    lost_leases: float = 0.0
    """The registry forgets a lease though its pod is well."""
    registry_cuts: float = 0.0
    """A pod and the registry cannot reach each other for a while."""
    pod_cuts: float = 0.0
    """Two pods cannot reach each other for a while."""
    cut_ms: int = 8_000
    lags: float = 0.0
    """A pod's watch falls behind, by up to `behind_ms`."""
    behind_ms: int = 3_000
    compactions: float = 0.0
    """A pod's watch cannot be resumed: it reads everything anew."""
    lost_messages: float = 0.0
    """Share of calls and of answers between pods that never arrive."""
    slow_messages: float = 0.0
    """Share of those that take a hundred times as long."""
    failed_loads: float = 0.0
    """Share of loads that fail, half of them for a reason that may pass."""
    slow_loads: float = 0.0
    """Share of loads that take ten times as long."""
    hung_loads: float = 0.0
    """Share of loads that take `hang_ms` and then fail."""
    hang_ms: int = 120_000
    unkept: float = 0.0
    """Share of copies down to a lower tier that fail."""
    misjudged_sizes: float = 0.0
    """Share of models whose estimate is wrong, by up to half."""
    oversized: float = 0.0
    """Share of models that fit into no pod."""
    cancels: float = 0.0
    """Share of requests whose client goes away before it is answered."""
    registrations: float = 0.0
    """Models removed, or registered anew with other contents, per minute of the whole mesh."""
    give_ups: float = 0.0
    """Copies somebody asks to be given up (RepositoryModelUnload), per minute of the whole mesh."""
    vmodels: float = 0.0
    """Aliases set to another model, per minute of the whole mesh."""
    skew_ms: int = 0
    """Each pod's clock is wrong by up to this."""

    @property
    def any(self) -> bool:
        return self != Faults(**{name: getattr(self, name) for name in ("down_ms", "cut_ms", "behind_ms", "hang_ms")})


@dataclass(frozen=True, slots=True)
class Options:
    """One run."""

    seed: int = 0
    pods: int = 3
    capacity_bytes: int = 1 << 30
    """Of each pod's device."""
    host_bytes: int = 0
    disk_bytes: int = 0
    """Of the tiers below it; 0: there is no such tier."""
    host_mode: HostMode = HostMode.EXCLUSIVE
    duration_ms: int = 60_000
    """How long requests arrive; after that the world is let come to rest."""
    warmup: float = 0.0
    """Share of the duration whose requests are not counted in the report."""
    warm: bool = False
    """Before requests come, every pod has loaded its share of the models, as far as it has room."""
    policy: str = "lru"
    load_slots: int = 2
    load_timeout_ms: int = 90_000
    run_slots: int = 0
    """Requests a pod runs at once; the others wait in line. 0: as many as come."""
    timeout_ms: int = 30_000
    """Each request's deadline."""
    network_ms: float = 0.3
    """One way between two pods, mean."""
    lag_ms: float = 20.0
    """How far a watch is behind, mean; each pod has its own, between a fifth of it and the double."""
    write_ms: float = 5.0
    """A write to the registry, mean."""
    lease_ttl_ms: int = 10_000
    tick_ms: int = 500
    """How often a pod looks after itself (`mesh.driver`); most of what a quiet world costs."""
    faults: Faults = field(default_factory=Faults)
    check_every: int = 1
    """Check a pod in full after each so many events, and at the end the views of every so many pods; what costs little
    is checked after every event."""
    own_views: bool = False
    """Each pod has a `ClusterView` of its own, as in production, instead of one shared by all and seen with its lag."""
    trace: bool = True
    """Keep the last events, and a digest of all."""

    @property
    def first_ms(self) -> float:
        """When requests begin to arrive: all pods know each other by then."""
        return 20 * self.write_ms + 4 * self.lag_ms + 1_000
