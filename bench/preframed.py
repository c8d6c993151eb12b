"""Load whose requests are framed once: h2load (nghttp2-client) where it is installed, else our own generator."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.load import run_load
from mesh.load_generator import Load

USUAL: Final[Sequence[tuple[str, str]]] = (
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ("x-tenant", "team-a"),
    ("authorization", "Bearer 0123456789abcdef0123456789abcdef"),
)
"""What clients and gateways often add."""
_HEADERS: Final[Sequence[tuple[str, str]]] = (("content-type", "application/grpc"), ("te", "trailers"))


class PreframedError(Exception):
    """Requests were not answered as they should be: the figure is none."""


@dataclass(frozen=True, slots=True)
class Preframed:
    """One message to one method of one server."""

    address: str
    method: str
    message: bytes
    answer_bytes: int
    """Of the answer's message; h2load does not look at gRPC's status, so bytes are what is checked."""
    metadata: Sequence[tuple[str, str]] = ()

    async def send(self, connections: int, streams: int, count: int, scratch: Path) -> float:
        """Send so many requests; the rate per second.

        Raises:
            PreframedError, JobError
        """
        if shutil.which("h2load") is None:
            load = Load(
                self.address, self.method, [self.message], connections, streams, requests=count, metadata=self.metadata
            )
            result = await run_load(load)
            if result.errors or result.received_bytes != count * self.answer_bytes:
                raise PreframedError(f"{self.address}: {result.errors}, {result.received_bytes} bytes")
            return result.per_second
        body = scratch / "body.bin"
        body.write_bytes(b"\0" + len(self.message).to_bytes(4, "big") + self.message)
        shape = ("-t1", f"-c{connections}", f"-m{streams}", f"-n{count}", "-d", str(body))
        headers = [word for key, value in (*_HEADERS, *self.metadata) for word in ("-H", f"{key}: {value}")]
        command = ["h2load", *shape, *headers, f"http://{self.address}{self.method}"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        return rate_of(done.stdout, count, self.answer_bytes + 5)


def rate_of(said: str, count: int, answer_bytes: int) -> float:
    """Requests per second out of h2load's report."""
    succeeded, rate = re.search(r"(\d+) succeeded", said), re.search(r"finished in .*?, ([\d.]+) req/s", said)
    data = re.search(r"\((\d+)\) data", said)
    if not (succeeded and rate and data):
        raise PreframedError(f"h2load says what is not understood:\n{said}")
    if int(succeeded[1]) != count or int(data[1]) != count * answer_bytes:
        raise PreframedError(f"{succeeded[1]} of {count} answered, {data[1]} bytes of {count * answer_bytes}:\n{said}")
    return float(rate[1])
