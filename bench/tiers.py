"""What do memory tiers below the device change? In the simulator's world: `python -m bench.tiers [--json FIGURES.json]`

One pod whose device holds 15 % of the models' bytes, requests like Azure Functions' (`scenario.maf`). Loads from the
store take 20 ms and the bytes at 2 GB/s, from disk 30 % and from the host 5 % of that, and so do copies there. Late is
a request that took longer than its model's SLO, or failed. All follows from the seeds: every run gives these figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any, Final

from rich.console import Console

from placement.limits import HostMode
from placement.simulator.options import Options
from placement.simulator.scenario import Hardware, maf, mixed_models
from placement.simulator.world import World

STORE: Final = Hardware(load_fixed_ms=20, load_bytes_per_ms=2e6)
DEVICE: Final = 0.15
"""Share of the models' bytes; so are those below."""
CASES: Final[dict[str, dict[str, Any]]] = {
    "device alone": {},
    "host 10 %, inclusive": {"host": 0.1, "mode": HostMode.INCLUSIVE},
    "host 10 %, exclusive": {"host": 0.1},
    "host 40 %, inclusive": {"host": 0.4, "mode": HostMode.INCLUSIVE},
    "host 40 %, exclusive": {"host": 0.4},
    "disk 60 %": {"disk": 0.6},
    "host 10 %, inclusive, disk 60 %": {"host": 0.1, "mode": HostMode.INCLUSIVE, "disk": 0.6},
    "host 10 %, exclusive, disk 60 %": {"host": 0.1, "disk": 0.6},
}


def run(case: str, seed: int, models: int, duration_ms: float) -> Mapping[str, float]:
    """One seed's figures."""
    tiers = CASES[case]
    workload = maf(mixed_models(models, seed, STORE), duration_ms, rate_scale=0.3, seed=seed)

    def share(of: float) -> int:
        return int(of * workload.size_bytes)

    options = Options(
        seed=seed,
        pods=1,
        capacity_bytes=share(DEVICE),
        host_bytes=share(tiers.get("host", 0.0)),
        disk_bytes=share(tiers.get("disk", 0.0)),
        host_mode=tiers.get("mode", HostMode.EXCLUSIVE),
        duration_ms=int(duration_ms),
        warmup=0.3,
        timeout_ms=600_000,
        trace=False,
        check_every=10_000,
    )
    report = World(options, workload).run()
    return {
        "late_percent": 100 * report.slo_violations / report.requests,
        "miss_percent": 100 * report.miss_rate,
        "p99_ms": report.latency_ms(0.99),
        "store_gb": report.bytes_moved["store"] / 1e9,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=4.0, help="of requests")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    console, figures = Console(highlight=False, soft_wrap=True), {}
    console.print("| tiers | late % | misses % | p99 ms | GB from the store |\n|---|---|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for case in CASES:
            jobs = [(case, seed, asked.models, asked.minutes * 60_000) for seed in range(1, asked.seeds + 1)]
            runs = pool.starmap(run, jobs)
            figures[case] = {name: mean(one[name] for one in runs) for name in runs[0]}
            row = figures[case]
            cells = f"{row['late_percent']:.2f} | {row['miss_percent']:.2f} | {row['p99_ms']:,.0f}"
            console.print(f"| {case} | {cells} | {row['store_gb']:,.0f} |")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
