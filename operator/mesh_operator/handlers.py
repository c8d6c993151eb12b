"""The operator as it runs: kopf watches, the reconciler works. Nothing is decided here.

kopf is only told to watch (`on.event`): it keeps no annotations and finalizers of its own in users' objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import kopf

from mesh_operator.kube import KubeClient
from mesh_operator.leader import LEASE_S, Leadership
from mesh_operator.mesh import MeshClient
from mesh_operator.reconciler import Places, Reconciler
from mesh_operator.runtimes import runtime_of
from mesh_operator.world import Settings

log = logging.getLogger(__name__)

_GROUP: Final = "serving.kserve.io"
_WORKERS: Final = 16


@dataclass(frozen=True, slots=True)
class Options:
    """How the operator runs."""

    namespaces: Sequence[str] = ()
    """Empty: all."""
    settings: Settings = field(default_factory=Settings)
    places: Places = field(default_factory=Places)
    lease: str = "densemesh-operator"
    """Empty: this is the only operator."""
    lease_namespace: str = ""
    """Empty: that of the service account or of the kubeconfig."""
    lease_s: float = LEASE_S
    liveness: str = ""
    """As in http://0.0.0.0:8080/healthz."""


def login() -> kopf.ConnectionInfo:
    """$KUBECONFIG, else the pod's service account, else ~/.kube/config.

    Raises:
        kopf.LoginError
    """
    settings = kopf.OperatorSettings()
    found = None if os.environ.get("KUBECONFIG") else kopf.login_with_service_account(settings=settings)
    found = found or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise kopf.LoginError("neither a kubeconfig nor a service account was found")
    return found


async def operate(mesh: MeshClient, options: Options) -> None:
    """Run until SIGTERM or SIGINT, which kopf sees to, or until the API server cannot be watched at all.

    Raises:
        kopf.LoginError
    """
    kube = KubeClient(login)
    await kube.connect()
    try:
        reconciler = Reconciler(kube, mesh, options.settings, options.places)
        async with _working(reconciler, kube, options):
            await kopf.operator(
                registry=_registry(reconciler),
                settings=_settings(),
                standalone=True,  # the lease says who works
                clusterwide=not options.namespaces,
                namespaces=options.namespaces,
                liveness_endpoint=options.liveness or None,
            )
    finally:
        await kube.close()


@asynccontextmanager
async def _working(reconciler: Reconciler, kube: KubeClient, options: Options) -> AsyncIterator[None]:
    """The workers, and the lease that lets them."""
    tasks = [asyncio.create_task(reconciler.work()) for _ in range(_WORKERS)]
    if options.lease:
        identity = f"{socket.gethostname()}_{uuid.uuid4()}"
        namespace = options.lease_namespace or kube.namespace
        leadership = Leadership(kube, namespace, options.lease, identity, lease_s=options.lease_s)
        tasks.append(asyncio.create_task(leadership.hold(reconciler.resume, reconciler.pause)))
    else:
        reconciler.resume()
    try:
        yield
    finally:
        reconciler.queue.close()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _registry(reconciler: Reconciler) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def log_in(**_: Any) -> kopf.ConnectionInfo:
        return login()

    @kopf.on.event(_GROUP, "v1beta1", "inferenceservices", registry=registry)
    async def inferenceservice(event: Any, **_: Any) -> None:
        manifest = event["object"]
        if event["type"] == "DELETED":
            reconciler.gone(manifest)
        else:
            reconciler.seen(manifest)

    @kopf.on.event(_GROUP, "v1alpha1", "servingruntimes", registry=registry)
    @kopf.on.event(_GROUP, "v1alpha1", "clusterservingruntimes", registry=registry)
    async def runtime(event: Any, **_: Any) -> None:
        metadata = event["object"]["metadata"]
        if event["type"] == "DELETED":
            reconciler.runtime_gone(metadata.get("namespace") or "", metadata["name"])
        else:
            reconciler.runtime_seen(runtime_of(event["object"]))

    return registry


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are ours to post
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 30
    settings.networking.error_backoffs = [0.5, 1, 2, 4]
    return settings
