"""One pod's brain: `route` says where a request goes, `step` turns an event into actions.

Nothing here waits, reads a clock or touches the network: whoever calls carries out the actions and reports their
outcome as events, in production (`mesh.driver`) as in simulation. All methods are called from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set
from random import Random
from typing import Final

from placement import leader
from placement.cache import Copy
from placement.copies import LocalCopies
from placement.drain import Drain
from placement.labels import lacks_labels, missing
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, CopyState
from placement.limits import Limits
from placement.messages import (
    STOPPED,
    Action,
    CopyUnwanted,
    CopyWanted,
    Demoted,
    DrainStarted,
    Event,
    Forward,
    HeldDropped,
    HeldLost,
    Hop,
    Join,
    LoadFailed,
    LoadFinished,
    LoadHere,
    MemoryShort,
    Refuse,
    Route,
    Runs,
    Serve,
    SizeEstimated,
    Tick,
    UnloadFinished,
    Why,
)
from placement.peers import Peers
from placement.policies.base import EvictionPolicy
from placement.records import CopyRecord, CopyStatus, ModelId, PodId, PodRecord, Priority, Tier
from placement.scaling import Scaling
from placement.selection import Wanted
from placement.sides import Sides
from placement.stats import Stats
from placement.upkeep import Upkeep
from placement.view import ClusterView

# Members that a forward asks for: looking one up on its enum takes 0.2 us.
_LOADED_HERE: Final = CopyState.LOADED
_LOADED: Final = CopyStatus.LOADED
_NOBODY: Final[frozenset[PodId]] = frozenset()
_NO_ACTIONS: Final[Sequence[Action]] = ()


class Engine:
    """Decides for one pod."""

    def __init__(
        self,
        pod_id: PodId,
        address: str,
        limits: Limits,
        view: ClusterView,
        policy: Callable[[], EvictionPolicy],
        rng: Random,
    ) -> None:
        self.pod_id = pod_id
        self.address = address
        self.limits = limits
        self.view = view
        self.stats = Stats()
        self.copies = LocalCopies(pod_id, limits, view, policy, self.stats)
        self.cache = self.copies.cache
        self.draining = False
        self.peers = Peers(pod_id, limits, view, rng, self.pod_record, self.cache.copies)
        self.forward_started = self.peers.forward_started
        self.forward_ended = self.peers.forward_ended
        self.sides = Sides(pod_id, self.peers.holders)
        self.scaling = Scaling(pod_id, limits, view, self.cache, self.peers)
        self.cache.is_kept = self.scaling.is_kept
        self._leaders = leader.Leaders()
        self._upkeep = Upkeep(view, self.peers)
        self._drain = Drain(view, self.cache, self.peers)

    def __repr__(self) -> str:
        return f"<Engine {self.pod_id} {self.copies!r}>"

    # Requests

    def route(
        self,
        model_id: ModelId,
        hop: Hop,
        exclude: Set[PodId],
        now_ms: int,
        used_ms: int | None = None,
    ) -> Route:
        """Where a request for a model goes. `used_ms` is the time at which the use counts, if not now.

        1. A copy is loaded here: serve it.
        2. From a client, and a copy is loaded elsewhere: forward to a holder.
        3. A copy is on its way here: join it.
        4. From a client, and a copy is on its way elsewhere: forward to join it there.
        5. Nobody has it: load it, here if a pod chose this one, else on the pod that is best for it.
        6. Or no pod can, or this one was asked for a hit: refuse.
        """
        used_ms = now_ms if used_ms is None else min(used_ms, now_ms)
        copy = self.cache.copies.get(model_id)
        if copy is not None and self.pod_id in exclude:
            copy = None
        if copy is not None and copy.state is CopyState.LOADED:
            self.cache.policy.touch(model_id, used_ms)
            if used_ms > copy.used_ms:
                copy.used_ms = used_ms
            self.stats.hits += 1
            return Serve(copy)
        if hop is Hop.CLIENT:
            holder = self.peers.holder(model_id, CopyStatus.LOADED, exclude, now_ms)
            if holder is not None:
                return self._forward(holder, Hop.HIT_ONLY)
        if copy is not None and copy.state in IN_FLIGHT and not copy.doomed:
            copy.used(used_ms)
            self.stats.joins += 1
            return Join(copy)
        if hop is Hop.CLIENT:
            holder = self.peers.holder(model_id, CopyStatus.LOADING, exclude, now_ms)
            if holder is not None:
                return self._forward(holder, Hop.LOAD_HERE)
        return self._place(model_id, copy, hop, exclude, now_ms)

    def holder_elsewhere(self, model_id: ModelId, now_ms: int) -> PodId | None:
        """The pod to which `route` would forward a client's request for a hit; None: ask `route`. Whoever forwards it
        counts it."""
        copy = self.cache.copies.get(model_id)
        if copy is not None and copy.state is _LOADED_HERE:
            return None
        return self.peers.holder(model_id, _LOADED, _NOBODY, now_ms)

    def served(self, copy: Copy, times: int, now_ms: int) -> None:
        """Requests were served on a copy that was LOADED when they were, without asking `route`, which would have said
        nothing else."""
        self.stats.hits += times
        if copy.state is not CopyState.LOADED:  # it was given up since, and waits for its pins
            return
        touch, model_id = self.cache.policy.touch, copy.model.model_id
        for _ in range(times):
            touch(model_id, now_ms)
        copy.used_ms = max(copy.used_ms, now_ms)

    def pin(self, copy: Copy) -> None:
        """A request uses the copy: it will not be evicted."""
        copy.pins += 1

    def join(self, copy: Copy, priority: Priority | None = None, *, is_prefetch: bool = False) -> None:
        """A request waits for the copy, which is pinned and comes in its turn: `priority` is its own class, if
        it has one; `is_prefetch`: whoever sent it does not need it yet."""
        copy.pins += 1
        copy.asked(priority, is_prefetch)

    def unpin(self, copy: Copy, now_ms: int) -> Sequence[Action]:
        """The request has ended. Usually nothing follows."""
        if copy.pins > 1:
            copy.pins -= 1
            return _NO_ACTIONS
        actions: list[Action] = []
        self.copies.unpin(copy, now_ms, actions)
        return actions

    def next_fetch(self, model_ids: Collection[ModelId]) -> ModelId:
        """Which of the models whose sizes were asked for (`EstimateSize`), and whose files have to be fetched to tell
        them, is next. Copies wait for that slot and then for one to load in the same order."""
        return self.copies.next_fetch(model_ids)

    def copies_of(self, model_id: ModelId) -> dict[PodId, CopyRecord]:
        """Every pod's copy of a model: this pod's as it is, the others' as the registry tells."""
        copies = {pod_id: copy for pod_id, copy in self.view.copies(model_id).items() if pod_id != self.pod_id}
        own = self.copies.published(model_id)
        return copies if own is None else {**copies, self.pod_id: own}

    def pod_record(self, version: str = "") -> PodRecord:
        """This pod as it describes itself to the others."""
        count = self.cache.count
        fixed_ms, bytes_per_ms = self.copies.costs.line(None)
        return PodRecord(
            pod_id=self.pod_id,
            address=self.address,
            capacity_bytes=self.limits.capacity_bytes,
            used_bytes=self.cache.committed_bytes,
            kept_bytes=self.scaling.kept_bytes,
            oldest_used_ms=self.cache.policy.oldest_used_ms(),
            loaded=count(CopyState.LOADED),
            loading=count(*IN_FLIGHT),
            failed=count(*HAS_FAILED),
            draining=self.draining,
            host_free_bytes=self._free_bytes(Tier.HOST),
            disk_free_bytes=self._free_bytes(Tier.DISK),
            queue_ms=self.cache.queue_ms // self.limits.load_slots,
            load_fixed_ms=fixed_ms,
            load_bytes_per_ms=bytes_per_ms,
            version=version,
            labels=self.limits.labels,
        )

    def _free_bytes(self, tier: Tier) -> int:
        """What a lower tier could take without giving anything up."""
        holdings = self.copies.lower.get(tier)
        return 0 if holdings is None else holdings.capacity_bytes - holdings.committed_bytes

    # Events

    def step(self, event: Event, now_ms: int) -> list[Action]:
        """Take in what happened; return what must be done.

        Raises:
            IllegalMove, KeyError: the event does not fit any copy's state, which is a bug of the caller.
        """
        actions: list[Action] = []
        copies = self.copies
        match event:
            case CopyWanted():
                copies.wanted(event, now_ms, actions)
            case SizeEstimated(model_id, size_bytes):
                copies.estimated(self.cache.copies[model_id], size_bytes, now_ms, actions)
            case LoadFinished(model_id, size_bytes, kept):
                copies.loaded(self.cache.copies[model_id], size_bytes, kept, now_ms, actions)
            case LoadFailed(model_id, error, retryable):
                copies.failed(self.cache.copies[model_id], error, retryable, now_ms, actions)
            case UnloadFinished(model_id, was_kept):
                copies.unloaded(self.cache.copies[model_id], was_kept, now_ms, actions)
            case Demoted():
                copies.demoted(event, now_ms, actions)
            case HeldDropped():
                copies.held_dropped(event, now_ms)
            case HeldLost():
                copies.held_lost(event, now_ms, actions)
            case MemoryShort():
                copies.short(event, now_ms, actions)
            case CopyUnwanted(model_id):
                copies.unwanted(model_id, now_ms, actions)
            case Tick(runs):
                copies.tick(now_ms, actions)
                self.peers.tick(now_ms)
                self.sides.forget(but=self.view.in_transition)
                self._scale(runs, now_ms, actions)
                self._lead(now_ms, actions)
                if self.draining:
                    self._drain.plan(now_ms, actions)
            case DrainStarted():
                self.draining = self.peers.draining = True
                self._drain.plan(now_ms, actions)
        copies.advance(now_ms, actions)
        return actions

    def _scale(self, runs: Runs, now_ms: int, actions: list[Action]) -> None:
        """More copies of what is used much, fewer of what is not."""
        for model_id in self.scaling.tick(runs, now_ms, actions):
            self.copies.tell(model_id, actions)
        for model_id in self.scaling.surplus(now_ms):
            self.copies.unwanted(model_id, now_ms, actions)

    def _lead(self, now_ms: int, actions: list[Action]) -> None:
        """What is on this pod to do if it is the leader."""
        if self._leaders.leader(self.view) == self.pod_id:
            actions += leader.plan(self.view, self.peers, now_ms)
            self._upkeep.plan(now_ms, actions)
        else:
            self._upkeep.rest()

    def is_replaced(self, now_ms: int) -> bool:
        """Of a draining pod: whether what is in use here is loaded elsewhere, as far as it can be."""
        return self._drain.is_done(now_ms)

    # Nobody has it

    def _place(self, model_id: ModelId, copy: Copy | None, hop: Hop, exclude: Set[PodId], now_ms: int) -> Route:
        """Nobody has the model: who loads it?"""
        model = self.view.models.get(model_id)
        if model is None:
            return self._refuse(Why.UNKNOWN_MODEL)
        if model.stopped:
            return self._refuse(Why.STOPPED, STOPPED)
        if hop is Hop.HIT_ONLY:
            return self._refuse(Why.NOT_HERE)
        if hop is Hop.LOAD_HERE:
            if copy is not None and copy.state in HAS_FAILED:
                return self._refuse(Why.NO_ROOM if copy.no_room else _failure(copy.retryable), copy.error)
            if self.draining:
                return self._refuse(Why.NOT_HERE)
            self.stats.loads += 1
            return LoadHere()
        if copy is not None and copy.state is CopyState.OVERDUE:  # also if it was another model's of that name
            exclude = {*exclude, self.pod_id}
        failures = [c for c in self.copies_of(model_id).values() if c.status is CopyStatus.FAILED]
        if len(failures) >= self.limits.load_tries:
            return self._refuse_failed(failures)
        wanted = self.peers.wanted(model)
        target = self.peers.target(wanted, {*exclude, *(failed.pod_id for failed in failures)}, now_ms)
        if target is None:
            return self._refuse_all(failures, wanted)
        if target == self.pod_id:
            self.stats.loads += 1
            return LoadHere()
        return self._forward(target, Hop.LOAD_HERE)

    def _forward(self, pod_id: PodId, hop: Hop) -> Forward:
        self.stats.forwards += 1
        return Forward(pod_id, hop)

    def _refuse(self, why: Why, detail: str = "") -> Refuse:
        self.stats.refusals += 1
        return Refuse(why, detail)

    def _refuse_failed(self, failures: Sequence[CopyRecord]) -> Refuse:
        reasons = "; ".join(f"pod {f.pod_id}: {f.error}" for f in failures)
        if all(f.no_room for f in failures):
            return self._refuse(Why.NO_ROOM, reasons)
        return self._refuse(_failure(any(f.retryable for f in failures)), reasons)

    def _refuse_all(self, failures: Sequence[CopyRecord], wanted: Wanted) -> Refuse:
        if failures:
            return self._refuse_failed(failures)
        pods = [pod for pod in self.peers.pods().values() if not pod.draining]
        if not pods:
            return self._refuse(Why.NO_POD, "every pod is draining")
        labelled = [pod for pod in pods if not missing(wanted.requires, pod.labels)]
        if not labelled:
            return self._refuse(Why.NO_POD, lacks_labels(wanted.requires))
        if wanted.givers is not None:
            return self._refuse(
                Why.NO_ROOM, "its tenant is at its limit (max_bytes), and nothing of it can be given up"
            )
        size_bytes, largest_bytes = wanted.must_fit_bytes, max(pod.capacity_bytes for pod in labelled)
        if size_bytes > largest_bytes:
            return self._refuse(
                Why.LOAD_FAILED, f"needs {size_bytes} bytes; the largest pod holds {largest_bytes} bytes"
            )
        if all(pod.capacity_bytes - pod.kept_bytes < size_bytes for pod in labelled):
            return self._refuse(
                Why.NO_ROOM, f"needs {size_bytes} bytes; copies that are to be kept leave no pod as many"
            )
        return self._refuse(Why.NO_POD, "no pod that could hold it can be reached")


def _failure(retryable: bool) -> Why:
    return Why.LOAD_FAILED_FOR_NOW if retryable else Why.LOAD_FAILED
