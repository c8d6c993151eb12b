"""What must hold. Each invariant is a function in a table; it returns what is wrong, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from placement.cache import Copy
from placement.holdings import HoldState
from placement.lifecycle import CopyState
from placement.messages import Action, CopyUnwanted, Event, Publish, StartLoad, StartUnload, Tick, Unpublish
from placement.records import CopyStatus, ModelId, PodId, Tier

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod
    from placement.simulator.requests import Request
    from placement.simulator.world import World


ATTEMPTS: Final = 8
"""`mesh.router`"""


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, said: str, pod: SimPod | None = None, model_id: ModelId = "") -> None:
        super().__init__(f"{invariant}: {said}")
        self.invariant = invariant
        self.pod = pod
        self.model_id = model_id


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
    limits = pod.engine.limits
    return f"{len(pod.loader.loading)} loads at once" if len(pod.loader.loading) > limits.load_slots else ""


_COMING: Final = frozenset({CopyState.WAITING, CopyState.LOADING, CopyState.SIZING, CopyState.LOADED})
StepCheck = Callable[["SimPod", Event | None, Sequence[Action]], str]
AFTER_EVENT: Final[dict[str, StepCheck]] = {
    "capacity is never exceeded": capacity,
    "a load starts only into memory that is free": true_room,
    "no copy is evicted while in use": in_use,
    "no more loads than slots": slots,
    "what is pinned does not go for room": kept,
    "others leave a tenant what it is guaranteed": guaranteed,
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
    loading = {copy.model.model_id for copy in cache.in_state(CopyState.LOADING)}
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


def min_copies(world: World) -> str:
    """Copies that are to be kept are, where a pod has room beside what else is to be kept, and no tenant's limit or
    guarantee stands against it."""
    if world.workload.grants:
        return ""
    head = world.registry.head
    kept_bytes = Counter[PodId]()
    for pod in world.pods.values():
        for copy in pod.engine.cache.in_state(CopyState.LOADED):
            if copy.model.pinned or copy.model.min_copies:
                kept_bytes[pod.pod_id] += copy.size_bytes
    for model in head.models.values():
        copies = head.copies(model.model_id)
        if len(copies) >= model.min_copies or any(copy.status is CopyStatus.FAILED for copy in copies.values()):
            continue
        free = world.options.capacity_bytes - world.true_bytes(model)
        could = [p for p in world.pods if p not in copies and kept_bytes[p] <= free]
        if could:
            return f"{model.model_id} has {len(copies)} copies of {model.min_copies}; {could} could have another"
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
    "no tenant is above its limit": limits,
}


class Checks:
    """Runs them; raises the first Violation."""

    def __init__(self, every: int) -> None:
        self.count = 0
        self._every = every
        self._left = every

    def after(self, pod: SimPod, event: Event | None, actions: Sequence[Action]) -> None:
        self.count += len(AFTER_EVENT)
        for name, check in AFTER_EVENT.items():
            wrong = check(pod, event, actions)
            if wrong:
                raise Violation(name, wrong, pod, _model_of(event))
        self._left -= 1
        if self._left <= 0:
            self._left = self._every
            self.pod(pod)

    def pod(self, pod: SimPod) -> None:
        self.count += len(OF_POD)
        for name, check in OF_POD.items():
            wrong = check(pod)
            if wrong:
                raise Violation(name, wrong, pod)

    def ended(self, world: World, request: Request) -> None:
        self.count += len(OF_REQUEST)
        for name, check in OF_REQUEST.items():
            wrong = check(world, request)
            if wrong:
                raise Violation(name, wrong, None, request.model.model_id)

    def lease(self, dead: SimPod) -> None:
        """A dead pod's lease has run out: whoever has seen that has forgotten its copies, and only those of the next
        pod of its name are left."""
        world, session = dead.world, dead.publisher.session
        if session is not None and (session.alive or session.keys):
            raise Violation("a dead pod's copies go with its lease", f"the registry has {list(session.keys)}", dead)
        for pod in world.pods.values():
            world.clock.after(pod.lag + 100, self._seen_to_be_dead, (pod, dead, world.registry.revision))

    def _seen_to_be_dead(self, what: tuple[SimPod, SimPod, int]) -> None:
        pod, dead, revision = what
        pod.sync()
        self.count += 1
        if pod.alive and pod.view.seen >= revision and pod.world.pods[dead.pod_id] is dead:
            for model_id in pod.world.models:
                if dead.pod_id in pod.view.copies(model_id):
                    raise Violation("a dead pod's copies go with its lease", "it still sees some", pod, model_id)

    def at_rest(self, world: World) -> None:
        self.count += len(AT_REST)
        for name, check in AT_REST.items():
            wrong = check(world)
            if wrong:
                raise Violation(name, wrong)


def _model_of(event: Event | None) -> ModelId:
    model_id: ModelId = getattr(event, "model_id", "")
    return model_id
