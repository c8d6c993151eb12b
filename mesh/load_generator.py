"""Load on one unary gRPC method: as much as the server takes (closed loop), or so many requests per second (open loop).

Made to cost little beside the server: no task and no future for a request; the answer to one sends the next. In an open
loop the latency of a request that had to wait for a free stream counts from when it was due, so that a server that
hangs does not hide it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from math import exp, inf, log, nan
from pathlib import Path
from typing import Final

from mesh.errors import Code
from mesh.h2_client import call_fields
from mesh.h2_peers import Link, connect
from mesh.h2_protocol import TICK_S
from mesh.http2.exchange import Exchange
from mesh.http2.frames import ErrorCode
from mesh.http2.grpc import timeout_field
from mesh.http2.limits import Limits
from mesh.rpc import Metadata
from mesh.tls import Tls, reason

_LIMITS: Final = Limits(
    max_message_bytes=(1 << 31) - 1,
    max_buffered_bytes=1 << 33,
    max_unsent_bytes=1 << 33,
    max_streams=1 << 20,
    free_frames=1e6,  # some servers send a window update and a ping with every answer
    free_frames_per_s=1e6,
)
_CONNECT_S: Final = 10.0
_RECONNECT_S: Final = 0.2
_GIVE_UP_S: Final = 10.0
"""Without a connection; the load ends then."""
_PACE_S: Final = 0.001
"""How often an open loop looks what is due: about what timers can do."""
_LINE: Final = 300
"""Characters of a server's words that are told."""
_WORDS: Final = 5
"""Different errors told in words; all are counted."""


class LoadError(Exception):
    """The load could not begin; one sentence."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where. Messages go round in order."""

    address: str
    """host:port, or unix:PATH."""
    method: str
    messages: Sequence[bytes]
    connections: int = 1
    streams: int = 1
    """The most requests in flight per connection."""
    seconds: float = 2.0
    requests: int = 0
    """Send so many instead, without warming up."""
    rate: float = 0.0
    """Requests per second on all connections together; 0: each answer is followed by the next request."""
    warm_up_s: float = 0.3
    """Of load that is not counted."""
    timeout_s: float = 60.0
    """Of each request, from when it is sent."""
    metadata: Metadata = ()
    server_pids: Sequence[int] = ()
    """Processes here whose CPU time is told, each with its descendants."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    requests: int
    """Answered with status OK."""
    errors: dict[str, int]
    """By gRPC status."""
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    server_us: list[float]
    """CPU time per answered request of each of `server_pids` and its descendants; NaN if it has ended."""
    client_us: float
    """The load generator's own."""
    sent_bytes: int = 0
    """Of messages, without what HTTP/2 adds."""
    received_bytes: int = 0
    words: list[str] = field(default_factory=list)
    """The first few different errors."""

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def cpu_us(self) -> float:
        """All servers together, per request."""
        return sum(self.server_us)


class Latencies:
    """Latencies in buckets that are one percent wide: memory does not grow with their number."""

    def __init__(self) -> None:
        self._counts = [0] * 2_600  # from a microsecond to two days
        self.longest_s = 0.0

    def add(self, latency_s: float) -> None:
        self._counts[int(100 * log(latency_s * 1e6)) if latency_s > 1e-6 else 0] += 1
        if latency_s > self.longest_s:
            self.longest_s = latency_s

    def percentile_s(self, percent: float) -> float:
        """NaN without any."""
        left = max(1.0, sum(self._counts) * percent / 100)
        for n, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return min(self.longest_s, exp((n + 0.5) / 100) * 1e-6)
        return nan


