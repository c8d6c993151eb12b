"""Which eviction policy keeps the most promises? Every policy under the same engine, in the simulator's world, on
traces like Azure Functions' and on a recorded one.

`python -m bench.policies [--trace REQUESTS.csv.gz] [--json FIGURES.json]`; `bench.policies_plot` draws the figures.

Each run is one seed, which gives models their sizes and requests their times. Late is a request that took longer than
its model's SLO, or failed; the excess is over the same requests with memory for all models.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Final

from placement import link
from placement.policies import POLICIES
from placement.simulator.checks import Violation
from placement.simulator.offline import Offline
from placement.simulator.options import Options
from placement.simulator.scenario import HOUR_MS, Hardware, Workload, maf, mixed_models, replay
from placement.simulator.world import START_MS, World

MODELS: Final = 300
DISK: Final = Hardware(load_fixed_ms=20, load_bytes_per_ms=2e6)
OFFLINE, ALL_FIT = "offline", "all fit"
LOG_SPEEDUP: Final = 60
WARMUP: Final = 0.3
TICK_MS: Final = 10_000
"""What pods do by the clock concerns copies, not evictions, and would take most of the time."""
RATE_SCALE: Final = 0.05
"""Of the paper's rates, so that a run is short: 300 models get six requests a second."""

_TURNS = link.OLDEST_EVERY


@dataclass(frozen=True)
class Case:
    """What policies are compared on."""

    trace: str
    pods: int
    share: float
    """Capacity of all pods together, of the bytes of all models."""
    fifo: bool = False
    """Loads wait first come, first served, and not as `placement.link` has it."""

    def __str__(self) -> str:
        pods = "one pod" if self.pods == 1 else f"{self.pods} pods"
        queue = ", loads first come, first served" if self.fifo else ""
        return f"{TRACES[self.trace]}; {pods}, memory for {self.share:.0%}{queue}"


TRACES: Final = {
    "maf": "like Azure Functions, from host memory",
    "log": "recorded log, from host memory",
    "maf-disk": "like Azure Functions, from disk",
}
CASES: Final = (
    *(Case("maf", 1, share) for share in (0.05, 0.1, 0.15, 0.25)),
    *(Case("log", 1, share) for share in (0.1, 0.15, 0.25)),
    *(Case("maf-disk", 1, share) for share in (0.1, 0.2)),
    Case("maf", 3, 0.15),
    Case("log", 3, 0.3),
)
"""The largest model has to fit into one pod."""


@dataclass(frozen=True)
class Run:
    """What came of one seed of a case under one policy: percent of the requests after the warm-up, GB of all."""

    case: Case
    policy: str
    seed: int
    requests: int
    miss_pct: float
    late_pct: float
    p50_ms: float
    p99_ms: float
    moved_gb: float
    loads: int


@dataclass(frozen=True)
class Job:
    case: Case
    policy: str
    seed: int
    log: Path | None
    hours: float


@lru_cache(maxsize=1)
def workload(trace: str, seed: int, log: Path | None, hours: float) -> Workload:
    if trace == "log":
        assert log is not None
        with gzip.open(log, "rt") if log.suffix == ".gz" else log.open() as lines:
            recorded = replay(log.name, lines, speedup=LOG_SPEEDUP, seed=seed)
        # Of one tenant: shares of the pod between tenants would come before any policy.
        return replace(recorded, models=[replace(model, tenant="") for model in recorded.models])
    models = mixed_models(MODELS, seed)
    if trace == "maf-disk":
        models = [replace(DISK.model(model.model_id, model.size_bytes), slo_ms=1_000.0) for model in models]
    return maf(models, hours * HOUR_MS, rate_scale=RATE_SCALE, seed=seed)


def run(job: Job) -> Run:
    case = job.case
    work = workload(case.trace, job.seed, job.log, job.hours)
    link.OLDEST_EVERY = 1 if case.fifo else _TURNS  # type: ignore[misc]  # every turn the oldest's
    share = 1.01 * case.pods if job.policy == ALL_FIT else case.share
    last_ms = max(at_ms for at_ms, _ in work.arrivals())
    options = Options(
        seed=job.seed,
        pods=case.pods,
        capacity_bytes=int(work.size_bytes * share / case.pods),
        duration_ms=int(last_ms) + 1,
        warmup=WARMUP,
        load_slots=1,
        tick_ms=TICK_MS,
        check_every=1 << 30,
        trace=False,
    )
    known = POLICIES.get(job.policy, POLICIES["lru"])
    policy = (lambda: Offline(work, START_MS + options.first_ms)) if job.policy == OFFLINE else known
    try:
        report = World(options, work, policy).run()
    except Violation as violation:  # which does not survive the way to another process
        raise RuntimeError(f"{case}, {job.policy}, seed {job.seed}: {violation}") from None
    percent = 100 / report.requests
    return Run(
        case=case,
        policy=job.policy,
        seed=job.seed,
        requests=report.requests,
        miss_pct=report.misses * percent,
        late_pct=report.slo_violations * percent,
        p50_ms=report.latency_ms(0.5),
        p99_ms=report.latency_ms(0.99),
        moved_gb=report.bytes_moved.total() / 1e9,
        loads=report.loads,
    )


def jobs(cases: Iterable[Case], policies: Sequence[str], seeds: int, log: Path | None, hours: float) -> Iterator[Job]:
    """With memory for all models nothing is evicted, so one capacity and one queue stand for all."""
    for seed in range(seeds):
        for case in cases:
            if case.trace != "log" or log is not None:
                for policy in (ALL_FIT, *policies, OFFLINE):
                    yield Job(case, policy, seed, log, hours)


