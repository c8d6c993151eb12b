"""`densemesh explain`: why a model is where it is, and where it would go."""

from __future__ import annotations

import click
from rich.table import Table

from mesh.cli.manage import Target, targeted
from mesh.config import format_bytes
from mesh.management import MESH
from placement.selection import PARTS
from protos import management_pb2 as pb


@click.command()
@click.argument("model_id", metavar="ID")
@click.option("--pod", default="", metavar="HOST:PORT", help="Ask this pod: each decides by what it sees itself.")
@targeted
def explain(target: Target, model_id: str, pod: str) -> int | None:
    """Show why the model (or vmodel) ID is where it is, and what one more copy would cost on each pod."""
    target.address = pod or target.address
    told = target.call(MESH + "Explain", pb.ExplainRequest(model_id=model_id), pb.Explanation)
    placement = ", ".join(f"{field.name} {value}" for field, value in told.placement.ListFields())
    size = format_bytes(told.size_bytes) if told.size_bytes else "not measured yet"
    about = [f"{told.model_id}  as pod {told.pod_id} sees it", f"size {size}, {placement}"]
    table = Table(box=None, pad_edge=False)
    for heading in ("POD", "CAN LOAD", *(f"{part.upper()} MS" for part in PARTS), "TOTAL MS", "WHY"):
        table.add_column(heading, justify="right" if heading.endswith("MS") else "left")
    for verdict in told.pods:
        costs = [*(verdict.parts_ms[part] for part in PARTS), verdict.total_ms] if verdict.can_load else []
        numbers = [f"{cost:,.0f}" for cost in costs] or [""] * (len(PARTS) + 1)
        table.add_row(verdict.pod_id, "yes" if verdict.can_load else "no", *numbers, "; ".join(verdict.reasons))
    target.show(told, "\n".join([*about, *told.reasons]), table)
    return 0
