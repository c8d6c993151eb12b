"""`make demo`: hundreds of tenant models on a small mesh, real V2 traffic, and every answer compared.

1. Train the tenants (`bench.tenants`), in a directory that is removed in the end.
2. Start pods and an etcd, with memory for a third of the models, and register the models through all pods.
3. Send V2 gRPC traffic of skewed popularity from an unmodified client (`bench.client`) to all pods.
4. Exit status 0 if every response was there and was the model's own prediction, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.client import Plan, Report
from bench.jobs import Job, JobError
from bench.scoreboard import Scoreboard
from bench.tenants import Tenant, train
from mesh.config import format_bytes
from mesh.errors import MeshError
from mesh.grpcio_client import GrpcioClient
from mesh.local_cluster import ClusterError, LocalCluster, LocalPod, get_state
from mesh.local_etcd import LocalEtcdError
from mesh.management import MODEL_MESH
from protos import management_pb2 as pb

SHARE_HELD: Final = 1 / 3
"""Of all models' bytes, what the pods together have memory for."""
LEAST_HELD: Final = 3
"""A pod has memory for this many of the largest model, so that a few models make a demo too."""
REGISTERING: Final = 8
"""Registrations under way at once."""
POLL_S: Final = 0.5
WORKERS: Final = 4
SKEW: Final = 1.1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says."""

    models: int
    seconds: float
    pods: int
    torch: bool
    seed: int


async def train_shown(settings: Settings, directory: Path, console: Console) -> list[Tenant]:
    """Train the tenants under a progress bar, or a line per fifty where there is no terminal.

    Raises:
        JobError
    """
    started_s, done = time.monotonic(), 0
    columns = (TextColumn("training tenants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=settings.models)

        def on_tenant(tenant: Tenant) -> None:
            nonlocal done
            done += 1
            progress.advance(bar)
            if not console.is_terminal and done % 50 == 0:
                console.print(f"trained {done} of {settings.models} tenants")

        tenants = await train(directory, settings.models, seed=settings.seed, torch=settings.torch, on_tenant=on_tenant)
    served = sorted({tenant.format for tenant in tenants})
    kinds = ", ".join(f"{sum(tenant.format == name for tenant in tenants)} served as {name}" for name in served)
    console.print(f"{len(tenants)} tenants trained in {time.monotonic() - started_s:.1f} s: {kinds}")
    return tenants


async def exercise(settings: Settings, tenants: Sequence[Tenant], directory: Path, console: Console) -> Scoreboard:
    """Serve the tenants on a mesh, send traffic, compare.

    Raises:
        ClusterError, LocalEtcdError: the mesh does not start, or a pod ended.
        MeshError: a model cannot be registered.
        JobError: the client broke.
    """
    total_bytes = sum(tenant.estimated_bytes for tenant in tenants)
    largest_bytes = max(tenant.estimated_bytes for tenant in tenants)
    capacity_bytes = max(int(total_bytes * SHARE_HELD / settings.pods), LEAST_HELD * largest_bytes)
    console.print(
        f"models need {format_bytes(total_bytes)}; {settings.pods} pods with {format_bytes(capacity_bytes)} each hold "
        f"{capacity_bytes * settings.pods / total_bytes:.0%} of that"
    )
    flags = {
        "capacity": str(capacity_bytes),
        "cache_dir": str(directory / "cache"),
        "allow_code": "pt2" if settings.torch else "",
        "preload": ",".join(sorted({tenant.format for tenant in tenants})),
    }
    started_s = time.monotonic()
    client = GrpcioClient()
    try:
        async with LocalCluster(settings.pods, flags, directory=directory / "cluster") as cluster:
            console.print(f"{settings.pods} pods and an etcd started in {time.monotonic() - started_s:.1f} s")
            await register(client, cluster.pods, tenants, console)
            registered = (await get_state(client, cluster.pods[0].address)).models_registered
            plan = Plan(
                [pod.address for pod in cluster.pods], list(tenants), settings.seconds, WORKERS, SKEW, settings.seed
            )
            plan.write(directory / "plan.json")
            async with Job("bench.client", str(directory / "plan.json")) as job:
                with Scoreboard(console, len(tenants), registered) as board:
                    await follow(job, board, client, cluster.pods)
            await poll(board, client, cluster.pods)
    finally:
        await client.close()
    return board


async def register(client: GrpcioClient, pods: Sequence[LocalPod], tenants: Sequence[Tenant], console: Console) -> None:
    """Register every tenant, through one pod after the other."""
    started_s, turns = time.monotonic(), asyncio.Semaphore(REGISTERING)

    async def one(pod: LocalPod, tenant: Tenant) -> None:
        info = pb.ModelInfo(type=tenant.format, path=tenant.path)
        request = pb.RegisterModelRequest(modelId=tenant.model_id, modelInfo=info).SerializeToString()
        async with turns:
            deadline = asyncio.get_running_loop().time() + 30
            await client.call(pod.address, MODEL_MESH + "registerModel", request, (), deadline)

    await asyncio.gather(*(one(pods[n % len(pods)], tenant) for n, tenant in enumerate(tenants)))
    console.print(f"{len(tenants)} models registered in {time.monotonic() - started_s:.1f} s")


async def follow(job: Job, board: Scoreboard, client: GrpcioClient, pods: Sequence[LocalPod]) -> None:
    """Show the traffic and the pods until the client has ended.

    Raises:
        ClusterError, JobError
    """
    polling = asyncio.create_task(_poll_on(board, client, pods))
    try:
        async for line in job.lines():
            if "words" in line:
                board.words = line["words"]
            else:
                board.report(Report(**line))
            board.show()
            if polling.done():
                polling.result()
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)


async def _poll_on(board: Scoreboard, client: GrpcioClient, pods: Sequence[LocalPod]) -> None:
    while True:
        with suppress(MeshError):  # a pod that is too busy to tell is not what is tested
            await poll(board, client, pods)
        await asyncio.sleep(POLL_S)


async def poll(board: Scoreboard, client: GrpcioClient, pods: Sequence[LocalPod]) -> None:
    """Ask every pod how it is.

    Raises:
        ClusterError: one has ended.
        MeshError: one does not answer.
    """
    for pod in pods:
        if pod.pid is None:
            raise ClusterError(f"{pod.pod_id} has ended; its log ends with:\n{pod.last_words()}")
        board.states[pod.pod_id] = await get_state(client, pod.address)


async def run(settings: Settings, directory: Path, console: Console) -> int:
    """All of it; the exit status."""
    return await serve(settings, await train_shown(settings, directory, console), directory, console)


async def serve(settings: Settings, tenants: Sequence[Tenant], directory: Path, console: Console) -> int:
    """All but the training; the exit status."""
    board = await exercise(settings, tenants, directory, console)
    board.summary()
    return 0 if board.agreed else 1


async def _interruptible(settings: Settings, directory: Path, console: Console) -> int:
    """`run`, cancelled by the first Ctrl-C or SIGTERM; further ones do not disturb the cleaning up."""
    running = asyncio.create_task(run(settings, directory, console))
    caught: list[signal.Signals] = []

    def interrupted(number: signal.Signals) -> None:
        if not caught:
            running.cancel()
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted, number)
    status = 1
    try:
        status = await running
    except asyncio.CancelledError:
        status = 128 + caught[0]
    except (JobError, ClusterError, LocalEtcdError, MeshError) as error:
        console.print(f"error: {error}", markup=False)
    return status


def parse(arguments: Sequence[str] | None) -> Settings:
    """The command line. `TORCH=1` in the environment, as `make demo TORCH=1` sets it, is `--torch`."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=200, help="tenants to train and register (%(default)s)")
    parser.add_argument("--seconds", type=float, default=25.0, help="how long to send traffic (%(default)s)")
    parser.add_argument("--pods", type=int, default=3, help="(%(default)s)")
    torch = bool(os.environ.get("TORCH"))
    parser.add_argument("--torch", action="store_true", default=torch, help="a quarter of the tenants in PyTorch")
    parser.add_argument("--seed", type=int, default=7, help="draws tenants and traffic (%(default)s)")
    settings = Settings(**vars(parser.parse_args(arguments)))
    for name, least in (("models", 1), ("seconds", 0.1), ("pods", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            parser.error(f"--{name}: expected at least {least}")
    needed = ("sklearn", "skops", "onnxruntime", "skl2onnx", "tritonclient", *(("torch",) if settings.torch else ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        extras = "demo,torch" if settings.torch else "demo"
        parser.error(f"{', '.join(missing)} not installed: pip install 'densemesh[{extras}]'")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    settings, console, started_s = parse(arguments), Console(highlight=False, soft_wrap=True), time.monotonic()
    # Outside the event loop, which ends only when the cluster has been stopped: nobody writes here any more.
    with tempfile.TemporaryDirectory(prefix="densemesh-demo-") as directory:
        os.environ["TMPDIR"] = directory  # ONNX Runtime and torch leave files of their own in it
        status = asyncio.run(_interruptible(settings, Path(directory), console))
    ended = "interrupted after" if status >= 128 else "in all"
    console.print(f"{ended} {time.monotonic() - started_s:.0f} s; nothing is left running")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after the event loop
        print("interrupted", file=sys.stderr)
        sys.exit(130)
