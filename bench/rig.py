"""What the benches share: models, requests, a mesh to send them to, and lines of figures and ratios."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from rich.console import Console

from bench.jobs import JobError
from bench.load import median, run_load
from mesh.errors import MeshError
from mesh.grpcio_client import GrpcioClient
from mesh.inference import SERVICE
from mesh.load_generator import Load, Result
from mesh.local_cluster import ClusterError, LocalCluster, LocalPod, get_state
from mesh.local_etcd import LocalEtcdError
from mesh.management import MODEL_MESH
from protos import inference_pb2, management_pb2

INFER: Final = SERVICE + "ModelInfer"
CONCURRENCY: Final = ((1, 1), (4, 4), (8, 8))
"""Connections and streams per connection."""
ROUNDS: Final = 3
WIDTH: Final = 64
"""FP32 numbers in a request: a row of the digits."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of figures, and the line it is compared with."""

    name: str
    load: str
    """Connections x streams."""
    result: Result
    than: Row | None

    def ratios(self) -> dict[str, float]:
        """Each figure over the comparator's; empty: this is one."""
        if self.than is None:
            return {}
        return {figure: getattr(self.result, figure) / getattr(self.than.result, figure) for figure in _FIGURES}

    def line(self) -> str:
        """For people."""
        cells = [f"{self.load:>4}  {self.name:27}"]
        for figure, form in _FIGURES.items():
            ratio = self.ratios().get(figure)
            cells.append(form.format(getattr(self.result, figure)) + (f" {ratio:6.2f}x" if ratio else " " * 8))
        if self.than:
            cells.append(f"against {self.than.name}")
            if len(self.result.server_us) > 1:
                asked_us = self.result.server_us[0]
                cells.append(f"(asked pod alone {asked_us:,.0f} us, {asked_us / self.than.result.cpu_us:.2f}x)")
        return "  ".join(cells).rstrip()

    def to_json(self) -> dict[str, Any]:
        figures = {**asdict(self.result), "per_second": self.result.per_second, "cpu_us": self.result.cpu_us}
        than = self.than.name if self.than else None
        return {"name": self.name, "load": self.load, **figures, "than": than, "ratios": self.ratios()}


