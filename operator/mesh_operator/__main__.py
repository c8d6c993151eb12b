"""`densemesh-operator`: InferenceServices of a Kubernetes cluster onto a mesh."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import click
import grpc
import kopf
import prometheus_client

from mesh_operator.handlers import Options, operate
from mesh_operator.leader import LEASE_S
from mesh_operator.mesh import MeshClient
from mesh_operator.reconciler import Places
from mesh_operator.world import Settings


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--mesh", "target", envvar="DENSEMESH_TARGET", default="localhost:8033", help="Any pod, as host:port.")
@click.option("--namespace", "namespaces", multiple=True, help="Watch only this one; may be repeated. By default all.")
@click.option(
    "--names",
    type=click.Choice(["auto", "plain", "namespaced"]),
    default="auto",
    help="What clients call models: <name> as in ModelMesh, or <namespace>.<name>. auto: plain for one --namespace.",
)
@click.option("--grpc-url", default="", help="What clients are told, as in grpc://mesh.serving:8033.")
@click.option("--rest-url", default="", help="The same for REST.")
@click.option(
    "--storage-config", default="", help="NAMESPACE/NAME of the secret with storage keys, to check that they exist."
)
@click.option(
    "--kserve-config", default="kserve/inferenceservice-config", help='KServe\'s ConfigMap; "": there is none.'
)
@click.option(
    "--lease", default="densemesh-operator", help='Lease by which several operators agree; "": this is the only one.'
)
@click.option("--lease-namespace", default="", help="By default that of the service account.")
@click.option(
    "--lease-s", type=click.FloatRange(1, 3600), default=float(LEASE_S), help="Seconds until another one takes it."
)
@click.option("--health-port", type=click.IntRange(0, 65535), default=8080, help="/healthz; 0: none.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=2113, help="/metrics; 0: none.")
@click.option("--tls", "use_tls", is_flag=True, help="TLS to the mesh; each of the next four implies it.")
@click.option("--tls-ca", envvar="DENSEMESH_TLS_CA", type=click.Path(path_type=Path), help="PEM authorities.")
@click.option(
    "--tls-cert", envvar="DENSEMESH_TLS_CERT", type=click.Path(path_type=Path), help="PEM certificate to show."
)
@click.option("--tls-key", envvar="DENSEMESH_TLS_KEY", type=click.Path(path_type=Path), help="Its PEM private key.")
@click.option("--tls-name", envvar="DENSEMESH_TLS_NAME", default="", help="Name in the pods' certificate.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def main(
    target: str,
    namespaces: tuple[str, ...],
    names: str,
    grpc_url: str,
    rest_url: str,
    storage_config: str,
    kserve_config: str,
    lease: str,
    lease_namespace: str,
    lease_s: float,
    health_port: int,
    metrics_port: int,
    use_tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str,
    log_level: str,
) -> None:
    """Serve the InferenceServices of a Kubernetes cluster that ask for ModelMesh.

    The API server is that of $KUBECONFIG, else of the pod's service account, else of ~/.kube/config.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for flag, place in (("--storage-config", storage_config), ("--kserve-config", kserve_config)):
        if place and (place.count("/") != 1 or not all(place.split("/"))):
            raise click.UsageError(f"{flag}: expected NAMESPACE/NAME, found {place!r}")
    credentials = None
    if use_tls or tls_ca or tls_cert or tls_key or tls_name:
        if (tls_cert is None) != (tls_key is None):
            raise click.UsageError("--tls-cert and --tls-key: expected both or neither")
        try:
            ca, key, cert = (path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_cert))
        except OSError as error:
            raise click.UsageError(f"{error.filename}: {error.strerror}") from None
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
    options = Options(
        namespaces,
        Settings(
            namespaced=names == "namespaced" or (names == "auto" and len(namespaces) != 1),
            grpc_url=grpc_url,
            rest_url=rest_url,
        ),
        Places(storage_config, kserve_config),
        lease,
        lease_namespace,
        lease_s,
        liveness=f"http://0.0.0.0:{health_port}/healthz" if health_port else "",
    )
    if metrics_port:
        prometheus_client.start_http_server(metrics_port)
    try:
        asyncio.run(_run(target, credentials, tls_name, options))
    except kopf.LoginError as error:
        raise click.ClickException(str(error)) from None


async def _run(target: str, credentials: grpc.ChannelCredentials | None, tls_name: str, options: Options) -> None:
    mesh = MeshClient(target, credentials, tls_name)
    try:
        await operate(mesh, options)
    finally:
        await mesh.close()


if __name__ == "__main__":
    main()
