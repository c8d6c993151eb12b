"""How much memory do many tenants' fine-tunes take in one pod? `python -m bench.density [--json FIGURES.json]`

1,000 fine-tunes of a network of 1 MB and 200 of one of 20 MB, weights from seeds, no two alike, in one real pod. Each
is asked once, and the answers of some are compared with ONNX Runtime's own. They were prepared before, as after a
restart of the pod (`loaders.fleet`). Beside it, in the same run, a pod that serves models as they are, with a fifth of
them. Told is memory above what the pod took before its first model, over the bytes of the weights: resident (mapped
weights included, which the system may take back), the part of it that is not mapped from files, and threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from rich.console import Console

from bench.networks import mlp
from loaders.base import Artifact, LoaderError
from loaders.prepare.preparation import Outcome, Preparation
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.inference import SERVICE
from mesh.local_cluster import ClusterError, LocalPod, ready
from mesh.loop import new_event_loop
from mesh.management import MODEL_MESH
from protos import inference_pb2, management_pb2

KINDS: Final[dict[str, tuple[tuple[int, ...], int]]] = {
    "1 MB": ((256, 640, 128), 1000),
    "20 MB": ((1024, 2048, 1280, 256), 200),
}
"""Widths of the layers, and how many tenants."""
PLAIN_SHARE: Final = 5
"""One in so many is served as it is, too."""
_COMPARED: Final = 20
_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Tenant:
    """One model on disk."""

    name: str
    kind: str
    path: Path
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process."""

    resident: int
    private: int
    """Anonymous: what is not mapped from files."""
    threads: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes = {name: int(kb) << 10 for name, kb in re.findall(r"^(\w+): +(\d+) kB", said, re.MULTILINE)}
        return cls(sizes["Rss"], sizes["Anonymous"], len(os.listdir(f"/proc/{pid}/task")))


@dataclass(frozen=True, slots=True)
class Figures:
    """One line."""

    pod: str
    models: int
    weights_bytes: int
    resident_bytes: int
    """Above the pod's own, as is the next."""
    private_bytes: int
    base_bytes: int
    threads: int
    first_request_ms: float
    """Mean of the kind asked last, _AT_ONCE at a time: the load is in it."""

    @property
    def ratio(self) -> float:
        """Resident bytes over those of weights; 0: there are none."""
        return self.resident_bytes / self.weights_bytes if self.weights_bytes else 0.0

    def line(self) -> str:
        """For people."""
        mb = [f"{size / 1e6:,.0f}" for size in (self.weights_bytes, self.resident_bytes, self.private_bytes)]
        cells = [f"{self.models:,}", *mb, f"{self.ratio:.2f}" if self.ratio else "", f"{self.base_bytes / 1e6:,.0f}"]
        cells += [f"{self.threads}", f"{self.first_request_ms:.1f}" if self.first_request_ms else ""]
        return f"| {self.pod} | {' | '.join(cells)} |"


