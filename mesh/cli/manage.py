"""The commands that talk to a running mesh over the management API of any of its pods."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from mesh.cli.memory import show_memory
from mesh.config import format_bytes
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.management import MESH, MODEL_MESH
from mesh.tls import Tls, TlsError, TlsFiles
from protos import management_pb2 as pb

M = TypeVar("M", bound=Message)
P = ParamSpec("P")

Status: Final = pb.ModelStatusInfo.ModelStatus
VStatus: Final = pb.VModelStatusInfo.VModelStatus


class Target:
    """A pod to talk to, and how to show what it says."""

    def __init__(self, address: str, output: str, timeout_s: float, tls: Tls | None) -> None:
        self.address = address
        self.tls = tls
        self.as_json = output == "json"
        self.timeout_s = timeout_s

    def call(self, method: str, request: Message, kind: type[M]) -> M:
        """One RPC; its failure is one sentence."""
        return asyncio.run(self._call(method, request, kind))

    async def _call(self, method: str, request: Message, kind: type[M]) -> M:
        client = H2Client(tls=self.tls)
        try:
            deadline = asyncio.get_running_loop().time() + self.timeout_s
            response, _ = await client.call(self.address, method, request.SerializeToString(), (), deadline)
        except MeshError as error:
            raise click.ClickException(f"{error.code.name}: {error}") from None
        finally:
            await client.close()
        return kind.FromString(response)

    def show(self, message: Message, *parts: str | Table) -> None:
        """The answer, for people or as JSON."""
        if self.as_json:
            print(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2))
        else:
            for part in parts:
                _print(part)


def _print(text: str | Table) -> None:
    """Lines are as long as what they say; only a table on a terminal is made to fit."""
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(text, highlight=False, markup=False, soft_wrap=isinstance(text, str))


def _open_tls(use_tls: bool, files: dict[str, str]) -> Tls | None:
    try:
        return Tls(TlsFiles(**files)) if use_tls or any(files.values()) else None
    except TlsError as error:
        raise click.UsageError(str(error)) from None


def secured(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Add what says how the pod is reached over TLS, and hand `tls` to the command; a pod's own variables will do."""

    @wraps(command)
    def with_tls(use_tls: bool, **arguments: Any) -> int | None:
        files = {field.name: arguments.pop(f"tls_{field.name}", "") for field in fields(TlsFiles)}
        return command(tls=_open_tls(use_tls, files), **arguments)

    for name, variables, explanation in (
        ("name", ["TLS_NAME"], "Name in the pod's certificate, if it is not the host that is called."),
        ("key", ["TLS_KEY"], "PEM private key of --tls-cert."),
        ("cert", ["TLS_CERT"], "PEM certificate to show, where pods want one."),
        ("ca", ["TLS_CA", "TLS_CLIENT_CA"], "PEM authorities of the pod's certificate; by default the system's."),
    ):
        envvar = [f"DENSEMESH_{variable}" for variable in variables]
        with_tls = click.option(f"--tls-{name}", default="", envvar=envvar, help=explanation)(with_tls)
    return click.option("--tls", "use_tls", is_flag=True, help="TLS; each of the next four implies it.")(with_tls)


def targeted(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Add --target, --output, --timeout and --tls..., and hand a `Target` to the command."""

    @click.option("--target", envvar="DENSEMESH_TARGET", default="localhost:8033", show_default=True, help="Any pod.")
    @click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
    @click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 3600), default=120.0, show_default=True)
    @secured
    @wraps(command)
    def with_target(target: str, output: str, timeout_s: float, tls: Tls | None, **arguments: Any) -> int | None:
        return command(Target(target, output, timeout_s, tls), **arguments)

    return with_target


def _loaded(target: Target, model_id: str, status: pb.ModelStatusInfo) -> int:
    """Show a model's status; failed loads are a failure of the command."""
    text = f"{model_id}  {Status.Name(status.status)}"
    copies = ", ".join(f"{c.location} {Status.Name(c.copyStatus)} since {_time(c.time)}" for c in status.modelCopyInfos)
    target.show(status, "\n".join(filter(None, (text, copies, *status.errors))))
    return 1 if status.status in (Status.LOADING_FAILED, Status.NOT_FOUND) else 0


@click.command()
@click.argument("model_id", metavar="ID")
@click.argument("uri")
@click.option("--format", "format_name", required=True, help="onnx, torch, sklearn, ...")
@click.option("--key", default="", help="JSON object of load parameters.")
@click.option("--placement", default="", help='JSON object such as {"min_copies": 2, "requires": {"gpu": "h200"}}.')
@click.option("--load-now", is_flag=True, help="Load it at once.")
@click.option("--wait", is_flag=True, help="With --load-now: return when it is loaded.")
@targeted
def register(
    target: Target, model_id: str, uri: str, format_name: str, key: str, placement: str, load_now: bool, wait: bool
) -> int | None:
    """Register the model at URI under ID.

    A path that exists here is made absolute; the pods must see it at the same place. Registering it again changes how
    it is placed, and nothing else.
    """
    if placement:
        key = json.dumps({**_object("--key", key or "{}"), "placement": _object("--placement", placement)})
    info = pb.ModelInfo(type=format_name, path=_absolute(uri), key=key)
    request = pb.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load_now or wait, sync=wait)
    return _loaded(target, model_id, target.call(MODEL_MESH + "registerModel", request, pb.ModelStatusInfo))


