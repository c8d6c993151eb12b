"""CPU per request of a pod's front ends: `python -m bench.dataplane`, with h2load (nghttp2-client) on the PATH.

Starts one pod for each front end with a synthetic identity model, loads each with pre-framed ModelInfer requests in
every shape (connections x streams), and prints microseconds of the pod's CPU time per request, from the kernel's
schedstat of all its threads, with the ratio to the first front end. Answers are checked with a real client first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from mesh.frontends import FRONTENDS
from mesh.h2_client import H2Client
from mesh.local_cluster import LocalPod, ready
from protos import inference_pb2 as pb

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
SHAPES: Final = ((1, 1), (4, 4), (8, 8), (64, 1))
SMALL, LARGE = 64, 150_528
"""Floats in the tensor: 291 bytes and 600 KB of request."""


def request(floats: int) -> bytes:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(range(256)) * (floats // 64)])
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, floats])
    encoded: bytes = message.SerializeToString()
    return encoded


def cpu_us(pid: int) -> float:
    """CPU time of a process so far, over all its threads."""
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        total_ns += int(path.read_text().split()[0])
    return total_ns / 1e3


async def check(address: str, message: bytes) -> None:
    """Answers are what they should be.

    Raises:
        AssertionError
    """
    client = H2Client()
    for _ in range(50):  # and the model is known to be fast then
        response, _ = await client.call(address, METHOD, message, (), asyncio.get_running_loop().time() + 30)
        answer, asked = pb.ModelInferResponse.FromString(response), pb.ModelInferRequest.FromString(message)
        assert answer.raw_output_contents == asked.raw_input_contents
    await client.close()


def load(pod: LocalPod, body: Path, connections: int, streams: int, count: int) -> tuple[float, float]:
    """CPU microseconds per request, and requests per second."""
    headers = ("-H", "content-type: application/grpc", "-H", "te: trailers")
    shape = ("-t1", f"-c{connections}", f"-m{streams}", f"-n{count}", "-d", str(body))
    assert pod.pid is not None
    before = cpu_us(pod.pid)
    command = ["h2load", *shape, *headers, f"http://{pod.address}{METHOD}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = cpu_us(pod.pid) - before
    succeeded, rate = re.search(r"(\d+) succeeded", said), re.search(r"finished in .*?, ([\d.]+) req/s", said)
    assert succeeded, said
    assert rate, said
    assert int(succeeded[1]) == count, said
    return spent / count, float(rate[1])


def measure(pod: LocalPod, scratch: Path, scale: float) -> dict[str, float]:
    """CPU microseconds per request by shape: the best of three, for whatever else runs here only adds."""
    found: dict[str, float] = {}
    for floats, label, shapes in ((SMALL, "", SHAPES), (LARGE, " 600KB", SHAPES[:2])):
        body = scratch / f"{floats}.bin"
        message = request(floats)
        asyncio.run(check(pod.address, message))
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        for connections, streams in shapes:
            count = int((600 if label else 6_000 if connections == 1 else 30_000) * scale)
            runs = [load(pod, body, connections, streams, count) for _ in range(3)]
            found[f"{connections}x{streams}{label}"] = min(cpu for cpu, _ in runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frontends", default=",".join(FRONTENDS), help="comma-separated, the first is the reference")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        parser.error("h2load is not installed (Debian: nghttp2-client)")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        model = scratch / "models" / "m"
        model.mkdir(parents=True)
        (model / "model.synthetic.json").write_text(json.dumps({"size_bytes": 1 << 20}))
        for frontend in options.frontends.split(","):
            settings = {"models": str(model.parent), "frontend": frontend, "log_level": "WARNING"}
            pod = LocalPod("bench", "memory://", scratch / f"{frontend}.log", settings)
            pod.start()
            try:
                asyncio.run(ready([pod]))
                rows[frontend] = measure(pod, scratch, options.scale)
            finally:
                pod.terminate()
                pod.wait()
    shapes = list(next(iter(rows.values())))
    print("| front end | " + " | ".join(shapes) + " |")
    print("|---|" + "---|" * len(shapes))
    first = next(iter(rows.values()))
    for frontend, row in rows.items():
        cells = [f"{row[s]:.1f}" + (f" ({row[s] / first[s]:.1f}x)" if row is not first else "") for s in shapes]
        print(f"| {frontend} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
