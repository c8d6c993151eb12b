"""A mesh on this machine: pod processes on a real etcd. For `densemesh up`, the demo, the benches and the tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mesh.child import free_ports, spawn
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.local_etcd import LocalEtcd
from mesh.management import MESH
from mesh.rpc import Client
from mesh.tls import Tls, TlsFiles
from protos import management_pb2 as pb

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0
_PLAINTEXT: Final = {f"tls_{field.name}": "" for field in fields(TlsFiles)}
"""Whatever the environment says for other pods."""


class ClusterError(Exception):
    """A pod did not start; carries its last words."""


class LocalPod:
    """One `densemesh serve` process on loopback."""

    def __init__(self, pod_id: str, registry: str, log: Path, settings: Mapping[str, str]) -> None:
        self.pod_id = pod_id
        self.log = log
        self.grpc_port, self.metrics_port = free_ports(2)
        self._command = [
            *(sys.executable, "-m", "mesh", "serve", "--host", "127.0.0.1", "--pod-id", pod_id),
            *("--registry", registry, "--grpc-port", str(self.grpc_port), "--metrics-port", str(self.metrics_port)),
            *(word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start, or start again on the same ports, without waiting."""
        with self.log.open("ab") as log:
            self._process = spawn(self._command, output=log, environment=os.environ)

    def terminate(self) -> None:
        """SIGTERM: it drains."""
        if self.pid is not None and self._process:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def wait(self) -> int:
        """Wait until it has ended, by force after STOP_TIMEOUT_S; its exit status."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class LocalCluster:
    """An etcd and some pods, in a directory that is removed in the end unless one was given."""

    def __init__(self, pods: int, settings: Mapping[str, str], *, directory: Path | None = None) -> None:
        """`settings`: flags of `densemesh serve` for every pod, by field name of `Config`."""
        settings = {**_PLAINTEXT, **settings}
        self._scratch = None if directory else tempfile.TemporaryDirectory(prefix="densemesh-")
        self.directory = directory or Path(self._scratch.name if self._scratch else "")
        self.etcd = LocalEtcd()
        self.registry = f"etcd://{self.etcd.url}/densemesh"
        self.pods = [
            LocalPod(f"pod-{n}", self.registry, self.directory / f"pod-{n}.log", settings) for n in range(1, pods + 1)
        ]

    async def __aenter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            await self.etcd.__aenter__()
            for pod in self.pods:
                pod.start()
            await self.ready()
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    async def ready(self) -> None:
        """Return when every pod serves and knows the others.

        Raises:
            ClusterError: see `ready`.
        """
        await ready(self.pods)

    def stop(self) -> None:
        """Drain all pods, then stop etcd. Safe to repeat."""
        for pod in self.pods:
            pod.terminate()
        for pod in self.pods:
            pod.wait()
        self.etcd.stop()
        if self._scratch:
            self._scratch.cleanup()


async def ready(pods: Sequence[LocalPod], tls: Tls | None = None) -> None:
    """Return when every pod serves and knows the others; `tls`: how they are reached.

    Raises:
        ClusterError: one ended, or START_TIMEOUT_S passed.
    """
    client = H2Client(tls=tls)
    pod_ids = {pod.pod_id for pod in pods}
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            for pod in pods:
                while not pod_ids <= await _known(client, pod):
                    for ended in (each for each in pods if each.pid is None):
                        raise ClusterError(f"{ended.pod_id} has ended; its log ends with:\n{ended.last_words()}")
                    await asyncio.sleep(0.05)
    except TimeoutError:
        words = "\n".join(f"{pod.pod_id}:\n{pod.last_words()}" for pod in pods)
        raise ClusterError(f"the pods do not serve after {START_TIMEOUT_S:.0f} s:\n{words}") from None
    finally:
        await client.close()


async def _known(client: Client, pod: LocalPod) -> set[str]:
    """The pods that a pod knows; none while it does not serve."""
    try:
        return {known.pod_id for known in (await get_state(client, pod.address)).pods}
    except MeshError:
        return set()


async def get_state(client: Client, address: str, *, models: bool = False, timeout_s: float = 10.0) -> pb.MeshState:
    """What a pod says of the mesh.

    Raises:
        MeshError
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    request = pb.GetStateRequest(models=models).SerializeToString()
    response, _ = await client.call(address, MESH + "GetState", request, (), deadline)
    return pb.MeshState.FromString(response)
