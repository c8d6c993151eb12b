"""`densemesh tenant`: what tenants are granted."""

from __future__ import annotations

import click
from rich.table import Table

from mesh.cli.manage import Target, targeted
from mesh.config import format_bytes, parse_bytes
from mesh.management import MESH
from protos import management_pb2 as pb


def _bytes(context: click.Context, option: click.Parameter, value: str) -> int:
    """A size with a unit, such as 2GiB; 0 for none."""
    try:
        return 0 if value == "0" else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def tenant() -> None:
    """What tenants are granted: guarantees, limits, shares."""


@tenant.command("set")
@click.argument("tenant_id", metavar="ID")
@click.option("--guaranteed", callback=_bytes, default="0", help="Memory that others' loads leave to it.")
@click.option("--max", "most", callback=_bytes, default="0", help="Memory it may have in the whole mesh; 0: no limit.")
@click.option("--weight", type=click.IntRange(1), default=1, show_default=True, help="Of its share of a full pod.")
@click.option("--max-loads", type=click.IntRange(0), default=0, help="Loads under way on one pod; 0: no limit.")
@click.option("--max-models", type=click.IntRange(0), default=0, help="Registered models; 0: no limit.")
@targeted
def tenant_set(
    target: Target, tenant_id: str, guaranteed: int, most: int, weight: int, max_loads: int, max_models: int
) -> int | None:
    """Grant the tenant ID this, in place of what it was granted before.

    A model's tenant is told when it is registered.
    """
    asked = pb.Tenant(
        tenant_id=tenant_id,
        guaranteed_bytes=guaranteed,
        max_bytes=most,
        weight=weight,
        max_loads=max_loads,
        max_models=max_models,
    )
    state = target.call(MESH + "SetTenant", asked, pb.TenantState)
    target.show(state, _table([state]))
    return 0


@tenant.command("list")
@targeted
def tenant_list(target: Target) -> int | None:
    """Show every tenant with grants or models."""
    tenants = target.call(MESH + "ListTenants", pb.ListTenantsRequest(), pb.Tenants)
    target.show(tenants, _table(list(tenants.tenants)))
    return 0


@tenant.command("delete")
@click.argument("tenant_id", metavar="ID")
@targeted
def tenant_delete(target: Target, tenant_id: str) -> int | None:
    """Take back what the tenant ID was granted; its models stay."""
    request = pb.DeleteTenantRequest(tenant_id=tenant_id)
    target.show(target.call(MESH + "DeleteTenant", request, pb.DeleteTenantResponse), f"{tenant_id}  no grants")
    return 0


def _table(states: list[pb.TenantState]) -> Table:
    table = Table("tenant", "used", "guaranteed", "max", "weight", "max loads", "models", "max models", box=None)
    for state in states:
        granted = state.tenant
        table.add_row(
            granted.tenant_id,
            format_bytes(state.used_bytes),
            format_bytes(granted.guaranteed_bytes),
            format_bytes(granted.max_bytes) if granted.max_bytes else "-",
            str(granted.weight),
            str(granted.max_loads or "-"),
            str(state.models_registered),
            str(granted.max_models or "-"),
        )
    return table
