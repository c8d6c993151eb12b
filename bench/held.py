"""What do requests and connections cost that only wait? `python -m bench.held`

1,000 requests to a model that takes a minute wait on one pod until their deadline, from 10 connections; then 10,000
connections that have made one call each stay open. Told are the pod's memory (resident, and its share of what is
shared) beside what it was before, and its CPU time per second while nothing happens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from bench.peers.base import INFER, message
from mesh.config import format_bytes
from mesh.h2_peers import Link, connect
from mesh.http2.exchange import Exchange
from mesh.http2.grpc import fields_of
from mesh.http2.limits import Limits
from mesh.load_generator import Load, LoadError, LoadGenerator, Result, tree_cpu_s
from mesh.local_cluster import ClusterError, LocalPod, ready
from mesh.loop import new_event_loop

STREAMS_PER_CONNECTION: Final = 100
_SETTLE_S: Final = 3.0
_SPARE_S: Final = 3.0
"""After watching, until the deadlines."""
_IDLE: Final = Limits(keepalive_s=3_600.0)
"""Clients that send no pings, which is what grpcio's do by default."""


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident set, and proportional set."""
    said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    resident, proportional = (re.search(rf"^{name}: +(\d+) kB", said, re.MULTILINE) for name in ("Rss", "Pss"))
    assert resident
    assert proportional
    return int(resident[1]) << 10, int(proportional[1]) << 10


async def observed(title: str, count: int, pid: int, seconds: float, hold: Callable[[], Awaitable[None]]) -> None:
    """Print what `count` things cost while they are held."""
    before = memory_bytes(pid)
    await hold()
    await asyncio.sleep(_SETTLE_S)
    cpu_s, started_s = tree_cpu_s(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    cpu_ms = (tree_cpu_s(pid) - cpu_s) / (time.perf_counter() - started_s) * 1e3
    after = memory_bytes(pid)
    print(f"{title}: {cpu_ms:.1f} ms of CPU per second")
    for name, least, most in zip(("resident", "proportional"), before, after, strict=True):
        each = format_bytes((most - least) // count)
        print(f"  {name} {format_bytes(least)} before, {format_bytes(most)} while they wait: {each} each")


async def streams(pod: LocalPod, pid: int, count: int, seconds: float) -> None:
    """
    Raises:
        LoadError: it ended otherwise than by deadlines.
    """
    connections = max(1, count // STREAMS_PER_CONNECTION)
    timeout_s = _SETTLE_S + seconds + _SPARE_S
    load = Load(
        pod.address, INFER, [message("slow")], connections, count // connections, requests=count, timeout_s=timeout_s
    )
    running: list[asyncio.Task[Result]] = []

    async def hold() -> None:
        running.append(asyncio.create_task(LoadGenerator(load).run()))

    started_s = time.perf_counter()
    await observed(f"{count:,} requests that wait, on {connections} connections", count, pid, seconds, hold)
    if running[0].done():
        raise LoadError(f"the requests did not wait: {running[0].result()}")
    held_s = time.perf_counter() - started_s
    result = await running[0]
    print(f"  waited {held_s:.0f} s; then {result.errors}")


async def connections(pod: LocalPod, pid: int, count: int, seconds: float) -> None:
    """
    Raises:
        LoadError: a call was not answered.
    """
    loop = asyncio.get_running_loop()
    links: list[Link] = []
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode()), (b":authority", b"bench")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), *fields_of([("x-tenant", "a")])]

    async def hold() -> None:
        for _ in range(count):
            link = await connect(pod.address, None, lambda: Link(loop, _IDLE))
            answered = _Answered(loop)
            link.call(link.connection.encoder.encode(fields), message("fast"), answered)
            await answered.future
            if answered.status:
                raise LoadError(f"{answered.status}: {answered.text}")
            links.append(link)

    await observed(f"{count:,} idle connections, one call made on each", count, pid, seconds, hold)
    for link in links:
        link.abort()


class _Answered(Exchange):
    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.future: asyncio.Future[None] = loop.create_future()

    def end(self, status: int, text: str) -> None:
        super().end(status, text)
        self.future.set_result(None)


async def run(requests: int, idle: int, seconds: float) -> None:
    """
    Raises:
        LoadError, ClusterError
    """
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        scratch = Path(directory)
        for name, infer_ms in (("slow", 60_000), ("fast", 0)):
            (scratch / "models" / name).mkdir(parents=True)
            settings = {"size_bytes": 1024, "infer_ms": infer_ms}
            (scratch / "models" / name / "model.synthetic.json").write_text(json.dumps(settings))
        for measure, count in ((streams, requests), (connections, idle)):
            flags = {"models": str(scratch / "models"), "log_level": "WARNING", "drain_timeout_s": "0"}
            pod = LocalPod("bench", "memory://", scratch / f"{measure.__name__}.log", flags)
            pod.start()
            try:
                await ready([pod])
                assert pod.pid is not None
                await LoadGenerator(Load(pod.address, INFER, [message("fast")], 4, 4, requests=2_000)).run()
                await measure(pod, pod.pid, count, seconds)
            finally:
                pod.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of watching each (%(default)s)")
    asked = parser.parse_args()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < asked.connections + 200:
        parser.error(f"--connections: expected at most {most - 200}: no more files may be open (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, asked.connections + 200), most))
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run(asked.requests, asked.connections, asked.seconds))
    except (LoadError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
