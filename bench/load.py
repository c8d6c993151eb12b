"""A closed-loop load generator: grpc.aio, unmodified, raw bytes, in a process of its own.

Every stream of every connection sends the next message as soon as its last answer is there. The job also reads the CPU
time of the servers' processes at the start and the end of the measured time, and its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np

from bench.jobs import result_of, tell

WARM_UP_S: Final = 0.3
TIMEOUT_S: Final = 60.0
_OPTIONS: Final = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
"""Without a pool of its own a channel would share its connection with every other one to the same address."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where. Messages go round in order."""

    address: str
    method: str
    messages: Sequence[bytes]
    connections: int = 1
    streams: int = 1
    """Requests in flight per connection."""
    seconds: float = 2.0
    once: bool = False
    """Send every message once instead, and do not warm up."""
    server_pids: Sequence[int] = ()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "messages": [b64encode(message).decode() for message in self.messages]})

    @classmethod
    def from_json(cls, text: str) -> Load:
        said = json.loads(text)
        return cls(**{**said, "messages": [b64decode(message) for message in said["messages"]]})


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    requests: int
    errors: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    server_us: list[float]
    """CPU time per request of each server process, in the order of `server_pids`."""
    client_us: float
    """The load generator's own CPU time per request."""
    words: list[str] = field(default_factory=list)
    """The first few errors."""

    @classmethod
    def median(cls, rounds: Sequence[Result]) -> Result:
        """The rounds as one result: requests add up, all figures are medians."""
        middle = {name: float(np.median([getattr(each, name) for each in rounds])) for name in _FIGURES}
        requests = sum(each.requests for each in rounds)
        return cls(
            requests=requests,
            errors=sum(each.errors for each in rounds),
            seconds=requests / middle.pop("per_second"),
            server_us=[float(used) for used in np.median([each.server_us for each in rounds], axis=0)],
            words=[word for each in rounds for word in each.words],
            **middle,
        )

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def cpu_us(self) -> float:
        """All servers together, per request."""
        return sum(self.server_us)


_FIGURES: Final = ("per_second", "p50_ms", "p99_ms", "max_ms", "client_us")


async def run_load(load: Load) -> Result:
    """Run a load in its own process.

    Raises:
        JobError
    """
    with tempfile.NamedTemporaryFile("w", prefix="densemesh-load-", suffix=".json") as plan:
        plan.write(load.to_json())
        plan.flush()
        return Result(**await result_of("bench.load", plan.name))


def cpu_s(pid: int) -> float:
    """CPU time a process has used, threads that have ended included: its CPU clock (Linux, clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


# The job


class _Generator:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._measuring = load.once
        self._running = True
        self._latencies_s: list[float] = []
        self._errors: list[str] = []

    async def run(self) -> Result:
        load = self._load
        channels = [grpc.aio.insecure_channel(load.address, options=_OPTIONS) for _ in range(load.connections)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        messages: Iterator[bytes] = iter(load.messages) if load.once else itertools.cycle(load.messages)
        streams = [
            asyncio.create_task(self._stream(channel, messages)) for channel in channels for _ in range(load.streams)
        ]
        if not load.once:
            await asyncio.sleep(WARM_UP_S)
        self._measuring = True
        servers_s, own_s, started_s = list(map(cpu_s, load.server_pids)), time.process_time(), time.perf_counter()
        if not load.once:
            await asyncio.sleep(load.seconds)
            self._running = False
        await asyncio.gather(*streams)
        seconds, own_s = time.perf_counter() - started_s, time.process_time() - own_s
        servers_s = [cpu_s(pid) - before for pid, before in zip(load.server_pids, servers_s, strict=True)]
        await asyncio.gather(*(channel.close() for channel in channels))
        done = max(1, len(self._latencies_s))
        p50, p99, most = np.percentile(self._latencies_s or [float("nan")], [50, 99, 100]) * 1e3
        return Result(
            requests=len(self._latencies_s),
            errors=len(self._errors),
            seconds=seconds,
            p50_ms=p50,
            p99_ms=p99,
            max_ms=most,
            server_us=[used / done * 1e6 for used in servers_s],
            client_us=own_s / done * 1e6,
            words=self._errors[:5],
        )

    async def _stream(self, channel: Any, messages: Iterator[bytes]) -> None:
        call = channel.unary_unary(self._load.method)
        for message in messages:
            started_s = time.perf_counter()
            try:
                await call(message, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._errors.append(f"{error.code().name}: {error.details()}")
            else:
                if self._measuring:
                    self._latencies_s.append(time.perf_counter() - started_s)
            if not self._running:
                return


def main() -> int:
    load = Load.from_json(Path(sys.argv[1]).read_text())
    tell(asdict(asyncio.run(_Generator(load).run())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
