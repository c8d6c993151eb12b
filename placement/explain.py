"""Why a model is where it is, and where it would go: what selection and scaling decide by, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from placement.labels import lacks_labels, missing
from placement.messages import STOPPED
from placement.peers import Peers
from placement.records import CopyRecord, CopyStatus, ModelRecord, PodId, PodRecord
from placement.selection import Verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one model, as one pod sees the mesh."""

    reasons: tuple[str, ...]
    """Why it is loaded, or is not."""
    verdicts: tuple[Verdict, ...]
    """One more copy on each pod: who is chosen first."""


def explain(
    model: ModelRecord, peers: Peers, copies: Mapping[PodId, CopyRecord], load_tries: int, now_ms: int
) -> Explanation:
    """Look at a registered model; `copies` are all that are known."""
    against = {pod_id: _against(copy) for pod_id, copy in copies.items() if copy.status is not CopyStatus.HELD}
    verdicts = peers.verdicts(peers.wanted(model), against, now_ms)
    return Explanation(tuple(_reasons(model, peers, copies, verdicts, load_tries)), tuple(verdicts))


def unmet(model: ModelRecord, pods: Iterable[PodRecord]) -> str:
    """Why no live pod may load the model, whatever room there is; empty: one may. Pods may come that do."""
    if model.stopped:
        return STOPPED
    if not model.requires or any(not missing(model.requires, pod.labels) for pod in pods):
        return ""
    return lacks_labels(model.requires)


def _reasons(
    model: ModelRecord,
    peers: Peers,
    copies: Mapping[PodId, CopyRecord],
    verdicts: Collection[Verdict],
    load_tries: int,
) -> Iterable[str]:
    by_status = {status: [c for c in copies.values() if c.status is status] for status in CopyStatus}
    loaded, failed = by_status[CopyStatus.LOADED], by_status[CopyStatus.FAILED]
    under_way = len(loaded) + len(by_status[CopyStatus.LOADING])
    candidates = sum(verdict.ok for verdict in verdicts)
    if loaded:
        yield f"loaded on {_named(loaded)}"
    elif under_way:
        yield f"being loaded on {_named(by_status[CopyStatus.LOADING])}"
    elif model.stopped:
        yield f"not loaded: {STOPPED}"
    elif len(failed) >= load_tries:
        yield f"not loaded: its load failed on {len(failed)} pods, and is not tried on more until that is forgotten"
    elif candidates:
        yield "not loaded: the next request for it has it loaded on the first of these pods"
    else:
        yield f"not loaded: {unmet(model, peers.pods().values()) or 'no pod can load it, see below'}"
    for copy in failed:
        yield f"its load failed on {copy.pod_id}: {copy.error}"
    if model.min_copies > under_way and not model.stopped:
        short = model.min_copies - under_way
        yield f"{short} more copies are to be kept (min_copies {model.min_copies}); {candidates} pods can load one"


def _against(copy: CopyRecord) -> str:
    match copy.status:
        case CopyStatus.FAILED:
            return f"its load failed there: {copy.error}"
        case CopyStatus.LOADED:
            return "has it loaded"
        case _:
            return "is loading it"


def _named(copies: Iterable[CopyRecord]) -> str:
    busy = {copy.pod_id: f" ({copy.busy_percent} % busy)" if copy.busy_percent else "" for copy in copies}
    return ", ".join(pod_id + busy[pod_id] for pod_id in sorted(busy))