class LoadGenerator:
    """One load, once."""

    def __init__(self, load: Load, tls: Tls | None = None) -> None:
        self.load = load
        self._tls = tls
        self.latencies = Latencies()
        self.errors: Counter[str] = Counter()
        self.answered = 0
        self.started_s = inf
        """When counting began (`time.perf_counter`)."""
        self._words: dict[str, None] = {}
        self._sent_bytes = self._received_bytes = self._sent = 0
        self._messages = cycle(load.messages)
        self._most: float = load.requests or inf
        self._went_s = 0.0
        self._going = True
        self._measuring = False
        self._in_flight = 0
        self._links: list[_Link] = []
        self._done = asyncio.Event()
        self._fields = [
            (b":method", b"POST"),
            (b":scheme", b"https" if tls else b"http"),
            (b":authority", b"localhost" if load.address.startswith("unix:") else load.address.encode()),
            *call_fields(load.method, load.metadata),
            (b"grpc-timeout", timeout_field(load.timeout_s)),
        ]

    def stop(self) -> None:
        """End now; what was measured so far is the result."""
        self._going = False
        self._done.set()

    async def run(self) -> Result:
        """
        Raises:
            LoadError: no connection to the server.
        """
        load = self.load
        first: list[_Link] = []
        try:
            for _ in range(load.connections):
                first.append(await self._connect())
        except OSError as error:
            for link in first:
                link.end()
            raise LoadError(f"{load.address}: {_why(error)}") from None
        self._went_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._keep(link)) for link in first]
            tasks += [group.create_task(each) for each in (self._tick(), self._pace())]
            if not load.requests:
                await self._sleep(load.warm_up_s)
            self._measuring = True
            self.started_s, own_s = time.perf_counter(), time.process_time()
            servers_s = list(map(_cpu_s_or_nan, load.server_pids))
            if not load.requests:
                await self._sleep(load.seconds)
                self._finish()
            await self._done.wait()
            self._going = self._measuring = False
            seconds, own_s = time.perf_counter() - self.started_s, time.process_time() - own_s
            servers_s = [_cpu_s_or_nan(pid) - before for pid, before in zip(load.server_pids, servers_s, strict=True)]
            for task in tasks:
                task.cancel()
        return self._result(seconds, servers_s, own_s)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._done.wait(), seconds)

    def _finish(self) -> None:
        """Send no more, and end when all are answered."""
        self._going = False
        if not self._in_flight:
            self._done.set()

    def _result(self, seconds: float, servers_s: list[float], own_s: float) -> Result:
        done = max(1, self.answered)
        p50, p90, p99 = (self.latencies.percentile_s(percent) * 1e3 for percent in (50, 90, 99))
        return Result(
            requests=self.answered,
            errors=dict(self.errors),
            seconds=seconds,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            max_ms=self.latencies.longest_s * 1e3,
            server_us=[used / done * 1e6 for used in servers_s],
            client_us=own_s / done * 1e6,
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            words=list(self._words),
        )

    # Requests

    def _fill(self, link: _Link, *, waited: bool = False) -> None:
        """Send what is due on a connection that has room; `waited`: it had none before."""
        load, connection = self.load, link.connection
        while self._going and link.in_flight < load.streams and connection.ready:
            sent_s = time.perf_counter()
            due_s = self._went_s + self._sent / load.rate if load.rate else sent_s
            if due_s > sent_s or self._sent >= self._most:
                return
            message = next(self._messages)
            self._sent += 1
            self._in_flight += 1
            link.in_flight += 1
            if self._measuring:
                self._sent_bytes += len(message)
            request = _Request(self, link, due_s if waited else sent_s)
            link.call(connection.encoder.encode(self._fields), message, request)

    def ended(self, request: _Request) -> None:
        """A request was answered, or never will be."""
        link = request.link
        was_full = link.in_flight >= self.load.streams
        link.in_flight -= 1
        self._in_flight -= 1
        if self._measuring:
            if request.status == 0 and request.message is not None:
                self.answered += 1
                self._received_bytes += len(request.message)
                self.latencies.add(time.perf_counter() - request.due_s)
            else:
                self._failed(request.status, request.text)
        if was_full or not self.load.rate:
            self._fill(link, waited=was_full)
        if not self._in_flight and (not self._going or self._sent >= self._most):
            self._done.set()

    def _failed(self, status: int, text: str) -> None:
        name = Code(status).name if status in Code.__members__.values() else str(status)
        self.errors[name] += 1
        if len(self._words) < _WORDS:
            self._words[f"{name}: {one_line(text)}"] = None

    async def _pace(self) -> None:
        """An open loop's requests that no answer sends: each connection in turn gets what is due."""
        while self.load.rate and self._going:
            for link in self._links:
                self._fill(link)
            self._links[:] = self._links[1:] + self._links[:1]
            await asyncio.sleep(_PACE_S)

    async def _tick(self) -> None:
        """Once a second: what connections have to look at."""
        while True:
            await asyncio.sleep(TICK_S)
            for link in list(self._links):
                link.tick()

    # Connections

    async def _keep(self, link: _Link) -> None:
        """Use a connection until its end, then others in its place."""
        try:
            while True:
                self._links.append(link)
                self._fill(link)
                await link.ended.wait()
                self._links.remove(link)
                lost_s = time.perf_counter()
                while link.ended.is_set():
                    await asyncio.sleep(_RECONNECT_S)
                    try:
                        link = await self._connect()
                    except OSError as error:
                        self._failed(Code.UNAVAILABLE, f"{self.load.address}: {_why(error)}")
                        if time.perf_counter() > lost_s + _GIVE_UP_S:
                            self.stop()
        finally:
            link.end()
            await link.ended.wait()

    async def _connect(self) -> _Link:
        """
        Raises:
            OSError: includes TimeoutError.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            link = await connect(self.load.address, self._tls, lambda: _Link(loop, _LIMITS))
            await link.settled.wait()
        if not link.connection.open:
            raise OSError("the server speaks no HTTP/2")
        return link


class _Request(Exchange):
    __slots__ = ("_generator", "due_s", "link")

    def __init__(self, generator: LoadGenerator, link: _Link, due_s: float) -> None:
        super().__init__(link.loop.time() + generator.load.timeout_s)
        self.link = link
        self.due_s = due_s
        self._generator = generator

    def end(self, status: int, text: str) -> None:
        super().end(status, text)
        self._generator.ended(self)


class _Link(Link):
    """One connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        super().__init__(loop, limits)
        self.in_flight = 0
        self.settled = asyncio.Event()
        """The server's SETTINGS came, which say how many streams it takes, or the connection has ended."""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.settled.is_set() and (self.connection.settled or not self.connection.open):
            self.settled.set()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.settled.set()
        self.ended.set()

    def end(self) -> None:
        """Say goodbye; nothing is waited for."""
        self.connection.fail(ErrorCode.NO_ERROR, "")
        self.flush()
        self.abort()


def one_line(text: str) -> str:
    """A server's words, which may be a whole traceback."""
    words = " ".join(text.split())
    return words if len(words) <= _LINE else f"{words[:_LINE]} ..."


def _why(error: OSError) -> str:
    return reason(error) or "no connection in time"


def _cpu_s_or_nan(pid: int) -> float:
    try:
        return tree_cpu_s(pid)
    except OSError:
        return nan


def cpu_s(pid: int) -> float:
    """CPU time a process has used, threads that have ended included: its CPU clock (Linux, clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


def tree_cpu_s(pid: int) -> float:
    """CPU time of a process and of its descendants that live.

    Raises:
        OSError: there is no such process.
    """
    total_s = cpu_s(pid)
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with suppress(OSError):  # it has ended since
                total_s += tree_cpu_s(int(child))
    return total_s