@click.command()
@click.argument("model_id", metavar="ID")
@targeted
def unregister(target: Target, model_id: str) -> int | None:
    """Remove the model ID; its copies are unloaded."""
    request = pb.UnregisterModelRequest(modelId=model_id)
    target.show(
        target.call(MODEL_MESH + "unregisterModel", request, pb.UnregisterModelResponse), f"{model_id}  removed"
    )
    return 0


@click.command("ensure-loaded")
@click.argument("model_id", metavar="ID")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when it is loaded.")
@targeted
def ensure_loaded(target: Target, model_id: str, wait: bool) -> int | None:
    """Load the model ID somewhere, unless it is."""
    request = pb.EnsureLoadedRequest(modelId=model_id, sync=wait)
    return _loaded(target, model_id, target.call(MODEL_MESH + "ensureLoaded", request, pb.ModelStatusInfo))


@click.command()
@click.argument("model_id", metavar="[ID]", required=False)
@click.option("--memory", is_flag=True, help="What lies in the memory tiers of the pod that is asked.")
@targeted
def status(target: Target, model_id: str | None, memory: bool) -> int | None:
    """Show the model ID, or the mesh: its pods and models."""
    if memory:
        return show_memory(target, model_id)
    if model_id is not None:
        request = pb.GetStatusRequest(modelId=model_id)
        return _loaded(target, model_id, target.call(MODEL_MESH + "getModelStatus", request, pb.ModelStatusInfo))
    state = target.call(MESH + "GetState", pb.GetStateRequest(models=True), pb.MeshState)
    table = Table(box=None, pad_edge=False)
    for heading in ("POD", "ADDRESS", "MODELS", "LOADING", "FAILED", "USED", "CAPACITY", "STATE"):
        table.add_column(heading, justify="left" if heading in ("POD", "ADDRESS", "STATE") else "right")
    for pod in state.pods:
        table.add_row(
            *(pod.pod_id, pod.address, str(pod.models_loaded), str(pod.models_loading), str(pod.models_failed)),
            *(
                format_bytes(pod.used_bytes),
                format_bytes(pod.capacity_bytes),
                "draining" if pod.draining else "serving",
            ),
        )
    models = Table(box=None, pad_edge=False)
    for heading in ("MODEL", "FORMAT", "STATUS", "PODS"):
        models.add_column(heading)
    for model in state.models:
        pods = ", ".join(copy.location for copy in model.status.modelCopyInfos)
        models.add_row(model.model_id, model.info.type, Status.Name(model.status.status), pods)
    target.show(state, table, models if state.models else "no models are registered")
    return 0


@click.group()
def vmodel() -> None:
    """Aliases that move from one model to the next without a gap."""


@vmodel.command("set")
@click.argument("vmodel_id", metavar="ID")
@click.argument("target_model_id", metavar="MODEL")
@click.option("--uri", default="", help="Register MODEL from here in the same step (needs --format).")
@click.option("--format", "format_name", default="", help="Format of the model at --uri.")
@click.option("--key", default="", help="JSON object of load parameters for the model at --uri.")
@click.option("--auto-delete", is_flag=True, help="Remove the registered model when no vmodel points to it any more.")
@click.option("--update-only", is_flag=True, help="Fail if the vmodel does not exist.")
@click.option("--load-now", is_flag=True, help="Load MODEL even if the active model is not loaded.")
@click.option("--force", is_flag=True, help="Switch at once, loaded or not.")
@click.option("--wait", is_flag=True, help="Return when the switch has ended.")
@click.option(
    "--canary",
    type=click.IntRange(0, 100),
    metavar="PERCENT",
    help="Give MODEL this share of the requests, and switch when it is promoted.",
)
@click.option("--expected-target", default="", help="Change it only if this is its target now.")
@click.option("--owner", default="", help="Owner of a new vmodel; must match an existing one's.")
@targeted
def vmodel_set(
    target: Target, vmodel_id: str, target_model_id: str, uri: str, format_name: str, key: str, **flags: Any
) -> int | None:
    """Point the vmodel ID to MODEL."""
    if bool(uri) != bool(format_name):
        raise click.UsageError("--uri and --format: expected both or neither")
    request = pb.SetVModelRequest(
        vModelId=vmodel_id,
        targetModelId=target_model_id,
        autoDeleteTargetModel=flags["auto_delete"],
        updateOnly=flags["update_only"],
        loadNow=flags["load_now"],
        force=flags["force"],
        sync=flags["wait"],
        expectedTargetModelId=flags["expected_target"],
        owner=flags["owner"],
        canary_percent=flags["canary"],
    )
    if uri:
        request.modelInfo.CopyFrom(pb.ModelInfo(type=format_name, path=_absolute(uri), key=key))
    return _show_vmodel(target, vmodel_id, target.call(MODEL_MESH + "setVModel", request, pb.VModelStatusInfo))


