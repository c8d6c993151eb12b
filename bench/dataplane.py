"""Server CPU per request, ours and the peers', in one table from one run: `python -m bench.dataplane`.

Every server is started and first asked with grpcio's own client, its answer compared. Then each is loaded with
pre-framed ModelInfer requests (h2load where it is installed) in every shape, connections x streams, in turns, round
after round; a figure is the least of the rounds, for whatever else the machine does only adds. CPU is that of the
server's whole process tree, from the kernel's clocks; of a proxy it is the proxy's alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.jobs import JobError
from bench.peers import PEERS
from bench.peers.base import IDENTITY, INFER, MLP, Peer, PeerError, check, message
from bench.preframed import USUAL, Preframed, PreframedError
from bench.rig import write_mlp

SMALL, LARGE = 64, 150_528
"""Floats in the tensor: 291 bytes and 600 KB of request."""
HIDDEN: Final = 128


@dataclass(frozen=True, slots=True)
class Case:
    """A column of the table."""

    model: str
    floats: int
    connections: int
    streams: int

    def __str__(self) -> str:
        what = MLP.upper() if self.model == MLP else "600 KB" if self.floats == LARGE else "291 B"
        return f"{what} {self.connections}x{self.streams}"


CASES: Final = (
    *(Case(IDENTITY, SMALL, *shape) for shape in ((1, 1), (4, 4), (8, 8), (64, 1))),
    *(Case(IDENTITY, LARGE, *shape) for shape in ((1, 1), (4, 4), (8, 8))),
    *(Case(MLP, SMALL, *shape) for shape in ((1, 1), (4, 4), (8, 8), (64, 1))),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement."""

    cpu_us: float
    """Of the server, per request."""
    per_second: float
    others: float
    """Cores busy with what is neither the server nor the generator."""


Table = dict[str, dict[str, Figure]]
"""By peer and case; the figure is the one of least CPU."""


async def measure(
    peers: Sequence[Peer],
    cases: Sequence[Case],
    seconds: float,
    rounds: int,
    metadata: Sequence[tuple[str, str]],
    scratch: Path,
) -> Table:
    """Load every peer with every case that it serves.

    Raises:
        PreframedError, PeerError, JobError
    """
    table: Table = {peer.name: {} for peer in peers}
    for case in cases:
        able = [peer for peer in peers if case.model in peer.models]
        loads, counts = dict[str, Preframed](), dict[str, int]()
        for peer in able:
            asked = message(case.model, case.floats)
            size = await check(peer.address, case.model, case.floats, is_echo=peer.is_echo)
            loads[peer.name] = load = Preframed(peer.address, INFER, asked, size, metadata)
            few = 4 * case.connections * case.streams
            rate = await load.send(case.connections, case.streams, few, scratch)  # and warms up
            rate = await load.send(case.connections, case.streams, max(few, int(rate * 0.2)), scratch)
            counts[peer.name] = max(few, int(rate * seconds))
        for _ in range(rounds):
            for peer in able:
                figure = await _once(peer, loads[peer.name], case, counts[peer.name], scratch)
                best = table[peer.name].get(str(case))
                if best is None or figure.cpu_us < best.cpu_us:
                    table[peer.name][str(case)] = figure
        told = ", ".join(f"{peer.name} {table[peer.name][str(case)].cpu_us:.1f}" for peer in able)
        print(f"{case}: {told}", file=sys.stderr, flush=True)
    return table


async def _once(peer: Peer, load: Preframed, case: Case, count: int, scratch: Path) -> Figure:
    busy_s, generator_s, server_s, started_s = _busy_s(), _children_s(), peer.cpu_s(), time.perf_counter()
    rate = await load.send(case.connections, case.streams, count, scratch)
    server_s = peer.cpu_s() - server_s
    others_s = _busy_s() - busy_s - server_s - (_children_s() - generator_s)
    return Figure(server_s / count * 1e6, rate, max(0.0, others_s / (time.perf_counter() - started_s)))


