"""How long until a model on disk answers? `python -m bench.activation [--json FIGURES.json]`

Tenants' fine-tunes of one network are activated by turns and given up again, ten times one way before the next way has
its turn. Told is t(first output) less t(a warm run): the activation alone, with the page faults and allocations of a
first run in it. `--torch` adds perceptrons in torch's and safetensors' files. Files are in the system's page cache. The
comparator is a session made by hand from the `.onnx` file with ONNX Runtime's defaults; a plain copy of the weights'
bytes from the page cache into memory that is there is the floor for whatever copies them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench import networks
from bench.cross_tenant import declared, module_of
from loaders.base import Artifact, LoadedModel, Loader, Tensor
from loaders.fleet.architectures import WEIGHTS_FILE
from loaders.fleet.model import SharedLoader
from loaders.fleet.split import split
from loaders.memory.weights import WeightsFile
from loaders.onnx import OnnxLoader
from loaders.safetensors import SafetensorsLoader

_WARM_RUNS: Final = 3
_IN_A_ROW: Final = 10


@dataclass(frozen=True, slots=True)
class Network:
    """What tenants fine-tune, and a request small enough that running is not all one sees."""

    write: Callable[[Path, int], int]
    x: Tensor
    trials: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """One model on disk."""

    onnx: Path
    prepared: Path
    """The folder that it was split into."""


Run = Callable[[], object]
Way = Callable[[Tenant, Tensor], "Iterator[Run]"]
"""Activates a tenant's model as a context manager; what it gives runs the model once."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One line."""

    network: str
    weights_bytes: int
    way: str
    trials: int
    median_ms: float
    p99_ms: float
    warm_run_ms: float
    faster: float
    """Times the comparator, by the medians."""


TORCH: dict[tuple[int, ...], int] = {(64, 128, 10): 500, (512, 512, 512, 128): 300, (2048, 4096, 4096, 1000): 20}
"""Trials by widths of perceptrons in torch's files: 38 KB, 2.4 MB, 117 MB."""
NETWORKS: Final = {
    "MLP, 10 KB": Network(partial(networks.mlp, widths=(32, 48, 10)), np.ones((1, 32), np.float32), 2000),
    "MLP, 2.4 MB": Network(partial(networks.mlp, widths=(512, 512, 512, 128)), np.ones((1, 512), np.float32), 500),
    "ResNet-50, 100 MB": Network(networks.resnet, np.ones((1, 3, 32, 32), np.float32), 60),
    "BERT-base, 440 MB": Network(networks.bert, np.ones((1, 8), np.int64), 30),
}


@contextmanager
def by_hand(tenant: Tenant, x: Tensor) -> Iterator[Run]:
    """What a script would do."""
    session = ort.InferenceSession(str(tenant.onnx))
    yield lambda: session.run(None, {"input": x})


@contextmanager
def _loaded(
    loader: Loader, path: Path, x: Tensor, parameters: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Run]:
    model: LoadedModel = loader.load(Artifact(path, parameters))
    yield lambda: model.infer({"input": x}, ["output"])
    model.unload()


def plain(tenant: Tenant, x: Tensor) -> Any:
    """A session of the model's own, as pods make it while it is not prepared: without threads."""
    return _loaded(OnnxLoader(), tenant.onnx, x)


def shared(tenant: Tenant, x: Tensor) -> Any:
    """The architecture is known, and the file was checked when this process met it first."""
    return _loaded(SharedLoader(), tenant.prepared, x)


def met_first(tenant: Tenant, x: Tensor) -> Any:
    """The architecture is known; checksums are compared."""
    os.utime(tenant.prepared / WEIGHTS_FILE)
    return shared(tenant, x)


COMPARATOR: Final = "InferenceSession(path)"
COPY: Final = "copy of the bytes"
WAYS: Final[Mapping[str, Callable[[Tenant, Tensor], Any]]] = {
    COMPARATOR: by_hand,
    "plain, as pods load it": plain,
    "shared architecture": shared,
    "shared, met for the first time": met_first,
}


def activation_s(way: Callable[[Any, Tensor], Any], tenant: Any, x: Tensor) -> tuple[float, float]:
    """Time to the first output beyond that of a warm run, and that of a warm run."""
    started = time.perf_counter()
    with way(tenant, x) as run:
        run()
        first_s = time.perf_counter() - started
        warm_s = []
        for _ in range(_WARM_RUNS):
            started = time.perf_counter()
            run()
            warm_s.append(time.perf_counter() - started)
    return first_s - median(warm_s), median(warm_s)


