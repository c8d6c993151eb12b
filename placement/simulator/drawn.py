"""Worlds that a seed makes up: all of their options, and who asks for what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from placement.limits import HostMode
from placement.records import TenantRecord
from placement.simulator.options import Faults, Options
from placement.simulator.scenario import SimModel, Workload, zipf


@dataclass(frozen=True, slots=True)
class Clients:
    """A simple workload; `placement.simulator.scenario` has the ones that are like real ones."""

    models: int = 1_000
    requests_per_s: float = 1_000.0
    zipf: float = 0.9
    """Exponent of the models' popularity."""
    load_ms: float = 200.0
    """Mean time of a load."""
    run_ms: float = 2.0
    """Mean time of a request on a loaded model."""
    fill: float = 0.25
    """The largest model's share of a pod."""
    tenants: int = 0
    placed: float = 0.0
    """Share of models that say how they are to be placed."""

    def workload(self, options: Options) -> Workload:
        rng, placing = Random(f"models {options.seed}"), Random(f"placement {options.seed}")
        most = max(1, int(options.capacity_bytes * self.fill))
        models = [
            SimModel(
                f"m{number}",
                rng.randint(1, most),
                self.run_ms * rng.uniform(0.1, 2),
                self.load_ms * rng.uniform(0.1, 2),
                f"t{number % self.tenants}" if self.tenants else "",
            )
            for number in range(self.models)
        ]
        placed, left_bytes = list[SimModel](), options.capacity_bytes // 2
        for model in models:
            settings = _placement(placing) if placing.random() < self.placed else {}
            if settings.get("min_copies") or settings.get("pinned"):
                if model.size_bytes > left_bytes:
                    settings = {}  # all that is to be kept can be, on any pod
                else:
                    left_bytes -= model.size_bytes
            placed.append(replace(model, placement=settings))
        workload = zipf(placed, self.requests_per_s, options.duration_ms, exponent=self.zipf, seed=options.seed)
        granting = Random(f"grants {options.seed}")
        grants = [_grant(f"t{number}", options, granting) for number in range(self.tenants)]
        return replace(workload, grants=grants)


def _grant(tenant: str, options: Options, rng: Random) -> TenantRecord:
    """Often nothing; guarantees of three tenants fit into the mesh."""
    mesh_bytes = options.pods * options.capacity_bytes
    guaranteed_bytes = rng.choice([0, 0, mesh_bytes // 4])
    return TenantRecord(
        tenant,
        guaranteed_bytes=guaranteed_bytes,
        max_bytes=rng.choice([0, 0, max(guaranteed_bytes, mesh_bytes // 2)]),
        weight=rng.choice([1, 1, 3]),
        max_loads=rng.choice([0, 0, 1]),
    )


def _placement(rng: Random) -> dict[str, Any]:
    least = rng.choice([0, 0, 1, 2])
    return {
        "min_copies": least,
        "max_copies": rng.choice([0, max(1, least), 3]),
        "pinned": rng.random() < 0.2,
        "idle_unload_s": rng.choice([0, 0, 5, 60]),
    }


def draw(seed: int) -> tuple[Options, Clients]:
    """A small world with faults."""
    rng = Random(f"options {seed}")

    def some(most: float) -> float:
        """Absent from half of the worlds, so that every kind of fault is also met alone."""
        return round(rng.uniform(0, most), 3) if rng.random() < 0.5 else 0.0

    options = Options(
        seed=seed,
        pods=rng.randint(1, 6),
        capacity_bytes=rng.randint(10, 60),
        host_bytes=rng.choice([0, 0, 20, 100]),
        disk_bytes=rng.choice([0, 0, 50, 300]),
        host_mode=rng.choice(list(HostMode)),
        duration_ms=rng.choice([10_000, 30_000, 60_000]),
        load_slots=rng.randint(1, 3),
        run_slots=rng.choice([0, 0, 1, 4]),
        timeout_ms=rng.choice([1_000, 10_000, 30_000]),
        network_ms=rng.choice([0.3, 3.0]),
        lag_ms=rng.choice([5.0, 50.0, 500.0]),
        write_ms=rng.choice([2.0, 50.0]),
        lease_ttl_ms=rng.choice([3_000, 10_000]),
        own_views=rng.random() < 0.5,
        faults=Faults(
            crashes=some(3),
            drains=some(2),
            down_ms=rng.choice([100, 2_000, 20_000]),
            lost_leases=some(2),
            registry_cuts=some(2),
            pod_cuts=some(3),
            cut_ms=rng.choice([500, 5_000, 20_000]),
            lags=some(4),
            compactions=some(4),
            lost_messages=some(0.05),
            slow_messages=some(0.2),
            failed_loads=some(0.4),
            slow_loads=some(0.3),
            hung_loads=some(0.05),
            hang_ms=rng.choice([20_000, 120_000]),
            unkept=some(0.5),
            cancels=some(0.3),
            misjudged_sizes=some(1),
            oversized=some(0.1),
            registrations=some(30),
            give_ups=some(20),
            vmodels=some(10),
            skew_ms=rng.choice([0, 50, 5_000]),
        ),
        load_timeout_ms=Random(f"load timeout {seed}").choice([15_000, 90_000]),
    )
    clients = Clients(
        models=rng.randint(3, 40),
        requests_per_s=rng.choice([1.0, 5.0, 20.0]),
        zipf=rng.choice([0.0, 0.9, 1.5]),
        load_ms=rng.choice([20.0, 500.0, 3_000.0]),
        fill=rng.choice([0.1, 0.4, 0.9]),
        tenants=rng.choice([0, 0, 3]),
        placed=rng.choice([0.0, 0.0, 0.3]),
    )
    return options, clients
