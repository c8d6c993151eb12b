"""Which queued copies may load, and which loaded ones go for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice

from placement.cache import Cache, Copy
from placement.lifecycle import CopyState
from placement.limits import Limits
from placement.link import age_key, is_oldest_turn, turn_key
from placement.messages import Action
from placement.moves import Moves
from placement.records import ModelId, TenantId
from placement.stats import Stats
from placement.tenants import Tenants, choose


class Admission:
    """Promises room on one pod, and makes it."""

    def __init__(self, limits: Limits, cache: Cache, moves: Moves, tenants: Tenants, stats: Stats) -> None:
        self.starved = False
        """Something waits for bytes that pins hold."""
        self._turn = 0
        """Loads promised so far."""
        self._limits = limits
        self._cache = cache
        self._moves = moves
        self._tenants = tenants
        self._stats = stats

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Let every copy go as far as bytes and slots allow: SIZING first, then WAITING, then the queue."""
        self.starved = False
        cache = self._cache
        for copy in list(cache.in_state(CopyState.UNLOADING)):
            self._moves.start_unload(copy, now_ms, actions)
        # Those that turned out smaller first: the others may need what they give back.
        for copy in sorted(cache.in_state(CopyState.SIZING), key=_excess_bytes):
            self._settle(copy, now_ms, actions)
        if cache.count(CopyState.SIZING) or any(_excess_bytes(c) > 0 for c in cache.in_state(CopyState.UNLOADING)):
            return  # more is in memory than the books say: start and promise nothing until they agree
        for copy in list(cache.in_state(CopyState.WAITING)):
            self._moves.start_load(copy, now_ms, actions)
        slots = self._limits.load_slots - cache.count(CopyState.WAITING, CopyState.LOADING)
        if slots > 0:
            self._promise(slots, now_ms, actions)

    def _promise(self, slots: int, now_ms: int, actions: list[Action]) -> None:
        """Take copies from the queue. One for which pins and loads leave no room is overtaken by smaller ones, so that
        it does not hold up the pod."""
        no_room_for: dict[object, int] = {}
        for copy in self._in_turn():
            alike = copy.tenant, copy.priority, copy.is_prefetch
            if copy.is_prefetch and no_room_for:  # what it would take is waited for
                self._reject(copy, now_ms, actions)
                continue
            least = no_room_for.get(alike, copy.size_bytes + 1)
            if copy.size_bytes >= least or not self._make_room(copy, copy.size_bytes, now_ms, actions):
                no_room_for[alike] = min(least, copy.size_bytes)
                self._reject(copy, now_ms, actions)
                continue
            self._moves.promise(copy, now_ms, actions)
            self._tenants.started(copy.tenant, copy.size_bytes)
            self._turn += 1
            slots -= 1
            if slots == 0:
                return

    def _in_turn(self) -> Iterator[Copy]:
        """The queue, as long as whoever walks it starts some: tenants by turns, those with only prefetches last, and of
        each the copies in the order of `placement.link`."""
        queues: dict[TenantId, deque[Copy]] = {}
        for copy in sorted(self._cache.in_state(CopyState.QUEUED), key=turn_key):
            if copy.estimated:
                queues.setdefault(copy.tenant, deque()).append(copy)
        tried = -1
        while True:
            for tenant in list(queues):
                loads = self._cache.tenant_loads.get(tenant, 0)
                if not queues[tenant] or not self._tenants.may_start(tenant, loads):
                    del queues[tenant]
            if not queues:
                return
            if is_oldest_turn(self._turn) and tried != self._turn:
                tried = self._turn  # if there is no room for it, the next one may go
                copy = min((copy for queue in queues.values() for copy in queue), key=age_key)
                queues[copy.tenant].remove(copy)
            else:
                first = min(queues, key=lambda tenant: (queues[tenant][0].is_prefetch, self._tenants.turn(tenant)))
                copy = queues[first].popleft()
            yield copy

    def _reject(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """There is no room for a queued copy: it waits for some, unless that is in vain or it has waited long."""
        tenant = self._tenants.record(copy.tenant)
        own_bytes = self._tenants.above_limit_bytes(
            copy.tenant, self._cache.tenant_bytes.get(copy.tenant, 0), copy.size_bytes
        )
        if own_bytes > self._cache.tenant_bytes.get(copy.tenant, 0):
            error = (
                f"no room for {copy.size_bytes} bytes: tenant {copy.tenant!r} may have {tenant.max_bytes} (max_bytes)"
            )
        elif copy.starved_ms is None:
            copy.starved_ms = now_ms
            return
        elif now_ms - copy.starved_ms < self._limits.queue_patience_ms:
            return
        else:
            error = f"no room for {copy.size_bytes} bytes: all is in use"
        copy.no_room = True
        self._moves.fail(copy, error, True, now_ms, actions)

    def trim(self, now_ms: int, actions: list[Action]) -> None:
        """Give up a copy of each tenant that is above its limit: it was lowered, or pods loaded at the same time. The
        pod with the most of the tenant's bytes does it."""
        for tenant, used_bytes in list(self._cache.tenant_bytes.items()):
            if self._tenants.gives_first(tenant, used_bytes):
                with closing(self._cache.evictable(now_ms)) as evictable:
                    victims = list(islice((copy for copy in evictable if copy.tenant == tenant), 1))
                self._evict(victims, now_ms, actions)

    def relieve(self, model_id: ModelId, size_bytes: int, now_ms: int, actions: list[Action]) -> None:
        """Give up the coldest copies of so many bytes, but not the model that asks."""
        victims: list[Copy] = []
        with closing(self._cache.evictable(now_ms)) as evictable:
            for copy in evictable:
                if size_bytes <= 0:
                    break
                if copy.model.model_id != model_id:
                    victims.append(copy)
                    size_bytes -= copy.size_bytes
        self._evict(victims, now_ms, actions)

    def _settle(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Correct the books of a loaded copy; one that turned out larger may have to wait for evictions, or to go."""
        excess = _excess_bytes(copy)
        if copy.measured_bytes > self._limits.capacity_bytes:
            copy.error, copy.retryable = self._moves.too_large(copy.measured_bytes), False
            self._moves.evict(copy, now_ms, actions)
        elif self._make_room(copy, excess, now_ms, actions):
            if excess <= self._cache.free_bytes:
                self._moves.settle(copy, now_ms, actions)
        elif now_ms - copy.since_ms >= self._limits.room_patience_ms:
            # Pins hold the room, or other copies that turned out larger and wait for this one's: it gives way.
            copy.error = (
                f"loaded as {copy.measured_bytes} bytes instead of {copy.size_bytes}, for which there is no room"
            )
            copy.retryable = copy.no_room = True
            self._moves.evict(copy, now_ms, actions)

    def _make_room(self, copy: Copy, more_bytes: int, now_ms: int, actions: list[Action]) -> bool:
        """Evict until `more_bytes` can be promised to a copy; False: pins, loads and other tenants' guarantees hold too
        much. What takes no more needs no room, also if its tenant is above its limit by now."""
        if more_bytes <= 0:
            return True
        tenant = copy.tenant
        used_bytes = self._cache.tenant_bytes
        need_bytes = more_bytes - (self._limits.capacity_bytes - self._cache.committed_bytes)
        own_bytes = self._tenants.above_limit_bytes(tenant, used_bytes.get(tenant, 0), more_bytes)
        if need_bytes <= 0 and own_bytes <= 0:
            return True
        with closing(self._cache.evictable_for(copy, now_ms)) as evictable:
            shares = self._tenants.shares(used_bytes, tenant)
            victims = choose(evictable, need_bytes, own_bytes, tenant, used_bytes, shares)
        if victims is None:
            self.starved = True
            return False
        self._evict(victims, now_ms, actions)
        return True

    def _evict(self, victims: Iterable[Copy], now_ms: int, actions: list[Action]) -> None:
        for victim in victims:
            self._stats.evictions += 1
            self._cache.policy.evict(victim.model.model_id)
            self._moves.evict(victim, now_ms, actions)


def _excess_bytes(copy: Copy) -> int:
    """How much larger a copy is than the books say, SIZING or given up from there; negative: smaller."""
    return copy.measured_bytes - copy.size_bytes
