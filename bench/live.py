"""Does the simulator tell what a mesh would do? `python -m bench.live [--seeds 1,2,3]`

The same requests at the same times, for the same synthetic models (sizes from 100 KB to 16 GB that are booked and not
taken; loads and runs that take their time and nothing else) go to three real pods on a real etcd, and to three pods of
the simulator. Compared is what placement decides: loads, evictions, requests that waited for a load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Final

from rich.console import Console

from bench.rig import INFER, Mesh, infer_message
from mesh.config import Config
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.local_cluster import ClusterError, get_state
from mesh.local_etcd import LocalEtcdError
from placement.policies import POLICIES
from placement.simulator.options import Options
from placement.simulator.scenario import Hardware, Workload, mixed_models, zipf
from placement.simulator.world import World

PODS: Final = 3
HARDWARE: Final = Hardware(load_fixed_ms=20, load_bytes_per_ms=20e6, run_fixed_ms=5, run_bytes_per_ms=1e9)
"""Ten times slower than a GPU's link, so that what the machine itself takes does not matter."""
LEAD_S: Final = 2.0
TIMEOUT_S: Final = 30.0
SLO_MS: Final = 200.0
FIGURES: Final = ("requests", "loads", "evictions", "waited", "over_slo", "p50_ms", "p99_ms")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a workload."""

    requests: int
    loads: int
    evictions: int
    waited: int
    """Requests that waited for a load."""
    over_slo: int
    p50_ms: float
    p99_ms: float


def options_of(capacity_bytes: int, policy: str, seed: int, duration_ms: int) -> Options:
    """The simulated mesh: the shell's own settings, and what a loopback and a local etcd take."""
    return Options(
        seed=seed,
        pods=PODS,
        capacity_bytes=capacity_bytes,
        duration_ms=duration_ms,
        policy=policy,
        network_ms=0.3,
        lag_ms=3.0,
        write_ms=3.0,
        lease_ttl_ms=15_000,
        timeout_ms=int(TIMEOUT_S * 1e3),
    )


def simulated(options: Options, workload: Workload) -> Outcome:
    report = World(options, workload).run()
    return Outcome(
        report.requests,
        report.loads,
        report.evictions,
        report.misses,
        report.slo_violations,
        report.latency_ms(0.5),
        report.latency_ms(0.99),
    )


async def live(capacity_bytes: int, policy: str, seed: int, workload: Workload) -> Outcome:
    """
    Raises:
        MeshError, ClusterError, LocalEtcdError
    """
    async with Mesh(PODS, capacity=str(capacity_bytes), policy=policy, run_threads="64") as mesh:
        for model in workload.models:
            key = {"parameters": {"size_bytes": model.size_bytes, "load_ms": model.load_ms, "infer_ms": model.run_ms}}
            await mesh.register(model.model_id, "synthetic", "synthetic", key=json.dumps(key))
        messages = [infer_message(model.model_id) for model in workload.models]
        clients, rng, loop = [H2Client() for _ in mesh.pods], Random(f"live {seed}"), asyncio.get_running_loop()
        latencies_ms: list[float] = []
        failures: list[MeshError] = []

        async def ask(pod: int, message: bytes) -> None:
            started = time.perf_counter()
            try:
                await clients[pod].call(mesh.pods[pod].address, INFER, message, (), loop.time() + TIMEOUT_S)
            except MeshError as error:
                failures.append(error)
            else:
                latencies_ms.append((time.perf_counter() - started) * 1e3)

        begin = loop.time() + LEAD_S
        async with asyncio.TaskGroup() as requests:
            for at_ms, index in workload.arrivals():
                await asyncio.sleep(begin + at_ms / 1e3 - loop.time())
                requests.create_task(ask(rng.randrange(PODS), messages[index]))
        fates = [(await get_state(mesh.client, pod.address)).fates for pod in mesh.pods]
        for client in clients:
            await client.close()
    latencies_ms.sort()
    return Outcome(
        requests=len(latencies_ms) + len(failures),
        loads=sum(fate.loads_finished for fate in fates),
        evictions=sum(fate.evictions for fate in fates),
        waited=sum(fate.joins + fate.loads for fate in fates),
        over_slo=len(failures) + sum(latency_ms > SLO_MS for latency_ms in latencies_ms),
        p50_ms=latencies_ms[len(latencies_ms) // 2],
        p99_ms=latencies_ms[len(latencies_ms) * 99 // 100],
    )


async def main_of(asked: argparse.Namespace, console: Console) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    console.print("| seed | mesh | " + " | ".join(FIGURES) + " |\n|---|---|" + "---|" * len(FIGURES))
    for seed in map(int, asked.seeds.split(",")):
        models = [replace(m, slo_ms=SLO_MS) for m in mixed_models(asked.models, seed, HARDWARE)]
        workload = zipf(models, asked.rate, asked.seconds * 1e3, exponent=1.2, seed=seed)
        largest = max(model.size_bytes for model in workload.models)
        capacity_bytes = max(largest, int(workload.size_bytes * asked.share / PODS))
        with console.status(f"seed {seed}: {asked.seconds:.0f} s of requests to real pods"):
            real = await live(capacity_bytes, asked.policy, seed, workload)
        options = options_of(capacity_bytes, asked.policy, seed, int(asked.seconds * 1e3))
        there = await asyncio.to_thread(simulated, options, workload)
        for name, found in (("real", real), ("simulated", there)):
            cells = [getattr(found, figure) for figure in FIGURES]
            console.print(f"| {seed} | {name} | " + " | ".join(f"{cell:,.5g}" for cell in cells) + " |")
        rows.append({figure: getattr(there, figure) / max(1e-9, getattr(real, figure)) for figure in FIGURES})
    means = " | ".join(f"{mean(row[figure] for row in rows):.2f}x" for figure in FIGURES)
    console.print(f"| all | simulated / real | {means} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated; each is a workload")
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--rate", type=float, default=25.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=40.0, help="of requests")
    parser.add_argument("--share", type=float, default=0.25, help="of all models' bytes that the pods hold together")
    parser.add_argument("--policy", choices=sorted(POLICIES), default=Config().policy)
    parser.add_argument("--json", type=Path, help="write the ratios here too")
    asked = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    try:
        rows = asyncio.run(main_of(asked, console))
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        return 130
    except (MeshError, ClusterError, LocalEtcdError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