@vmodel.command("get")
@click.argument("vmodel_id", metavar="ID")
@targeted
def vmodel_get(target: Target, vmodel_id: str) -> int | None:
    """Show the vmodel ID."""
    request = pb.GetVModelStatusRequest(vModelId=vmodel_id)
    return _show_vmodel(target, vmodel_id, target.call(MODEL_MESH + "getVModelStatus", request, pb.VModelStatusInfo))


@vmodel.command("promote")
@click.argument("vmodel_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Return when the switch has ended.")
@targeted
def vmodel_promote(target: Target, vmodel_id: str, wait: bool) -> int | None:
    """Switch the vmodel ID to its canary."""
    return _end_canary(target, vmodel_id, lambda status: status.targetModelId, sync=wait)


@vmodel.command("rollback")
@click.argument("vmodel_id", metavar="ID")
@targeted
def vmodel_rollback(target: Target, vmodel_id: str) -> int | None:
    """Give up what the vmodel ID was to move to: its active model gets every request at once."""
    return _end_canary(target, vmodel_id, lambda status: status.activeModelId)


def _end_canary(
    target: Target, vmodel_id: str, choice: Callable[[pb.VModelStatusInfo], str], *, sync: bool = False
) -> int:
    """Move to one of the vmodel's two models, if nobody has given it another target meanwhile."""
    asked = pb.GetVModelStatusRequest(vModelId=vmodel_id)
    status = target.call(MODEL_MESH + "getVModelStatus", asked, pb.VModelStatusInfo)
    if status.status == VStatus.NOT_FOUND:
        return _show_vmodel(target, vmodel_id, status)
    request = pb.SetVModelRequest(
        vModelId=vmodel_id,
        targetModelId=choice(status),
        updateOnly=True,
        expectedTargetModelId=status.targetModelId,
        sync=sync,
    )
    return _show_vmodel(target, vmodel_id, target.call(MODEL_MESH + "setVModel", request, pb.VModelStatusInfo))


@vmodel.command("delete")
@click.argument("vmodel_id", metavar="ID")
@click.option("--owner", default="", help="Delete it only if this is its owner.")
@targeted
def vmodel_delete(target: Target, vmodel_id: str, owner: str) -> int | None:
    """Remove the vmodel ID, and the models that live for it."""
    request = pb.DeleteVModelRequest(vModelId=vmodel_id, owner=owner)
    target.show(target.call(MODEL_MESH + "deleteVModel", request, pb.DeleteVModelResponse), f"{vmodel_id}  removed")
    return 0


def _show_vmodel(target: Target, vmodel_id: str, status: pb.VModelStatusInfo) -> int:
    lines = [f"{vmodel_id}  {VStatus.Name(status.status)}"]
    if status.activeModelId:
        lines.append(f"active {status.activeModelId}  {Status.Name(status.activeModelStatus.status)}")
    if status.targetModelId != status.activeModelId:
        share = f"  canary {status.canary_percent} %" if status.HasField("canary_percent") else ""
        lines.append(f"target {status.targetModelId}  {Status.Name(status.targetModelStatus.status)}{share}")
        lines += status.targetModelStatus.errors
    target.show(status, "\n".join(lines))
    return 1 if status.status in (VStatus.NOT_FOUND, VStatus.TRANSITION_FAILED) else 0


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{option}: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{option}: expected a JSON object")
    return value


def _absolute(uri: str) -> str:
    path = Path(uri)
    return str(path.absolute()) if path.exists() else uri


def _time(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


COMMANDS: Final = (register, unregister, ensure_loaded, status, vmodel)
