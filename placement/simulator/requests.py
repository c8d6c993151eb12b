"""A request's walk, step by step as `mesh.router`, `mesh.directory` and `mesh.inference` take it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from placement.cache import Copy
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, CopyState
from placement.messages import CopyWanted, Forward, Hop, Join, LoadHere, Refuse, Serve, Why
from placement.records import PodId, model_key
from placement.simulator.checks import Violation
from placement.simulator.clock import TICKS_PER_MS, Tick, ticks
from placement.simulator.scenario import SimModel
from placement.simulator.world_checks import ATTEMPTS

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod

MOVED_MS: Final = 1.0
"""`mesh.router`"""
_UNKNOWN: Final = 1_000 * TICKS_PER_MS
"""`mesh.directory`: how long a model the registry did not know is not asked for again."""

_NO_RUNS: Final = (0, 0.0)
WAIT: Final = -1
"""Yielded by a walk that something will wake; else it yields how many ticks it pauses."""
Walk = Generator[Tick, None, None]


class Outcome(Enum):
    """How a call ends (`mesh.errors`)."""

    OK = "ok"
    NOT_FOUND = "not found"
    LOAD_FAILED = "load failed"
    LOAD_UNAVAILABLE = "load failed for now"
    NO_ROOM = "no room"
    NOT_HERE = "not here"
    POD_UNAVAILABLE = "no pod"
    REGISTRY_UNAVAILABLE = "no registry"
    DEADLINE = "deadline exceeded"
    CANCELLED = "cancelled"
    """The client went away."""
    CONNECTION_LOST = "connection lost"
    """The client's own pod has died."""


ELSEWHERE: Final = frozenset(
    (Outcome.LOAD_FAILED, Outcome.LOAD_UNAVAILABLE, Outcome.NO_ROOM, Outcome.NOT_HERE, Outcome.POD_UNAVAILABLE)
)
"""`MeshError.try_elsewhere`"""
_OF_A_LOAD: Final = frozenset((Outcome.LOAD_FAILED, Outcome.LOAD_UNAVAILABLE, Outcome.NO_ROOM))
_REFUSED: Final = {
    Why.LOAD_FAILED: Outcome.LOAD_FAILED,
    Why.LOAD_FAILED_FOR_NOW: Outcome.LOAD_UNAVAILABLE,
    Why.NOT_HERE: Outcome.NOT_HERE,
    Why.NO_ROOM: Outcome.NO_ROOM,
}


class Failed(Exception):
    """`MeshError`"""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


@dataclass(eq=False, slots=True)
class Request:
    """A client's."""

    model: SimModel
    began: Tick
    run: Tick
    """How long the model runs; 0: it only has to be loaded."""
    on_end: Callable[[Outcome], None] | None = None
    """Not a client's: it is not counted."""
    missed: bool = False
    """It waited for a load, or caused one."""
    routes: int = 0
    """How often a pod was asked where it goes."""
    loads: int = 0
    """How many it caused."""
    surprises: int = 0
    """Copies that were not there when it came, or went while it waited; pods that died."""


@dataclass(eq=False, slots=True)
class Call:
    """A request at one pod: the client's, or one forwarded by `caller`."""

    request: Request
    pod: SimPod
    hop: Hop
    deadline: Tick
    created: int = 0
    """The registration that the sender knows."""
    caller: Call | None = None
    walk: Walk | None = None
    """None: it has ended."""
    timed: bool = False
    """Something will end it at its deadline."""
    awaits: Call | None = None
    answer: Outcome | None = None
    """To the call it awaited."""


def walk_of(call: Call) -> Walk:
    """Ends when the call does, and tells the world of it."""
    outcome = Outcome.OK
    try:
        known = call.pod.view.models.get(call.request.model.model_id)
        if known is None or known.created < call.created:
            yield from _resolved(call)
        yield from _walk(call)
    except Failed as failed:
        outcome = failed.outcome
    call.pod.world.answered(call, outcome)


def _resolved(call: Call) -> Walk:
    """`Router.model_of`"""
    if call.hop is Hop.CLIENT:
        yield from _look_up(call)
    else:
        call.pod.unknown.pop(call.request.model.model_id, None)
        yield from _read(call)


def _look_up(call: Call) -> Walk:
    """`Directory.model`"""
    pod, model_id = call.pod, call.request.model.model_id
    if model_id in pod.view.models:
        return
    if pod.unknown.get(model_id, 0) > pod.world.clock.now or not (yield from _read(call)):
        raise Failed(Outcome.NOT_FOUND)


def _read(call: Call) -> Generator[Tick, None, bool]:
    """Whether the registry has the model, which is then in the view."""
    pod, model_id = call.pod, call.request.model.model_id
    yield ticks(pod.world.options.write_ms / 2)
    if pod.cut_off:
        raise Failed(Outcome.REGISTRY_UNAVAILABLE)
    found = pod.fetch(model_key(model_id))
    if not found:
        pod.unknown[model_id] = pod.world.clock.now + _UNKNOWN
    return found