def measure(name: str, tenants: int, trials: int, scratch: Path) -> list[Figures]:
    """All ways of one network."""
    network, made = NETWORKS[name], []
    for seed in range(tenants):
        folder = scratch / f"{seed}"
        folder.mkdir()
        network.write(scratch / f"{seed}.onnx", seed)
        split(Artifact(scratch / f"{seed}.onnx"), folder)
        made.append(Tenant(scratch / f"{seed}.onnx", folder))
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in (*WAYS, COPY)}
    with WeightsFile(made[0].prepared / WEIGHTS_FILE) as file:
        run = file.run
    space = np.empty_like(run)
    space[:] = 0
    gc.disable()  # which would strike wherever it likes
    with shared(made[0], network.x):  # known from here on
        for begin in range(0, trials, _IN_A_ROW):
            for way in WAYS:
                activation_s(WAYS[way], made[-1], network.x)  # back into the processor's caches
                for trial in range(begin, min(begin + _IN_A_ROW, trials)):
                    taken[way].append(activation_s(WAYS[way], made[trial % tenants], network.x))
            for _ in range(begin, min(begin + _IN_A_ROW, trials)):
                started = time.perf_counter()
                np.copyto(space, run)
                taken[COPY].append((time.perf_counter() - started, 0.0))
            gc.collect()
    gc.enable()
    return _rows(name, run.nbytes, taken, trials)


def _rows(
    name: str, weights_bytes: int, taken: Mapping[str, Sequence[tuple[float, float]]], trials: int
) -> list[Figures]:
    """The first way is the comparator."""
    rows, than_ms = [], 0.0
    for way, times in taken.items():
        activations = [elapsed_s * 1e3 for elapsed_s, _ in times]
        typical, warm = median(activations), median(warm_s * 1e3 for _, warm_s in times)
        than_ms = than_ms or typical
        p99 = quantiles(activations, n=100, method="inclusive")[-1]
        rows.append(Figures(name, weights_bytes, way, trials, typical, p99, warm, than_ms / typical))
    return rows


@contextmanager
def torch_load(tenant: Path, x: Tensor, make: Callable[[], Any]) -> Iterator[Run]:
    """What a script would do: build the module, read its state."""
    module = make()
    module.load_state_dict(torch.load(tenant.with_suffix(".pt")))
    yield lambda: _called(module, x)


@contextmanager
def safetensors_load(tenant: Path, x: Tensor, make: Callable[[], Any]) -> Iterator[Run]:
    """The same with safetensors, and no weights drawn that are not used."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(load_file(tenant), assign=True)
    yield lambda: _called(module, x)


def _called(module: Any, x: Tensor) -> object:
    with torch.inference_mode():
        return module(torch.from_numpy(x)).numpy()


def measure_torch(widths: Sequence[int], tenants: int, trials: int, scratch: Path) -> list[Figures]:
    """Weights of a perceptron in torch's and safetensors' files."""
    network, x = "-".join(map(str, widths)), np.ones((1, widths[0]), np.float32)
    make, paths = partial(module_of, network, 0), [scratch / f"{seed}.safetensors" for seed in range(tenants)]
    for seed, path in enumerate(paths):
        state = module_of(network, seed).state_dict()
        save_file(state, path)
        torch.save(state, path.with_suffix(".pt"))
    loader, parameters = SafetensorsLoader(), {"architecture": declared(network)}
    ways: dict[str, Callable[[Any, Tensor], Any]] = {
        "torch.load + module": partial(torch_load, make=make),
        "safetensors.load + module": partial(safetensors_load, make=make),
        "safetensors, as pods load it": partial(_loaded, loader, parameters=parameters),
    }
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    known = loader.load(Artifact(paths[0], parameters))
    for trial in range(trials):
        for way, activate in ways.items():
            taken[way].append(activation_s(activate, paths[trial % tenants], x))
    known.unload()
    return _rows(f"torch MLP {network}", paths[0].stat().st_size, taken, trials)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS), help="which ONNX networks (%(default)s)"
    )
    parser.add_argument("--tenants", type=int, default=3, help="fine-tunes of each network (%(default)s)")
    parser.add_argument("--trials", type=int, help="activations of each network and way; by default each network's own")
    parser.add_argument("--torch", action="store_true", help="perceptrons in torch's and safetensors' files too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    if asked.tenants < 1 or (asked.trials is not None and asked.trials < 2):
        parser.error("--tenants: expected at least 1; --trials: at least 2")
    console, figures = Console(highlight=False, soft_wrap=True), []

    def shown(rows: list[Figures]) -> list[Figures]:
        for row in rows:
            cells = f"{row.median_ms:,.3f} | {row.p99_ms:,.3f} | {row.faster:,.1f}x | {row.warm_run_ms:,.3f}"
            console.print(f"| {row.network} | {row.way} | {cells} |")
        return rows

    console.print("| network | way | median ms | p99 ms | faster | warm run ms |\n|---|---|---|---|---|---|")
    for name in asked.networks:
        with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as scratch:
            rows = measure(name, asked.tenants, asked.trials or NETWORKS[name].trials, Path(scratch))
        figures += shown(rows)
    for widths, trials in TORCH.items() if asked.torch else ():
        with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as scratch:
            figures += shown(measure_torch(widths, asked.tenants, asked.trials or trials, Path(scratch)))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in figures], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