_FIGURES: Final = {
    "per_second": "{:6,.0f} /s",
    "cpu_us": "{:6,.0f} us CPU",
    "p50_ms": "p50 {:6.2f} ms",
    "p99_ms": "p99 {:6.2f} ms",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to measure, once per round."""

    name: str
    load: str
    run: Callable[[], Awaitable[Result]]
    than: str = ""
    """Name of the variant to compare with, which comes earlier; empty: this is one to compare with."""


class Bench:
    """Measures variants in turns, shows their figures, and keeps them."""

    def __init__(self, console: Console, seconds: float) -> None:
        self.console = console
        self.seconds = seconds
        self.rows: list[Row] = []

    async def compare(self, *variants: Variant) -> None:
        """Measure each variant in each round, so that a disturbance meets all of them alike; medians of the rounds.

        Raises:
            JobError: requests failed: a figure with errors in it is none.
        """
        results: dict[str, list[Result]] = {variant.name: [] for variant in variants}
        with self.console.status("") as status:
            for n in range(ROUNDS):
                for variant in variants:
                    status.update(f"{variant.load} {variant.name}, round {n + 1} of {ROUNDS}")
                    result = await variant.run()
                    if result.errors or not result.requests:
                        words = "; ".join(result.words)
                        raise JobError(
                            f"{variant.name}, {variant.load}: {sum(result.errors.values())} requests failed: {words}"
                        )
                    results[variant.name].append(result)
        rows: dict[str, Row] = {}
        for variant in variants:
            result = median(results[variant.name])
            rows[variant.name] = Row(variant.name, variant.load, result, rows[variant.than] if variant.than else None)
            self.console.print(rows[variant.name].line())
        self.rows += rows.values()


class Mesh:
    """A local cluster, and the few calls that benches make to it."""

    def __init__(self, pods: int, **settings: str) -> None:
        self._cluster = LocalCluster(pods, settings)
        self.client = GrpcioClient()

    async def __aenter__(self) -> Self:
        await self._cluster.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.close()
        await self._cluster.__aexit__(kind, error, trace)

    @property
    def pods(self) -> list[LocalPod]:
        return self._cluster.pods

    async def register(self, model_id: str, format_name: str, path: str, *, load: bool = False, key: str = "") -> None:
        """Register a model, and wait until it is loaded if that is wanted.

        Raises:
            MeshError
        """
        info = management_pb2.ModelInfo(type=format_name, path=path, key=key)
        request = management_pb2.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)
        deadline = asyncio.get_running_loop().time() + 60
        message = request.SerializeToString()
        await self.client.call(self.pods[0].address, MODEL_MESH + "registerModel", message, (), deadline)

    async def unregister(self, model_id: str) -> None:
        """
        Raises:
            MeshError
        """
        message = management_pb2.UnregisterModelRequest(modelId=model_id).SerializeToString()
        deadline = asyncio.get_running_loop().time() + 60
        await self.client.call(self.pods[0].address, MODEL_MESH + "unregisterModel", message, (), deadline)

    async def holder(self, model_id: str) -> LocalPod:
        """The pod that holds the model's only copy."""
        state = await get_state(self.client, self.pods[0].address, models=True)
        (model,) = (model for model in state.models if model.model_id == model_id)
        (copy,) = model.status.modelCopyInfos
        return next(pod for pod in self.pods if pod.pod_id == copy.location)

    async def evictions(self) -> int:
        """So far, on all pods."""
        return sum([(await get_state(self.client, pod.address)).fates.evictions for pod in self.pods])

    async def load(self, pod: LocalPod, messages: Sequence[bytes], shape: tuple[int, int], **options: Any) -> Result:
        """What comes of a load on one pod of `shape` connections x streams; CPU is that pod's first, then the others'.

        Raises:
            JobError
        """
        others = [other for other in self.pods if other is not pod]
        pids = [each.pid for each in (pod, *others) if each.pid is not None]
        return await run_load(Load(pod.address, INFER, messages, *shape, server_pids=pids, **options))


def infer_message(model_id: str, width: int = WIDTH) -> bytes:
    """A V2 request with one row of FP32 numbers."""
    row = np.linspace(0, 1, width, dtype="<f4")
    given = inference_pb2.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[1, width])
    request = inference_pb2.ModelInferRequest(model_name=model_id, inputs=[given], raw_input_contents=[row.tobytes()])
    return request.SerializeToString()


def write_mlp(path: Path, hidden: int, *, seed: int = 7) -> int:
    """An ONNX network of three layers with random weights, WIDTH to `hidden` to `hidden` to 10; its bytes on disk."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, widths = np.random.default_rng(seed), [WIDTH, hidden, hidden, 10]
    nodes, weights, last = [], [], "input"
    for n, (rows, columns) in enumerate(pairwise(widths)):
        values = (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)
        weights += [numpy_helper.from_array(values, f"w{n}")]
        weights += [numpy_helper.from_array(np.zeros(columns, np.float32), f"b{n}")]
        nodes.append(helper.make_node("Gemm", [last, f"w{n}", f"b{n}"], [f"z{n}"]))
        nodes.append(helper.make_node("Relu" if n < 2 else "Softmax", [f"z{n}"], [f"a{n}"]))
        last = f"a{n}"
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", WIDTH])
    answer = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "mlp", [given], [answer], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return path.write_bytes(model.SerializeToString())


def main(title: str, work: Callable[[Bench], Awaitable[None]], *, seconds: float) -> int:
    """A bench's command line: run it, show its figures; `--json FILE` keeps them."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="measured time per figure and round (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    bench = Bench(Console(highlight=False, soft_wrap=True), asked.seconds)
    bench.console.print(title)
    try:
        asyncio.run(_complete(work(bench)))
    except KeyboardInterrupt:
        bench.console.print("interrupted; nothing is left running")
        return 130
    except (JobError, ClusterError, LocalEtcdError, MeshError) as error:
        bench.console.print(f"error: {error}", markup=False)
        return 1
    if asked.json:
        asked.json.write_text(json.dumps([row.to_json() for row in bench.rows], indent=1) + "\n")
    return 0


async def _complete(work: Awaitable[None]) -> None:
    await work
