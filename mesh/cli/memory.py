"""`densemesh status --memory`: what lies in the tiers of a pod, and whether that is so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from mesh.config import format_bytes
from mesh.management import MESH
from protos import management_pb2 as pb

if TYPE_CHECKING:
    from mesh.cli.manage import Target


def show_memory(target: Target, model_id: str | None) -> int:
    """Of one model only, if it is named. Fails if something differs by more than it may."""
    state = target.call(MESH + "GetMemory", pb.GetMemoryRequest(), pb.MemoryState)
    if model_id is not None:
        kept = [model for model in state.models if model.model_id == model_id]
        del state.models[:]
        state.models.extend(kept)
    tiers = _table("TIER", "CAPACITY", "PROMISED", "LOADING", "LOADED", "UNLOADING", "FREE", "SHARED")
    for tier in state.tiers:
        books = (tier.promised_bytes, tier.loading_bytes, tier.loaded_bytes, tier.unloading_bytes)
        told = (tier.capacity_bytes, *books, tier.free_bytes, tier.shared_bytes)
        tiers.add_row(tier.name, *map(format_bytes, told))
    tenants = _table("TENANT", "TIER", "SIZE")
    for tenant in state.tenants:
        tenants.add_row(tenant.tenant or "-", tenant.tier, format_bytes(tenant.size_bytes))
    models = _table("MODEL", "TENANT", "TIER", "STATE", "SIZE", "CHARGED")
    for model in state.models:
        sizes = format_bytes(model.size_bytes), format_bytes(model.charged_bytes)
        models.add_row(model.model_id, model.tenant or "-", model.tier, model.state, *sizes)
    check = state.check
    said = f"process: {format_bytes(check.resident_bytes)} resident, {format_bytes(check.expected_bytes)} expected"
    if not check.expected_bytes:
        said = "process: not checked yet"
    lost = f"device lost: {state.device_lost}" if state.device_lost else ""
    alarms = [f"ALARM: {alarm}" for alarm in check.alarms]
    target.show(state, tiers, tenants, models, "\n".join(filter(None, (said, lost, *alarms))))
    return 1 if alarms or lost else 0


def _table(*headings: str) -> Table:
    """Sizes are on the right."""
    words = ("TIER", "TENANT", "MODEL", "STATE")
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table
