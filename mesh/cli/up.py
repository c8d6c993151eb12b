"""`densemesh up`: a cluster on this machine, for trying things out."""

from __future__ import annotations

import asyncio
import signal

import click

from mesh.config import Config
from mesh.local_cluster import ClusterError, LocalCluster
from mesh.local_etcd import LocalEtcdError


@click.command()
@click.option("--pods", type=click.IntRange(1, 64), default=3, show_default=True, help="Pods to start.")
@click.option("--models", default="", help="Model repository whose models are registered at start.")
@click.option("--capacity", default="512MiB", show_default=True, help="Memory per pod that loaded models may hold.")
@click.option("--allow-code", default="", help="As for `densemesh serve`.")
def up(pods: int, models: str, capacity: str, allow_code: str) -> int:
    """Start a mesh with a real etcd on loopback; Ctrl-C stops it and leaves nothing behind."""
    wrong = Config(models=models, capacity=capacity, allow_code=allow_code).validate()
    if wrong is not None:
        raise click.UsageError(wrong)
    try:
        asyncio.run(_run(pods, {"models": models, "capacity": capacity, "allow_code": allow_code}))
    except (ClusterError, LocalEtcdError) as error:
        raise click.ClickException(str(error)) from None
    return 0


async def _run(pods: int, settings: dict[str, str]) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    cluster = LocalCluster(pods, settings)
    starting = asyncio.create_task(cluster.__aenter__())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    await starting
    try:
        print(f"registry {cluster.registry}, logs in {cluster.directory}")
        for pod in cluster.pods:
            print(f"{pod.pod_id}  gRPC {pod.address}  metrics http://127.0.0.1:{pod.metrics_port}/metrics")
        print(f"try: densemesh status --target {cluster.pods[0].address}    Ctrl-C stops the mesh", flush=True)
        watching = asyncio.create_task(_first_death(cluster))
        await asyncio.wait({stopped, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            raise ClusterError(watching.result())
        watching.cancel()
    finally:
        stopped.cancel()
        print("stopping", flush=True)
        await asyncio.to_thread(cluster.stop)


async def _first_death(cluster: LocalCluster) -> str:
    """Why the cluster is no more what was asked for."""
    while True:
        for pod in cluster.pods:
            if pod.pid is None:
                return f"{pod.pod_id} has ended; its log ends with:\n{pod.last_words()}"
        if cluster.etcd.pid is None:
            return "etcd has ended"
        await asyncio.sleep(0.5)