def _busy_s() -> float:
    """CPU time of the whole machine so far (proc(5), /proc/stat)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / 100


def _children_s() -> float:
    """Our own and our ended children's: the generator's."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, _WHO))


_WHO: Final = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def markdown(told: Mapping[str, Any]) -> str:
    """Microseconds of CPU per request; in parentheses the ratio to the first server's, or the first proxy's: ours."""
    table: Mapping[str, Mapping[str, Mapping[str, float]]] = told["table"]
    columns = list(next(iter(table.values())))
    lines = ["| us of CPU per request | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for names in ([name for name in table if (name in told["proxies"]) is proxy] for proxy in (False, True)):
        for name in names:
            cells = []
            for column in columns:
                cpu_us, ours_us = (table[each].get(column, {}).get("cpu_us", 0.0) for each in (name, names[0]))
                ratio = f" ({cpu_us / ours_us:.1f}x)" if cpu_us and name != names[0] else ""
                cells.append(f"{cpu_us:,.{0 if cpu_us >= 100 else 1}f}{ratio}" if cpu_us else "")
            lines.append(f"| {told['versions'][name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


async def run(
    names: Sequence[str],
    cases: Sequence[Case],
    seconds: float,
    rounds: int,
    home: Path,
    metadata: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Start the peers, measure, stop them; what cannot be had is told and left out.

    Raises:
        PeerError, PreframedError, JobError
    """
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        scratch = Path(directory)
        repository = scratch / "models"
        for name in (IDENTITY, MLP):
            (repository / name).mkdir(parents=True)
        (repository / IDENTITY / "model.synthetic.json").write_text(json.dumps({"size_bytes": 1 << 20}))
        write_mlp(repository / MLP / "model.onnx", HIDDEN)
        async with AsyncExitStack() as running:
            peers: list[Peer] = []
            for name in names:
                peer = PEERS[name](home, scratch, repository)
                how = peer.missing()
                if how is not None:
                    print(f"{name} is left out; to have it: {how}", file=sys.stderr)
                    continue
                if peer.is_proxy:
                    peer.upstream = peers[0].address
                running.push_async_callback(peer.stop)
                await peer.start()
                peers.append(peer)
                print(f"{name} serves", file=sys.stderr)
            table = await measure(peers, cases, seconds, rounds, metadata, scratch)
            versions = {peer.name: peer.version() for peer in peers}
    return {
        "machine": f"{platform.machine()}, Linux {platform.release()}, CPython {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rounds": rounds,
        "seconds": seconds,
        "metadata": dict(metadata),
        "versions": versions,
        "proxies": [name for name in table if PEERS[name].is_proxy],
        "table": {name: {case: asdict(figure) for case, figure in row.items()} for name, row in table.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", default="densemesh,densemesh-grpcio,densemesh-hop", help=f"of {','.join(PEERS)}; or all"
    )
    parser.add_argument("--peers-dir", type=Path, default=Path(".peers"), help="the peers' virtual environments")
    parser.add_argument("--seconds", type=float, default=0.7, help="per figure and round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--metadata", action="store_true", help="with a trace id, a tenant and a token, always the same"
    )
    parser.add_argument("--json", type=Path, help="keep the figures here")
    asked = parser.parse_args()
    names = list(PEERS) if asked.peers == "all" else asked.peers.split(",")
    for name in names:
        if name not in PEERS:
            parser.error(f"--peers: expected any of {', '.join(PEERS)}, found {name!r}")
    if next(iter(PEERS)) not in names:
        names.insert(0, next(iter(PEERS)))  # what the others are compared with
    metadata = USUAL if asked.metadata else ()
    try:
        told = asyncio.run(run(names, CASES, asked.seconds, asked.rounds, asked.peers_dir.absolute(), metadata))
    except (PeerError, PreframedError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    print(markdown(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
