"""What must hold of one pod. Each invariant is a function in a table; it returns what is wrong, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from placement.cache import Copy
from placement.holdings import HoldState
from placement.leader import MATCH_MS
from placement.lifecycle import CopyState
from placement.messages import (
    Action,
    CopyUnwanted,
    Event,
    Publish,
    SettleVModel,
    StartLoad,
    StartUnload,
    Tick,
    Unpublish,
)
from placement.records import CopyStatus, ModelId, Tier, VModelRecord

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod

# After every event, of the pod that it touched: cheap.


def capacity(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    for books in pod.engine.copies.books:
        if max(books.resident_bytes, books.committed_bytes) > books.capacity_bytes:
            return f"{books!r}"
    return ""


def true_room(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    """What is in memory, as measured, and what is being loaded, as estimated."""
    if not any(type(action) is StartLoad for action in actions):
        return ""
    copies = pod.engine.cache.copies
    memory = sum(resident.size_bytes for resident in pod.loader.memory.values())
    loading = sum(copies[model_id].size_bytes for model_id in pod.loader.loading)
    if memory + loading > pod.engine.limits.capacity_bytes:
        return f"{memory} bytes are in memory and {loading} being loaded; {pod.engine!r}"
    return ""


def in_use(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    """Only a copy that nobody wants any more may leave LOADED with a pin, and it stays in memory until its last."""
    copies = pod.engine.cache.copies
    for action in actions:
        match action:
            case StartUnload(model_id):
                if copies[model_id].pins or pod.loader.memory[model_id].users:
                    return f"{copies[model_id]!r} is unloaded"
            case Unpublish(model_id) if not isinstance(event, CopyUnwanted):
                copy = copies.get(model_id)
                if (
                    copy is not None
                    and copy.state is CopyState.UNLOADING
                    and copy.pins
                    and not copy.error
                    and not copy.doomed
                ):
                    return f"{copy!r} is evicted"
    return ""


def kept(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    """A pinned copy goes when it is told to, and when another holder makes it one too many; never for room."""
    if isinstance(event, CopyUnwanted | Tick):
        return ""
    for copy in _evicted(pod, actions):
        if copy.model.pinned:
            return f"{copy!r} is evicted"
    return ""


def _evicted(pod: SimPod, actions: Sequence[Action]) -> Iterator[Copy]:
    """Copies that are unloaded and were given up in this very step, though their models are what they were."""
    told = {action.model_id for action in actions if isinstance(action, Unpublish)}
    told |= {action.copy.model_id for action in actions if isinstance(action, Publish)}
    for action in actions:
        if isinstance(action, StartUnload) and action.model_id in told:
            copy, model = pod.engine.cache.copies[action.model_id], pod.view.models.get(action.model_id)
            if model is not None and model.created == copy.model.created and not (copy.error or copy.doomed):
                yield copy


def guaranteed(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    """Others' loads do not bring a tenant below its floor."""
    if isinstance(event, CopyUnwanted | Tick) or not pod.view.tenants:
        return ""
    cache, tenants = pod.engine.cache, pod.engine.copies.tenants
    for copy in _evicted(pod, actions):
        others = (other for other in cache.copies.values() if other.tenant == copy.tenant and other is not copy)
        if any(other.since_ms == pod.now_ms and other.state in _COMING for other in others):
            continue  # for the tenant itself
        left_bytes, floor_bytes = cache.tenant_bytes.get(copy.tenant, 0), tenants.floor_bytes(copy.tenant)
        if left_bytes < floor_bytes:
            return f"{copy!r} leaves tenant {copy.tenant} {left_bytes} bytes of {floor_bytes}"
    return ""