def write(folder: Path, share: int) -> list[Tenant]:
    """The tenants' models, by kind; one in `share` of them."""
    tenants = list[Tenant]()
    for kind, (widths, count) in KINDS.items():
        weights_bytes = 4 * sum((rows + 1) * columns for rows, columns in pairwise(widths))
        for n in range(count // share):
            name = f"{kind.replace(' ', '').lower()}-{n:04d}"
            mlp(folder / f"{name}.onnx", len(tenants), widths)
            tenants.append(Tenant(name, kind, folder / f"{name}.onnx", weights_bytes))
    return tenants


def prepare(tenants: Iterable[Tenant], cache: Path) -> float:
    """Have all prepared, as a pod that uses this directory would; seconds.

    Raises:
        LoaderError: one could not be.
    """
    started = time.perf_counter()
    preparation = Preparation(cache / "prepared", 64 << 30)
    preparation.start()
    try:
        for tenant in tenants:
            outcome = preparation.prepare("onnx", Artifact(tenant.path))
            if outcome is not Outcome.PREPARED:
                raise LoaderError(f"{tenant.name}: {outcome}")
    finally:
        preparation.close()
    return time.perf_counter() - started


class Asked:
    """A pod and how it is asked."""

    def __init__(self, title: str, scratch: Path, settle_s: float, **settings: str) -> None:
        flags = {"log_level": "WARNING", "capacity": "16GiB", "drain_timeout_s": "0", "preload": "onnx", **settings}
        self.title = title
        self._settle_s = settle_s
        self.pod = LocalPod("bench", "memory://", scratch / f"{title}.log", flags)
        self.client = H2Client()
        self.rows: list[Figures] = []

    async def measure(self, tenants: list[Tenant]) -> None:
        """
        Raises:
            ClusterError, MeshError
        """
        self.pod.start()
        try:
            await ready([self.pod])
            await asyncio.sleep(self._settle_s)
            base, loaded = self._tell(None, []), list[Tenant]()
            for kind in KINDS:
                one_kind = [tenant for tenant in tenants if tenant.kind == kind]
                await self._each(one_kind, self._register)
                started = time.perf_counter()
                await self._each(one_kind, self._ask)
                elapsed_ms = (time.perf_counter() - started) / len(one_kind) * 1e3
                loaded += one_kind
                await asyncio.sleep(self._settle_s)
                self._tell(base, loaded, elapsed_ms * _AT_ONCE)
            await self._each(loaded, self._unregister)
            await asyncio.sleep(self._settle_s)
            self._tell(base, [])
        finally:
            await self.client.close()
            self.pod.kill()

    def _tell(self, base: Memory | None, loaded: list[Tenant], first_request_ms: float = 0.0) -> Memory:
        assert self.pod.pid is not None
        now = Memory.of(self.pod.pid)
        than = base or now
        weights = sum(tenant.weights_bytes for tenant in loaded)
        title = self.title if loaded else f"{self.title}, {'before' if base is None else 'all unloaded'}"
        self.rows.append(
            Figures(
                title,
                len(loaded),
                weights,
                now.resident - than.resident,
                now.private - than.private,
                than.resident,
                now.threads,
                first_request_ms,
            )
        )
        return now

    async def _each(self, tenants: list[Tenant], work: Callable[[Tenant], Awaitable[None]]) -> None:
        waiting = iter(tenants)

        async def worker() -> None:
            for tenant in waiting:
                await work(tenant)

        async with asyncio.TaskGroup() as workers:
            for _ in range(_AT_ONCE):
                workers.create_task(worker())

    async def _call(self, path: str, message: bytes) -> bytes:
        deadline = asyncio.get_running_loop().time() + 120
        answer, _ = await self.client.call(self.pod.address, path, message, (), deadline)
        return answer

    async def _register(self, tenant: Tenant) -> None:
        info = management_pb2.ModelInfo(type="onnx", path=str(tenant.path))
        request = management_pb2.RegisterModelRequest(modelId=tenant.name, modelInfo=info)
        await self._call(MODEL_MESH + "registerModel", request.SerializeToString())

    async def _unregister(self, tenant: Tenant) -> None:
        request = management_pb2.UnregisterModelRequest(modelId=tenant.name)
        await self._call(MODEL_MESH + "unregisterModel", request.SerializeToString())

    async def _ask(self, tenant: Tenant) -> None:
        width = KINDS[tenant.kind][0][0]
        x = np.linspace(-1, 1, width, dtype="<f4").reshape(1, width)
        given = inference_pb2.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=x.shape)
        request = inference_pb2.ModelInferRequest(
            model_name=tenant.name, inputs=[given], raw_input_contents=[x.tobytes()]
        )
        said = await self._call(SERVICE + "ModelInfer", request.SerializeToString())
        if int(tenant.name[-4:]) < _COMPARED:
            answer = np.frombuffer(inference_pb2.ModelInferResponse.FromString(said).raw_output_contents[0], "<f4")
            expected = ort.InferenceSession(str(tenant.path)).run(None, {"input": x})[0].ravel()
            if not np.allclose(answer, expected, 1e-3, 1e-4):
                raise ClusterError(f"{tenant.name} answers {answer[:3]}, ONNX Runtime {expected[:3]}")


def run(share: int, settle_s: float, console: Console) -> list[Figures]:
    """
    Raises:
        LoaderError, ClusterError, MeshError
    """
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        scratch, cache = Path(directory), Path(directory) / "cache"
        tenants = write(scratch, share)
        elapsed_s = prepare(tenants, cache)
        console.print(f"{len(tenants):,} models prepared in {elapsed_s:.0f} s", highlight=False)
        fewer = [tenant for tenant in tenants if int(tenant.name[-4:]) % PLAIN_SHARE == 0]
        rows = []
        for asked, some in (
            (Asked("shared", scratch, settle_s, cache_dir=str(cache), prepare="true", prepared_size="64GiB"), tenants),
            (Asked("plain", scratch, settle_s, cache_dir=str(scratch / "other"), prepare="false"), fewer),
        ):
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(asked.measure(some))
            rows += asked.rows
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=1, help="make one in so many of the tenants (%(default)s)")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before memory is read (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    if not 1 <= asked.share <= 40:
        parser.error("--share: expected 1 to 40")
    console = Console(highlight=False, soft_wrap=True)
    try:
        rows = run(asked.share, asked.settle, console)
    except* (LoaderError, ClusterError, MeshError) as errors:
        print(f"error: {errors.exceptions[0]}", file=sys.stderr)
        sys.exit(1)
    names = (
        "pod",
        "models",
        "weights MB",
        "resident MB",
        "private MB",
        "ratio",
        "base MB",
        "threads",
        "first answer ms",
    )
    console.print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for row in rows:
        console.print(row.line(), markup=False)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