@dataclass(frozen=True)
class Row:
    """A policy's line in a case's table: means over the seeds, and by how much less than LRU's."""

    policy: str
    miss_pct: float
    late_pct: float
    excess_pct: float
    excess_saved: float
    excess_saved_seeds: tuple[float, float]
    """Of the seed with the least, and of that with the most."""
    p99_ms: float
    p99_saved: float
    moved_gb: float


def rows(runs: Iterable[Run]) -> list[Row]:
    """Of one case's runs."""
    by_policy: dict[str, list[Run]] = {}
    for each in sorted(runs, key=lambda each: each.seed):
        by_policy.setdefault(each.policy, []).append(each)
    base, lru = by_policy[ALL_FIT], by_policy["lru"]

    def excess(of: Sequence[Run]) -> list[float]:
        return [each.late_pct - least.late_pct for each, least in zip(of, base, strict=True)]

    def row(policy: str, of: list[Run]) -> Row:
        p99_ms = mean(each.p99_ms for each in of)
        seeds = [_saved(a, b) for a, b in zip(excess(of), excess(lru), strict=True)]
        return Row(
            policy,
            mean(each.miss_pct for each in of),
            mean(each.late_pct for each in of),
            mean(excess(of)),
            _saved(mean(excess(of)), mean(excess(lru))),
            (min(seeds), max(seeds)),
            p99_ms,
            _saved(p99_ms, mean(each.p99_ms for each in lru)),
            mean(each.moved_gb for each in of),
        )

    return [row(policy, of) for policy, of in by_policy.items()]


def _saved(ours: float, theirs: float) -> float:
    return 1 - ours / theirs if theirs > 0 else 0.0


def markdown(case: Case, lines: Sequence[Row]) -> str:
    out = [
        f"**{case}**\n",
        "| policy | misses | late | excess late | less than LRU (seeds) | p99 | less than LRU | moved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        saved = f"{line.excess_saved:.0%} ({line.excess_saved_seeds[0]:.0%} to {line.excess_saved_seeds[1]:.0%})"
        compared = line.policy not in (ALL_FIT, "lru")
        out.append(
            f"| {line.policy} | {line.miss_pct:.2f} % | {line.late_pct:.2f} % | {line.excess_pct:.2f} % | "
            f"{saved if compared else ''} | {line.p99_ms:.0f} ms | {f'{line.p99_saved:.0%}' if compared else ''} | "
            f"{line.moved_gb:,.0f} GB |"
        )
    return "\n".join([*out, ""])


def summary(tables: Mapping[Case, Sequence[Row]]) -> str:
    """Each policy against LRU in each case: by how much less the excess of late requests is, and the p99."""
    policies = [*dict.fromkeys(line.policy for lines in tables.values() for line in lines if line.policy != ALL_FIT)]
    out = [f"| case | {' | '.join(policies)} |", f"|---|{'---:|' * len(policies)}"]
    for case, lines in tables.items():
        of = {line.policy: line for line in lines}
        cells = [
            f"{of[p].excess_pct:.2f} %, {of[p].p99_ms:.0f} ms"
            if p == "lru"
            else (f"{of[p].excess_saved:.0%}, {of[p].p99_saved:.0%}" if p in of else "")
            for p in policies
        ]
        out.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.policies", description=__doc__)
    parser.add_argument(
        "--trace", type=Path, help="log of requests to be replayed too: CSV with time_s and model, or .gz"
    )
    parser.add_argument("--policies", default=",".join(POLICIES), help="compared, with LRU and the offline reference")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hours", type=float, default=2.0, help="of the generated traces, virtual")
    parser.add_argument("--only", default="", help="cases whose description contains this")
    parser.add_argument("--fifo", action="store_true", help="loads wait first come, first served")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, help="file for every run's figures, one to a line; what it has is not run again"
    )
    asked = parser.parse_args()
    policies = list(dict.fromkeys(["lru", *asked.policies.split(",")]))
    if unknown := set(policies) - POLICIES.keys():
        parser.error(f"--policies: expected some of {', '.join(POLICIES)}, found {min(unknown)!r}")
    cases = [replace(case, fifo=asked.fifo) for case in CASES if asked.only in str(case)]
    done = read(asked.json) if asked.json and asked.json.exists() else []
    known = {(each.case, each.policy, each.seed) for each in done}
    todo = [
        job
        for job in jobs(cases, policies, asked.seeds, asked.trace, asked.hours)
        if (job.case, job.policy, job.seed) not in known
    ]
    with ProcessPoolExecutor(asked.processes) as pool:
        for left, each in zip(reversed(range(len(todo))), pool.map(run, todo), strict=True):
            done.append(each)
            print(f"\r{left} runs to go ", end="", file=sys.stderr, flush=True)
            if asked.json:
                with asked.json.open("a") as file:
                    file.write(f"{json.dumps(asdict(each))}\n")
    print(file=sys.stderr)
    tables = {case: rows(of) for case in cases if (of := [each for each in done if each.case == case])}
    for case, lines in tables.items():
        print(markdown(case, lines))
    print(summary(tables))
    return 0


def read(figures: Path) -> list[Run]:
    """What `--json` has kept."""
    runs = []
    for line in figures.read_text().splitlines():
        told = json.loads(line)
        runs.append(Run(**{**told, "case": Case(**told["case"])}))
    return runs


if __name__ == "__main__":
    sys.exit(main())