def slots(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    count = len(pod.loader.loading) - pod.engine.cache.count(CopyState.OVERDUE)
    return f"{count} loads at once" if count > pod.engine.limits.load_slots else ""


def promoted(pod: SimPod, event: Event | None, actions: Sequence[Action]) -> str:
    """A transition ends with a loaded target; with fewer copies than the active model has only after a time, or where
    no pod is half empty that has none of it; a canary's does not end by itself."""
    for action in actions:
        if not isinstance(action, SettleVModel) or action.new.active == action.old.active:
            continue
        old, view, peers = action.old, pod.view, pod.engine.peers
        copies = view.copies(old.target)
        loaded = [copy for copy in copies.values() if copy.status is CopyStatus.LOADED]
        if view.vmodels[old.vmodel_id].canary or not loaded:
            return f"{old} becomes {action.new}, with {copies}"
        if len(peers.holders(old.target)) >= len(peers.holders(old.active)) or view.tenants:
            continue
        if pod.now_ms - max(old.since_ms, min(copy.since_ms for copy in loaded)) >= MATCH_MS:
            continue
        failed = sum(copy.status is CopyStatus.FAILED for copy in copies.values())
        size_bytes = view.size_bytes(old.target)
        free = [
            other.pod_id
            for other in peers.pods().values()
            if other.capacity_bytes - other.used_bytes >= max(other.capacity_bytes // 2, size_bytes)
            and not other.draining
            and other.pod_id not in copies
            and not peers.is_suspect(other.pod_id, pod.now_ms)
        ]
        model = view.models[old.target]
        if free and failed < pod.engine.limits.load_tries and not model.max_copies and not peers.is_asked(old.target):
            return f"{old} becomes {action.new} with {len(loaded)} copies, and {free} could have another"
    return ""


def allowed_side(pod: SimPod, vmodel: VModelRecord, model_id: ModelId) -> str:
    """The active model, or a target that has a share and, as far as this pod knows, is loaded on a live pod."""
    if model_id == vmodel.active:
        return ""
    own = pod.engine.cache.copies.get(model_id)
    loaded = [p for p, copy in pod.view.copies(model_id).items() if copy.status is CopyStatus.LOADED]
    is_loaded = (own is not None and own.state is CopyState.LOADED) or any(p in pod.view.pods for p in loaded)
    if model_id == vmodel.target and vmodel.canary_percent and is_loaded:
        return ""
    return f"a request for {vmodel} goes to {model_id}, loaded on {loaded}"


_COMING: Final = frozenset({CopyState.WAITING, CopyState.LOADING, CopyState.SIZING, CopyState.LOADED})
StepCheck = Callable[["SimPod", Event | None, Sequence[Action]], str]
AFTER_EVENT: Final[dict[str, StepCheck]] = {
    "capacity is never exceeded": capacity,
    "a load starts only into memory that is free": true_room,
    "no copy is evicted while in use": in_use,
    "no more loads than slots": slots,
    "what is pinned does not go for room": kept,
    "others leave a tenant what it is guaranteed": guaranteed,
    "a target takes over when it is ready": promoted,
}


# After every event in small worlds, every so often in large ones: a whole pod.


def books(pod: SimPod) -> str:
    for tier in pod.engine.copies.books:
        try:
            tier.check()
        except AssertionError as wrong:
            return str(wrong) or f"the own check of {tier!r} fails"
    return ""


def shell(pod: SimPod) -> str:
    """What the engine believes to be in memory or on its way there is."""
    cache = pod.engine.cache
    loading = {
        copy.model.model_id for state in (CopyState.LOADING, CopyState.OVERDUE) for copy in cache.in_state(state)
    }
    held = {
        copy.model.model_id
        for state in (CopyState.SIZING, CopyState.LOADED, CopyState.UNLOADING)
        for copy in cache.in_state(state)
    }
    if loading != pod.loader.loading.keys():
        return f"being loaded are {sorted(pod.loader.loading)}, the engine says {sorted(loading)}"
    if held != pod.loader.memory.keys():
        return f"in memory are {sorted(pod.loader.memory)}, the engine says {sorted(held)}"
    return ""


def lower(pod: SimPod) -> str:
    """What the engine believes to lie below the device does, and with what is on its way there it fits."""
    coming = Counter[Tier]()
    for load in pod.loader.loading.values():
        coming.update(load.keep)
    for unload in pod.loader.unloading.values():
        if unload.keep is not None:
            coming[unload.keep] += pod.loader.memory[unload.model_id].size_bytes
    for copy_down in pod.loader.demoting.values():
        coming[copy_down.target] += pod.loader.lower[copy_down.source][copy_down.model_id][1]
    for tier, holdings in pod.engine.copies.lower.items():
        there = {model_id: size_bytes for model_id, (_, size_bytes) in pod.loader.lower[tier].items()}
        believed = {m: held.size_bytes for m, held in holdings.entries.items() if held.state in _LYING}
        if there != believed:
            return f"in {tier} are {there}, the engine says {believed}"
        if sum(there.values()) + coming[tier] > holdings.capacity_bytes:
            return f"{coming[tier]} bytes are on their way to {tier}: {holdings!r}"
    return ""


def told(pod: SimPod) -> str:
    """Others decide by what a pod publishes."""
    for model_id in {model_id for books in pod.engine.copies.books for model_id in books.entries}:
        record, told = pod.engine.copies.published(model_id), pod.publisher.wanted_copy(model_id)
        if (record and (record.status, record.tier, record.error)) != (told and (told.status, told.tier, told.error)):
            return f"{record} is published as {told}"
    return ""


def tenant_loads(pod: SimPod) -> str:
    """A tenant has no more loads under way than it may."""
    for tenant, loads in pod.engine.cache.tenant_loads.items():
        most = pod.engine.copies.tenants.record(tenant).max_loads
        if most and loads > most and pod.view.tenants:
            return f"tenant {tenant} loads {loads} models at once, and may {most}"
    return ""


PodCheck = Callable[["SimPod"], str]
OF_POD: Final[dict[str, PodCheck]] = {
    "books equal sums": books,
    "the engine knows what is in memory": shell,
    "the engine knows what lies below the device": lower,
    "what is published is what is there": told,
    "no more loads of a tenant than it may have": tenant_loads,
}


_LYING: Final = (HoldState.HELD, HoldState.DROPPING)