def _walk(call: Call) -> Walk:
    """`Router.walk`"""
    pod, request, hop = call.pod, call.request, call.hop
    engine, model_id = pod.engine, request.model.model_id
    exclude: set[PodId] = set()
    without: set[PodId] = set()
    last: Outcome | None = None
    loads_failed = 0
    for attempt in range(ATTEMPTS):
        request.routes += 1
        route = engine.route(model_id, hop, exclude, pod.now_ms)
        if isinstance(route, Refuse) and without:
            exclude -= without
            without.clear()
            route = engine.route(model_id, hop, exclude, pod.now_ms)
        try:
            match route:
                case Serve(copy):
                    yield from _serve(call, copy)
                    return
                case Join(copy):
                    if (yield from _join(call, copy)):
                        return
                case LoadHere():
                    if (yield from _load(call)):
                        return
                case Forward(pod_id, onward):
                    yield from _forward(call, pod_id, onward)
                    return
                case Refuse(Why.UNKNOWN_MODEL):
                    yield from _look_up(call)
                    continue
                case Refuse(why):
                    told = last if last not in (None, Outcome.NOT_HERE) else Outcome.POD_UNAVAILABLE
                    raise Failed(_REFUSED.get(why) or told or Outcome.POD_UNAVAILABLE)
        except Failed as failed:
            if hop is not Hop.CLIENT or failed.outcome not in ELSEWHERE or isinstance(route, Refuse):
                raise
            last = failed.outcome
            loads_failed += last in _OF_A_LOAD
            if loads_failed >= engine.limits.load_tries:
                raise
            asked = route.pod_id if isinstance(route, Forward) else engine.pod_id
            exclude.add(asked)
            if last is not Outcome.NOT_HERE:
                continue
            without.add(asked)
        yield ticks(MOVED_MS * 2**attempt)
    raise Failed(last if last is not None and last is not Outcome.NOT_HERE else Outcome.POD_UNAVAILABLE)


def _serve(call: Call, copy: Copy) -> Walk:
    pod, run = call.pod, call.request.run
    model_id = copy.model.model_id
    resident = pod.loader.memory.get(model_id)
    if resident is None or copy.state is not CopyState.LOADED:
        raise Violation("what serves is loaded", f"{copy!r} was to serve a request", pod, model_id)
    pod.engine.pin(copy)
    resident.users += 1
    try:
        if run:
            now = pod.world.clock.now
            ends = now + run
            if pod.run_slots:
                ends = max(now, pod.run_slots[0]) + run
                heapq.heapreplace(pod.run_slots, ends)
            yield ends - now
            if pod.loader.memory.get(model_id) is not resident:
                raise Violation("no copy is unloaded while in use", f"{copy!r} went under a request", pod, model_id)
            count, busy_ms = pod.runs.get(model_id, _NO_RUNS)
            pod.runs[model_id] = count + 1, busy_ms + run / TICKS_PER_MS
    finally:
        resident.users -= 1
        pod.unpin(copy)


def _join(call: Call, copy: Copy) -> Generator[Tick, None, bool]:
    """False: the copy went away meanwhile."""
    pod, model_id = call.pod, copy.model.model_id
    call.request.missed = True
    pod.engine.join(copy)
    try:
        while copy.state in IN_FLIGHT and not copy.doomed:
            pod.waiters.setdefault(model_id, []).append(call)
            yield WAIT
        if copy.state is CopyState.LOADED:
            yield from _serve(call, copy)
            return True
        if copy.state in HAS_FAILED:
            raise Failed(
                Outcome.NO_ROOM if copy.no_room else Outcome.LOAD_UNAVAILABLE if copy.retryable else Outcome.LOAD_FAILED
            )
        call.request.surprises += 1
        return False
    finally:
        pod.unpin(copy)


def _load(call: Call) -> Generator[Tick, None, bool]:
    pod, model_id = call.pod, call.request.model.model_id
    call.request.missed = True
    call.request.loads += model_id not in pod.engine.cache.copies
    if model_id not in pod.view.models:
        raise Failed(Outcome.NOT_FOUND)
    pod.step(CopyWanted(model_id, pod.now_ms))
    copy = pod.engine.cache.copies[model_id]
    if copy.state in IN_FLIGHT and not copy.doomed:
        return (yield from _join(call, copy))
    pod.waiters.setdefault(model_id, []).append(call)
    yield WAIT
    return False


def _forward(call: Call, pod_id: PodId, hop: Hop) -> Walk:
    pod, model_id = call.pod, call.request.model.model_id
    world = pod.world
    model = pod.view.models.get(model_id)
    peer = world.pods[pod_id]
    call.awaits = Call(call.request, peer, hop, call.deadline, model.created if model else 0, call)
    reached = True
    pod.engine.forward_started(pod_id)
    try:
        world.transport.send(pod, call.awaits)
        yield WAIT
        answer = call.answer
        if answer is not Outcome.OK:
            assert answer is not None
            reached = answer is not Outcome.POD_UNAVAILABLE
            call.request.surprises += not reached or answer is Outcome.NOT_HERE
            raise Failed(answer)
    finally:
        call.awaits = call.answer = None
        pod.engine.forward_ended(pod_id, reached=reached, now_ms=pod.now_ms)
