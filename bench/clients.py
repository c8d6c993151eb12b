"""What does a request cost the server when real clients send it? `python -m bench.clients`

One pod holds 1,000 synthetic models. grpcio, grpc.aio, tritonclient and grpc-js call them in a closed loop, 8 x 8:
every call with another model, in the message and in a header, a trace id of its own and a deadline of its own, so that
hardly any header block comes twice. Beside each stands the same pod under pre-framed load, whose headers never change,
at the client's own rate: fewer requests per second share fewer system calls, which has nothing to do with headers. The
ratio to pre-framed load at full speed is told too. All in turns, the least of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.jobs import ROOT, Job, JobError
from bench.load import run_load
from bench.peers.base import INFER, message
from mesh.load_generator import Load, tree_cpu_s
from mesh.local_cluster import LocalPod, ready

CLIENTS: Final = ("grpcio", "grpc.aio", "tritonclient", "grpc-js")
MODELS: Final = 1_000
SHAPE: Final = (8, 8)
_JS: Final = ROOT / "bench" / "peers" / "inside" / "grpc_js_caller.js"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one measurement."""

    cpu_us: float
    per_second: float


class Calls:
    """One pod, and what it costs to call it."""

    def __init__(self, pod: LocalPod, scratch: Path, seconds: float) -> None:
        assert pod.pid is not None
        self._pod, self._pid, self._seconds = pod, pod.pid, seconds
        self._plan = scratch / "plan.json"
        names = [f"m-{n}" for n in range(MODELS)]
        plan = {
            "address": pod.address,
            "method": INFER,
            "connections": SHAPE[0],
            "streams": SHAPE[1],
            "seconds": seconds,
            "messages": [(name, b64encode(message(name)).decode()) for name in names],
        }
        self._plan.write_text(json.dumps(plan))
        self._messages = [message(name) for name in names]

    async def preframed(self, rate: float = 0.0) -> Cost:
        """The same messages with headers that never change.

        Raises:
            JobError
        """
        load = Load(
            self._pod.address, INFER, self._messages, *SHAPE, seconds=self._seconds, rate=rate, server_pids=[self._pid]
        )
        result = await run_load(load)
        if result.errors or not result.requests:
            raise JobError(f"pre-framed load: {result.errors}")
        return Cost(result.cpu_us, result.per_second)

    async def client(self, name: str) -> Cost:
        """
        Raises:
            JobError
        """
        job = Job("bench.callers", name, str(self._plan))
        if name == "grpc-js":
            job = Job(str(_JS), str(self._plan), program=[shutil.which("node") or "node"])
        async with job:
            if await job.line() is None:
                raise JobError(f"{name} has ended")
            before_s = tree_cpu_s(self._pid)
            told = await job.line()
            spent_s = tree_cpu_s(self._pid) - before_s
        if told is None or told["failed"] or not told["answered"]:
            raise JobError(f"{name} told {told}")
        return Cost(spent_s / told["answered"] * 1e6, told["answered"] / self._seconds)


async def measure(calls: Calls, clients: Sequence[str], rounds: int) -> dict[str, dict[str, Cost]]:
    """By client: its own cost, that of pre-framed load at its rate, and at full speed."""
    costs: dict[str, dict[str, Cost]] = {name: {} for name in clients}
    full: list[Cost] = []
    for _ in range(rounds):
        full.append(await calls.preframed())
        for name in clients:
            own = await calls.client(name)
            steady = await calls.preframed(own.per_second)
            for what, cost in (("own", own), ("steady", steady)):
                best = costs[name].get(what)
                if best is None or cost.cpu_us < best.cpu_us:
                    costs[name][what] = cost
    for name in clients:
        costs[name]["full"] = min(full, key=lambda cost: cost.cpu_us)
    return costs


def markdown(costs: dict[str, dict[str, Cost]]) -> str:
    lines = [
        "| client | requests/s | CPU us/request | pre-framed at that rate | ratio | pre-framed, full speed | ratio |"
    ]
    lines.append("|---" * 7 + "|")
    for name, row in costs.items():
        own, steady, full = row["own"], row["steady"], row["full"]
        cells = [
            f"{own.per_second:,.0f}",
            f"{own.cpu_us:.1f}",
            f"{steady.cpu_us:.1f}",
            f"{own.cpu_us / steady.cpu_us:.2f}x",
        ]
        cells += [f"{full.cpu_us:.1f} ({full.per_second:,.0f}/s)", f"{own.cpu_us / full.cpu_us:.2f}x"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


async def run(clients: Sequence[str], seconds: float, rounds: int) -> dict[str, dict[str, Cost]]:
    """
    Raises:
        JobError, ClusterError
    """
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        scratch = Path(directory)
        for n in range(MODELS):
            folder = scratch / "models" / f"m-{n}"
            folder.mkdir(parents=True)
            (folder / "model.synthetic.json").write_text('{"size_bytes": 1024}')
        settings = {"models": str(scratch / "models"), "log_level": "WARNING"}
        pod = LocalPod("bench", "memory://", scratch / "pod.log", settings)
        pod.start()
        try:
            await ready([pod])
            calls = Calls(pod, scratch, seconds)
            await run_load(
                Load(pod.address, INFER, [message(f"m-{n}") for n in range(MODELS)], *SHAPE, requests=MODELS)
            )  # loads them
            return await measure(calls, clients, rounds)
        finally:
            pod.terminate()
            pod.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=",".join(CLIENTS), help="comma-separated (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure and round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--node-modules", type=Path, default=ROOT / "tests" / "interop" / "node_modules")
    asked = parser.parse_args()
    clients = asked.clients.split(",")
    for name in clients:
        if name not in CLIENTS:
            parser.error(f"--clients: expected any of {', '.join(CLIENTS)}, found {name!r}")
    if "grpc-js" in clients:
        os.environ["NODE_PATH"] = str(asked.node_modules)
        if not (shutil.which("node") and (asked.node_modules / "@grpc" / "grpc-js").is_dir()):
            print("grpc-js is left out; to have it: node, and npm ci --prefix tests/interop", file=sys.stderr)
            clients.remove("grpc-js")
    try:
        print(markdown(asyncio.run(run(clients, asked.seconds, asked.rounds))))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
