"""What do many tenants gain by being run in one call? `python -m bench.cross_tenant [--pod] [--json FIGURES.json]`

Tenants bring weights for one perceptron. So many requests of one row are always in flight, each to a tenant drawn at
random. Through the executor: one by one (`infer` of each request's model), and in joint runs of all that are in flight
(several requests to one tenant as its rows), as a pod makes them. By hand are torch's modules, one for each tenant,
called one by one. The ways take turns; figures are medians of the rounds. With `--pod` the same through a pod process,
whose tenants may and may not be run together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from bench.rig import Bench, Mesh, Variant, infer_message
from loaders.base import Artifact, Tensor
from loaders.safetensors import SafetensorsLoader, SafetensorsModel
from mesh.settings import ModelSettings, to_key

NETWORKS: Final = ("64-128-10", "128-256-256-10", "512-512-512-128")
TENANTS: Final = (16, 64, 400)
IN_FLIGHT: Final = (16, 64)
_WINDOWS: Final = 50
"""Sets of requests in flight, of which each round runs all."""
BY_HAND: Final = "torch modules, one by one"


@dataclass(frozen=True, slots=True)
class Figures:
    """One line."""

    network: str
    tenants: int
    in_flight: int
    way: str
    request_us: float
    """CPU time."""
    faster: float
    """Times as torch's modules."""
    than_one_by_one: float


def widths_of(network: str) -> list[int]:
    return [int(width) for width in network.split("-")]


def module_of(network: str, seed: int) -> nn.Sequential:
    """A tenant's perceptron with ReLU between its layers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for rows, columns in pairwise(widths_of(network)):
        layers += [nn.Linear(rows, columns), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def declared(network: str) -> dict[str, Any]:
    """Its architecture."""
    widths = widths_of(network)
    layers: list[object] = []
    for n in range(len(widths) - 1):
        layers += [{"linear": str(2 * n)}, "relu"]
    return {"input": {"shape": [-1, widths[0]]}, "layers": layers[:-1]}


Window = Sequence[tuple[int, Tensor]]
"""Requests in flight: a tenant and one row each."""


def one_by_one(models: Sequence[SafetensorsModel], window: Window) -> None:
    for tenant, x in window:
        models[tenant].infer({"input": x}, ("output",))


def jointly(models: Sequence[SafetensorsModel], window: Window) -> None:
    """As `mesh.hits` does it."""
    rows: dict[int, list[Tensor]] = {}
    for tenant, x in window:
        rows.setdefault(tenant, []).append(x)
    chosen = [models[tenant] for tenant in rows]
    requests = [{"input": each[0] if len(each) == 1 else np.concatenate(each)} for each in rows.values()]
    family = chosen[0].family
    assert family is not None
    for result, each in zip(family.infer_many(chosen, requests, ("output",)), rows.values(), strict=True):
        output = result["output"]
        for n in range(len(each)) if len(each) > 1 else ():
            output[n : n + 1]


def by_hand(modules: Sequence[nn.Module], window: Window) -> None:
    with torch.inference_mode():
        for tenant, x in window:
            modules[tenant](torch.from_numpy(x)).numpy()


def measure(network: str, tenants: int, in_flight: int, rounds: int, scratch: Path) -> list[Figures]:
    """All ways of one network."""
    loader, rng = SafetensorsLoader(), np.random.default_rng(0)
    modules = [module_of(network, seed) for seed in range(tenants)]
    models = []
    for seed, module in enumerate(modules):
        path = scratch / f"{seed}.safetensors"
        save_file(module.state_dict(), path)
        models.append(loader.load(Artifact(path, {"architecture": declared(network)})))
        models[-1].join()
    rows = rng.standard_normal((_WINDOWS, in_flight, 1, widths_of(network)[0])).astype(np.float32)
    windows = [[(int(rng.integers(tenants)), x) for x in each] for each in rows]
    ways: dict[str, Callable[[Window], None]] = {
        BY_HAND: partial(by_hand, modules),
        "one by one": partial(one_by_one, models),
        "jointly": partial(jointly, models),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(rounds + 1):
        for way, run in ways.items():
            started = time.process_time()
            for window in windows:
                run(window)
            if n:  # the first warms up
                taken[way].append((time.process_time() - started) / _WINDOWS / in_flight * 1e6)
    for model in models:
        model.unload()
    each_us = {way: median(times) for way, times in taken.items()}
    return [
        Figures(network, tenants, in_flight, way, us, each_us[BY_HAND] / us, each_us["one by one"] / us)
        for way, us in each_us.items()
    ]


async def through_a_pod(bench: Bench, network: str, tenants: int) -> None:
    """The same weights registered twice: tenants that may be run together, and tenants that may not."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as scratch:
        async with Mesh(1) as mesh:
            messages: dict[str, list[bytes]] = {}
            for way, together in (("one by one", False), ("jointly", True)):
                for seed in range(tenants):
                    path = Path(scratch) / f"{seed}.safetensors"
                    save_file(module_of(network, seed).state_dict(), path)
                    key = to_key(ModelSettings(parameters={"architecture": declared(network), "together": together}))
                    await mesh.register(f"{way[:1]}{seed}", "safetensors", str(path), load=True, key=key)
                drawn = rng.integers(tenants, size=4096)
                messages[way] = [infer_message(f"{way[:1]}{tenant}", widths_of(network)[0]) for tenant in drawn]
            for shape in ((4, 4), (8, 8)):
                load = "x".join(map(str, shape))
                await bench.compare(
                    *(
                        Variant(
                            f"{network}, {tenants} tenants, {way}",
                            load,
                            partial(
                                mesh.load, mesh.pods[0], messages[way], shape, seconds=bench.seconds, warm_up_s=2.0
                            ),
                            than="" if way == "one by one" else f"{network}, {tenants} tenants, one by one",
                        )
                        for way in messages
                    )
                )


def _measured(asked: argparse.Namespace) -> Iterator[Figures]:
    for network in asked.networks:
        for tenants in asked.tenants:
            for in_flight in asked.in_flight:
                with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as scratch:
                    yield from measure(network, tenants, in_flight, asked.rounds, Path(scratch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="widths of layers (%(default)s)")
    parser.add_argument("--tenants", nargs="+", type=int, default=list(TENANTS), help="how many (%(default)s)")
    parser.add_argument("--in-flight", nargs="+", type=int, default=list(IN_FLIGHT), help="requests (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are told (%(default)s)")
    parser.add_argument("--pod", action="store_true", help="through a pod instead: the first network, 64 tenants")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    figures: list[Any] = []
    if asked.pod:
        bench = Bench(console, 1.5)
        asyncio.run(through_a_pod(bench, asked.networks[0], 64))
        figures = [row.to_json() for row in bench.rows]
    else:
        console.print("| network | tenants | in flight | way | CPU us per request | x by hand | x one by one |")
        console.print("|---|---|---|---|---|---|---|")
        for row in _measured(asked):
            cells = f"{row.request_us:.2f} | {row.faster:.1f}x | {row.than_one_by_one:.1f}x"
            console.print(f"| {row.network} | {row.tenants} | {row.in_flight} | {row.way} | {cells} |")
            figures.append(asdict(row))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
