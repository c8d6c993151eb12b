"""`python -m tests.operator.transcript`: what `kubectl get isvc` shows of an InferenceService through its life.

The objects are those that the operator has written to the tests' API server; the columns are computed as KServe's CRD
defines them (`additionalPrinterColumns`).
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.mesh.models import write_synthetic
from tests.mesh.pods import Loads
from tests.operator.fake_api.objects import Object
from tests.operator.rig import Rig, fraud, rigged

COLUMNS: Final = ("NAME", "URL", "READY", "PREV", "LATEST", "PREVROLLEDOUTREVISION", "LATESTREADYREVISION")


def cells(found: Object) -> list[str]:
    """What the columns show, but AGE."""
    status = found.get("status") or {}
    traffic = ((status.get("components") or {}).get("predictor") or {}).get("traffic") or ()
    prev: dict[str, Any] = next((entry for entry in traffic if entry.get("tag") == "prev"), {})
    latest: dict[str, Any] = next((entry for entry in traffic if entry.get("latestRevision")), {})
    ready = next((entry["status"] for entry in status.get("conditions") or () if entry["type"] == "Ready"), "")
    told = (status.get("url"), ready, prev.get("percent"), latest.get("percent"))
    shown = (found["metadata"]["name"], *told, prev.get("revisionName"), latest.get("revisionName"))
    return ["" if value is None else str(value) for value in shown]


def shown(found: Object, events: list[str]) -> str:
    rows = [list(COLUMNS), cells(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    model = found["status"]["modelStatus"]
    failure = model.get("lastFailureInfo", {})
    lines.append(f"  transitionStatus {model['transitionStatus']}, states {model['states']}")
    if failure:
        lines.append(f"  lastFailureInfo {failure['reason']}: {failure['message']}")
    return "\n".join([*lines, f"  events: {', '.join(events) or 'none'}"])


async def tell(rig: Rig, folder: Path) -> None:
    one, two = (str(write_synthetic(folder / name)) for name in ("one", "two"))
    bad = str(write_synthetic(folder / "bad", fail="the file is damaged"))
    await rig.start()
    told = 0
    for title, manifest, transition in (
        ("Applied", fraud(one), "UpToDate"),
        (
            "Canary: another model, canaryTrafficPercent: 10",
            fraud(two, predictor={"canaryTrafficPercent": 10}),
            "UpToDate",
        ),
        ("Promoted: without canaryTrafficPercent", fraud(two), "UpToDate"),
        ("A model that does not load", fraud(bad), "BlockedByFailedLoad"),
        ("Rolled back: the spec before", fraud(two), "UpToDate"),
    ):
        generation = (await rig.apply(manifest))["metadata"]["generation"]

        def settled(generation: int = generation, transition: str = transition) -> bool:
            status = rig.get().get("status") or {}
            seen = status.get("observedGeneration") == generation
            return bool(seen and rig.condition()[0] == "True" and rig.model_status()["transitionStatus"] == transition)

        await rig.becomes(settled)
        await asyncio.sleep(0.5)  # for the events, of which nobody knows how many come
        reasons = rig.reasons()
        print(f"## {title}\n\n```\n{shown(rig.get(), reasons[told:])}\n```\n")
        told = len(reasons)
    await rig.delete()
    await rig.becomes(lambda: not rig.has())


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with rigged(folder, Loads()) as rig:
            await tell(rig, folder)


if __name__ == "__main__":
    logging.disable()
    asyncio.run(main())
