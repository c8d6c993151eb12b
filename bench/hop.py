"""What does one hop cost? `python -m bench.hop`, with h2load (nghttp2-client) and nghttpx (nghttp2-proxy) on the PATH.

Two pods; one holds a synthetic identity model. Pre-framed ModelInfer requests with some metadata and a deadline go to
the other one, which forwards them, in every shape (connections x streams). Printed are microseconds of CPU time per
request, from the kernel's schedstat of all threads of a process: of the forwarder, of the holder asked directly (a hit)
and of nghttpx, where it is installed, in the forwarder's place. All are measured in each round, in turns; every figure
is the least of the rounds, for whatever else runs here only adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.rig import Mesh
from mesh.child import free_ports
from mesh.local_cluster import LocalPod
from protos import inference_pb2 as pb

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
SMALL, LARGE = 64, 150_528
"""Floats in the tensor: 291 bytes and 600 KB of request."""
SHAPES: Final = (
    *((SMALL, shape) for shape in ((1, 1), (4, 4), (8, 8), (64, 1))),
    *((LARGE, shape) for shape in ((1, 1), (4, 4), (8, 8))),
)
HEADERS: Final = (
    "content-type: application/grpc",
    "te: trailers",
    "grpc-timeout: 20S",
    "user-agent: h2load",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "x-tenant: team-a",
    "authorization: Bearer 0123456789abcdef0123456789abcdef",
)


def request(floats: int) -> bytes:
    """A ModelInfer message with its gRPC prefix."""
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(range(256)) * (floats // 64)])
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, floats])
    encoded: bytes = message.SerializeToString()
    return b"\0" + len(encoded).to_bytes(4, "big") + encoded


def cpu_us(pid: int) -> float:
    """CPU time of a process so far, over all its threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e3


def load(address: str, body: Path, shape: tuple[int, int], count: int, pid: int) -> float:
    """CPU microseconds per request of a process, while h2load sends `count` of them to an address."""
    connections, streams = shape
    before = cpu_us(pid)
    headers = [word for header in HEADERS for word in ("-H", header)]
    command = ["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-n{count}", "-d", str(body), *headers]
    said = subprocess.run([*command, f"http://{address}{METHOD}"], capture_output=True, text=True, check=True).stdout
    spent = cpu_us(pid) - before
    succeeded = re.search(r"(\d+) succeeded", said)
    assert succeeded, said
    assert int(succeeded[1]) == count, said
    return spent / count


@contextlib.contextmanager
def nghttpx(backend: str) -> Iterator[tuple[str, int] | None]:
    """The proxy in front of a pod: its address and process."""
    if shutil.which("nghttpx") is None:
        yield None
        return
    (port,) = free_ports(1)
    where = f"-b{backend.replace(':', ',')};;proto=h2", f"-f127.0.0.1,{port};no-tls"
    with subprocess.Popen(["nghttpx", *where, "-n1", "--single-process", "-LERROR"]) as process:
        try:
            time.sleep(0.5)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


async def measure(rounds: int, scale: float) -> None:
    async with Mesh(2, max_message=str(64 << 20)) as mesh:
        await mesh.register("m", "synthetic", "synthetic", load=True)
        holder = await mesh.holder("m")
        (forwarder,) = [pod for pod in mesh.pods if pod is not holder]
        with tempfile.TemporaryDirectory() as scratch, nghttpx(holder.address) as proxy:
            await asyncio.to_thread(table, forwarder, holder, proxy, Path(scratch), rounds, scale)


def table(
    forwarder: LocalPod, holder: LocalPod, proxy: tuple[str, int] | None, scratch: Path, rounds: int, scale: float
) -> None:
    assert forwarder.pid is not None
    assert holder.pid is not None
    ways = {"forwarder": (forwarder.address, forwarder.pid), "hit": (holder.address, holder.pid)}
    if proxy is not None:
        ways["nghttpx"] = proxy
    print("| CPU us | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for floats, shape in SHAPES:
        body = scratch / f"{floats}.bin"
        body.write_bytes(request(floats))
        count = int((600 if floats == LARGE else 6_000 if shape == (1, 1) else 30_000) * scale)
        runs = [[load(address, body, shape, count, pid) for address, pid in ways.values()] for _ in range(rounds)]
        least = [min(column) for column in zip(*runs, strict=True)]
        label = "x".join(map(str, shape)) + (" 600 KB" if floats == LARGE else "")
        print(f"| {label} | " + " | ".join(f"{figure:.1f}" for figure in least) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        parser.error("h2load is not installed (Debian: nghttp2-client)")
    asyncio.run(measure(options.rounds, options.scale))


if __name__ == "__main__":
    main()
