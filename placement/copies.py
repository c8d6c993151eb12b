"""One pod's copies on their way in and out: what each event does to them, and what must be done next.

The engine owns one `LocalCopies`; nothing else moves a copy. Every method appends to `actions` what the shell must do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from placement.admission import Admission
from placement.books import Books
from placement.cache import Cache, Copy
from placement.costs import LoadCosts
from placement.holdings import Holdings
from placement.lifecycle import CopyState, IllegalMove, Move
from placement.limits import Limits
from placement.link import next_turn
from placement.messages import Action, CopyWanted, Demoted, EstimateSize, HeldDropped, HeldLost, MemoryShort, Wake
from placement.moves import Moves
from placement.policies.base import EvictionPolicy
from placement.published import Published
from placement.records import CopyRecord, ModelId, PodId, Tier
from placement.stats import Stats
from placement.tenants import Tenants
from placement.tiers import LowerTiers
from placement.view import ClusterView


class LocalCopies:
    """The copies of one pod, from wanted to gone."""

    def __init__(
        self,
        pod_id: PodId,
        limits: Limits,
        view: ClusterView,
        policy: Callable[[], EvictionPolicy],
        stats: Stats,
    ) -> None:
        self.limits = limits
        self.cache = Cache(limits.capacity_bytes, policy())
        self.costs = LoadCosts()
        sizes = {Tier.HOST: limits.host_bytes, Tier.DISK: limits.disk_bytes}
        self.lower = {tier: Holdings(size_bytes, policy()) for tier, size_bytes in sizes.items() if size_bytes}
        """What there is below the device, nearest first."""
        self.books: Sequence[Books[Any, Any, Any]] = (self.cache, *self.lower.values())
        self._published = Published(pod_id, self.cache, self.lower)
        self._tiers = LowerTiers(self.lower, limits.host_mode, self.cache, view, self.costs, self._published, stats)
        self._moves = Moves(limits, self.cache, self._tiers, self._published, stats)
        self.tenants = Tenants(pod_id, limits.capacity_bytes, view)
        self._admission = Admission(limits, self.cache, self._moves, self.tenants, stats)
        self._view = view
        self._stats = stats
        self._fetches = 0
        """Turns given so far."""

    def __repr__(self) -> str:
        lower = "".join(f" {tier}: {holdings!r}" for tier, holdings in self.lower.items())
        return f"{self.cache!r} queued={self.cache.count(CopyState.QUEUED)}{lower}"

    def unpin(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        assert copy.pins > 0, copy
        copy.pins -= 1
        if copy.pins == 0 and (self._admission.starved or copy.state is CopyState.UNLOADING):
            self.advance(now_ms, actions)

    def published(self, model_id: ModelId) -> CopyRecord | None:
        """A model's copy as the registry should tell it; None: it should not."""
        return self._published.record(model_id)

    def wanted(self, event: CopyWanted, now_ms: int, actions: list[Action]) -> None:
        """A copy that is on its way out has to be gone first: who wants the model hears of that and asks again."""
        copy = self.cache.copies.get(event.model_id)
        used_ms = min(event.last_used_ms, now_ms)
        if copy is None:
            model = self._view.models[event.model_id]
            copy = Copy(model, since_ms=now_ms, used_ms=used_ms, priority=event.priority or model.priority)
            copy.is_prefetch = event.is_prefetch
            self._tiers.touch(event.model_id, used_ms)
            self._tiers.choose_source(copy)
            copy.load_ms = self._load_ms(copy, self._view.size_bytes(event.model_id))
            self.cache.add(copy)
            self._published.tell(event.model_id, actions)
            if copy.source is None:
                actions.append(EstimateSize(copy.model))
            else:
                self.estimated(copy, copy.source.size_bytes, now_ms, actions)
        elif copy.state is CopyState.LOADED:
            self.cache.policy.touch(event.model_id, used_ms)
            copy.used_ms = max(copy.used_ms, used_ms)
        else:
            copy.used(used_ms)
            copy.asked(event.priority, event.is_prefetch)

    def adopt(
        self, model_id: ModelId, registration: int, tier: Tier, size_bytes: int, now_ms: int, actions: list[Action]
    ) -> bool:
        """Something was found in a tier when the pod started; `registration` as in `CopyRecord`. False: it is of no
        use, and the shell deletes it without a word."""
        return self._tiers.adopt(model_id, registration, tier, size_bytes, now_ms, actions)

    def next_fetch(self, model_ids: Iterable[ModelId]) -> ModelId:
        """Which of the models that wait to be fetched, so that their sizes can be told, is next."""
        copy = next_turn((self.cache.copies[model_id] for model_id in model_ids), self._fetches)
        assert copy is not None, "nothing waits"
        self._fetches += 1
        return copy.model.model_id

    def estimated(self, copy: Copy, size_bytes: int, now_ms: int, actions: list[Action]) -> None:
        if copy.state is not CopyState.QUEUED or copy.estimated:
            raise IllegalMove(f"nobody asked for a size: {copy!r}")
        if copy.doomed:
            self._moves.drop(copy, now_ms, actions)
            return
        copy.estimated = True
        size_bytes = self._view.measured(copy.model.model_id) or size_bytes
        self.cache.estimate(copy, size_bytes, self._load_ms(copy, size_bytes))
        if copy.size_bytes > self.limits.capacity_bytes:
            self._moves.fail(copy, self._moves.too_large(copy.size_bytes), False, now_ms, actions)

    def loaded(self, copy: Copy, size_bytes: int, kept: Mapping[Tier, int], now_ms: int, actions: list[Action]) -> None:
        """The load has ended well; `advance` corrects the books."""
        is_late = copy.state is CopyState.OVERDUE
        took_ms = now_ms - copy.since_ms + (self.limits.load_timeout_ms if is_late else 0)
        self.cache.move(copy, Move.FINISH, now_ms)
        self._stats.loads_finished += 1
        source = None if copy.source is None else copy.source.tier
        self.costs.observe(copy.model.model_id, source, size_bytes, took_ms)
        copy.measured_bytes = size_bytes
        self._tiers.load_ended(copy, kept, now_ms, actions)
        if is_late:  # it was told as failed
            copy.error = ""
            self._published.tell(copy.model.model_id, actions)
        if copy.doomed:
            self._moves.evict(copy, now_ms, actions)
        else:
            self._view.learn_size(copy.model.model_id, copy.model.created, size_bytes)

    def failed(self, copy: Copy, error: str, retryable: bool, now_ms: int, actions: list[Action]) -> None:
        if copy.estimated and copy.state is CopyState.QUEUED:
            raise IllegalMove(f"nobody is at work on it: {copy!r}")
        self._moves.fail(copy, error, retryable, now_ms, actions)
        if copy.doomed:
            self._moves.drop(copy, now_ms, actions)

    def unloaded(self, copy: Copy, kept: bool, now_ms: int, actions: list[Action]) -> None:
        if not copy.unload_started:
            raise IllegalMove(f"nobody asked for an unload: {copy!r}")
        self._moves.unloaded(copy, kept, now_ms, actions)

    def demoted(self, event: Demoted, now_ms: int, actions: list[Action]) -> None:
        self._tiers.demoted(event.model_id, event.target, event.kept, now_ms, actions)

    def held_dropped(self, event: HeldDropped, now_ms: int) -> None:
        self._tiers.dropped(event.model_id, event.tier, now_ms)

    def held_lost(self, event: HeldLost, now_ms: int, actions: list[Action]) -> None:
        self._tiers.lost(event.model_id, event.tier, now_ms, actions)

    def short(self, event: MemoryShort, now_ms: int, actions: list[Action]) -> None:
        self._admission.relieve(event.model_id, event.size_bytes, now_ms, actions)

    def unwanted(self, model_id: ModelId, now_ms: int, actions: list[Action]) -> None:
        """The model was removed, or somebody asked for its copy to be given up; in the latter case lower tiers keep
        theirs."""
        copy = self.cache.copies.get(model_id)
        if copy is not None:
            self._give_up(copy, now_ms, actions)
        self._tiers.forget(model_id, now_ms, actions)

    def _give_up(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        match copy.state:
            case CopyState.LOADED | CopyState.SIZING:
                self._moves.evict(copy, now_ms, actions)
            case CopyState.UNLOADING:
                copy.error = ""
            case CopyState.WAITING | CopyState.FAILED:
                self._moves.drop(copy, now_ms, actions)
            case CopyState.QUEUED if copy.estimated:
                self._moves.drop(copy, now_ms, actions)
            case _:  # the loader is at work and cannot be stopped: its answer will find the copy doomed
                copy.doomed = True
                self._published.tell(copy.model.model_id, actions)
                actions.append(Wake(copy.model.model_id))

    def tell(self, model_id: ModelId, actions: list[Action]) -> None:
        """How the copy is used has changed."""
        self._published.tell(model_id, actions)

    def tick(self, now_ms: int, actions: list[Action]) -> None:
        """Forget failures whose time has come, and give up loads that take too long; see that tenants keep to their
        limits."""
        self.tenants.refresh()
        self._admission.trim(now_ms, actions)
        for copy in [c for c in self.cache.in_state(CopyState.FAILED) if c.expires_ms <= now_ms]:
            self._moves.drop(copy, now_ms, actions)
        started_ms = now_ms - self.limits.load_timeout_ms
        slow = [copy for copy in self.cache.in_state(CopyState.LOADING) if copy.since_ms <= started_ms]
        for copy in slow[: self.limits.max_overdue - self.cache.count(CopyState.OVERDUE)]:
            self._moves.expire(copy, now_ms, actions)

    def _load_ms(self, copy: Copy, size_bytes: int) -> int:
        source = None if copy.source is None else copy.source.tier
        return ceil(self.costs.reload_ms(copy.model.model_id, source, size_bytes))

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Let every copy go as far as bytes and slots allow."""
        self._tiers.advance(now_ms, actions)
        self._admission.advance(now_ms, actions)
