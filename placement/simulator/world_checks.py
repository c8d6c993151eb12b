"""What must hold of requests that have ended, and of a world at rest. Each invariant is a function in a table; it
returns what is wrong, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from placement.holdings import HoldState
from placement.leader import MATCH_MS
from placement.lifecycle import CopyState
from placement.records import CopyStatus, PodId, TenantId

if TYPE_CHECKING:
    from placement.simulator.requests import Request
    from placement.simulator.world import World

ATTEMPTS: Final = 8
"""`mesh.router`"""
_LATE_MS: Final = 10_000
"""For clocks that differ, the leader's ticks, and what is written."""

# When a request ends.


def bounded(world: World, request: Request) -> str:
    """Each of its pods may be asked twice per attempt: once more with those that only did not have the model."""
    most = 2 * ATTEMPTS * (1 + ATTEMPTS)
    return f"{request.routes} routes" if request.routes > most else ""


def no_thrash(world: World, request: Request) -> str:
    """Loads that one request may cause: as many as may fail for it, one that goes well, and again those that were in
    vain."""
    limits = next(iter(world.pods.values())).engine.limits
    most = limits.load_tries + 1 + request.surprises
    return f"{request.loads} loads for one request" if request.loads > most else ""


RequestCheck = Callable[["World", "Request"], str]
OF_REQUEST: Final[dict[str, RequestCheck]] = {
    "a request is tried a bounded number of times": bounded,
    "no thrash": no_thrash,
}


# When faults have ended and everything has come to rest: the world.


def nothing_under_way(world: World) -> str:
    for pod in world.pods.values():
        for copy in pod.engine.cache.copies.values():
            if copy.state not in (CopyState.LOADED, CopyState.FAILED) or copy.pins:
                return f"{pod}: {copy!r}"
        for holdings in pod.engine.copies.lower.values():
            for holding in holdings.entries.values():
                if holding.state is not HoldState.HELD or holding.pins:
                    return f"{pod}: {holding!r}"
        if pod.calls or pod.waiters:
            return f"{pod}: {len(pod.calls)} calls, waited for are {sorted(pod.waiters)}"
    return ""


def one_view(world: World) -> str:
    """Views converge: every pod, or in large worlds every so many, keeps up with the registry, and what it has seen is
    what the registry holds."""
    head, past = world.registry.head, world.registry.past
    for pod in list(world.pods.values())[:: world.options.check_every]:
        pod.sync()
        view, seen = pod.view, pod.view.seen
        if pod.batch.next is not None and pod.batch.next.tick <= world.clock.now - pod.lag:
            return f"{pod} does not follow the registry"
        if view.pods.keys() != world.pods.keys():
            return f"{pod} sees the pods {sorted(view.pods)} of {sorted(world.pods)}"
        for pod_id, record in head.pods.items():
            if record.revision <= seen and view.pods[pod_id] != record:
                return f"{pod} sees {view.pods[pod_id]}, the registry has {record}"
        if len(view.models) != len(head.models) or any(view.models.get(m) != head.models[m] for m in head.models):
            return f"{pod} sees other models"
        if view.vmodels != head.vmodels:
            return f"{pod} sees the vmodels {view.vmodels}, the registry has {head.vmodels}"
        for model_id in {*head.models, *pod.engine.cache.copies}:
            if any(revision > seen for revision, _ in past.copies.get(model_id, ())):
                continue  # told again just now
            sees, has = view.copies(model_id), head.copies(model_id)
            if sees != has:
                return f"{pod} sees {dict(sees)} of {model_id}, the registry has {dict(has)}"
            told, own = has.get(pod.pod_id), pod.engine.copies.published(model_id)
            if (told and told.status) != (own and own.status):
                return f"{pod} has {own}, the registry says {told}"
    return ""


def registered(world: World) -> str:
    """No copy outlives its model's registration."""
    for pod in world.pods.values():
        for books in pod.engine.copies.books:
            for model_id, entry in books.entries.items():
                model = world.registry.head.models.get(model_id)
                if model is None or model.created != entry.model.created:
                    return f"{pod}: {entry!r} of registration {entry.model.created}"
    return ""


def may_be_refused(world: World, tenant: TenantId) -> bool:
    """Whether the tenant's own limit, or what others are guaranteed, may leave it no room."""
    return any(
        grant.max_bytes if grant.tenant_id == tenant else grant.guaranteed_bytes for grant in world.workload.grants
    )


def min_copies(world: World) -> str:
    """Copies that are to be kept are, where a pod has room beside what else is to be kept, and grants leave it some."""
    head = world.registry.head
    kept_bytes = Counter[PodId]()
    for pod in world.pods.values():
        for copy in pod.engine.cache.in_state(CopyState.LOADED):
            if copy.model.pinned or copy.model.min_copies:
                kept_bytes[pod.pod_id] += copy.size_bytes
    for model in head.models.values():
        if may_be_refused(world, model.tenant):
            continue
        copies = head.copies(model.model_id)
        if len(copies) >= model.min_copies or any(copy.status is CopyStatus.FAILED for copy in copies.values()):
            continue
        free = world.options.capacity_bytes - world.true_bytes(model)
        could = [p for p in world.pods if p not in copies and kept_bytes[p] <= free]
        if could:
            return f"{model.model_id} has {len(copies)} copies of {model.min_copies}; {could} could have another"
    return ""


def transitions(world: World) -> str:
    """A transition whose target is loaded as often as its active model, or for long enough, has ended."""
    head = world.registry.head
    for vmodel in head.vmodels.values():
        loaded, active = (
            [copy.since_ms for copy in head.copies(model_id).values() if copy.status is CopyStatus.LOADED]
            for model_id in (vmodel.target, vmodel.active)
        )
        if vmodel.canary or vmodel.active == vmodel.target or not loaded:
            continue
        waited_ms = world.unix_ms - max(vmodel.since_ms, min(loaded))
        if waited_ms > MATCH_MS + _LATE_MS or (len(loaded) >= len(active) and waited_ms > _LATE_MS):
            return f"{vmodel} has not ended, with {len(loaded)} copies for {len(active)}"
    return ""


def limits(world: World) -> str:
    """A tenant has no more than it may have, but for what is to be kept."""
    for grant in world.workload.grants:
        copies = [
            copy
            for pod in world.pods.values()
            for copy in pod.engine.cache.in_state(CopyState.LOADED)
            if copy.tenant == grant.tenant_id
        ]
        used_bytes = sum(copy.size_bytes for copy in copies)
        free = [copy for copy in copies if not (copy.model.pinned or copy.model.min_copies)]
        if grant.max_bytes and used_bytes > grant.max_bytes and len(free) == len(copies):
            return f"tenant {grant.tenant_id} has {used_bytes} bytes of {grant.max_bytes}"
    return ""


WorldCheck = Callable[["World"], str]
AT_REST: Final[dict[str, WorldCheck]] = {
    "all work ends": nothing_under_way,
    "views converge": one_view,
    "no copy outlives its registration": registered,
    "min_copies are kept": min_copies,
    "transitions end": transitions,
    "no tenant is above its limit": limits,
}
