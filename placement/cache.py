"""One pod's copies and the bytes of its device, exact to the byte (`placement.books`).

Every byte of capacity is in one of five books:

    loaded      LOADED copies, at their measured size
    loading     LOADING, OVERDUE and SIZING copies, at their estimate until the books are corrected
    unloading   UNLOADING copies: still in memory
    promised    WAITING copies: not taken yet, but spoken for
    free        the rest

Two invariants hold after every change:

    loaded + loading + unloading <= capacity    what is in memory
    loaded + loading + promised  <= capacity    what will be once unloads have finished
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from placement.books import Books, Life
from placement.holdings import Holding
from placement.lifecycle import TRANSITIONS, CopyState, Move
from placement.link import RANK
from placement.policies.base import EvictionPolicy, Worth
from placement.records import ModelId, ModelRecord, Priority, TenantId


@dataclass(eq=False, slots=True)
class Copy:
    """One model's copy on this pod, from the moment it is wanted."""

    model: ModelRecord
    since_ms: int
    """When it came into its state."""
    used_ms: int
    """Where it enters the eviction order when it is loaded."""
    is_prefetch: bool = False
    """Nobody has asked for it yet: it is loaded ahead."""
    priority: Priority = Priority.NORMAL
    """The highest of the model's and of the requests that wait for it."""
    load_ms: int = 0
    """How long its load takes, as estimated when it was queued."""
    uses: int = 1
    """Requests that wanted it until it was loaded."""
    reload_ms: float = 1.0
    run_ms: float = 0.0
    slo_ms: float = 100.0
    waited_ms: int = 0
    """These four: as in `Worth`."""
    state: CopyState = CopyState.QUEUED
    size_bytes: int = 0
    """What the books hold for it: estimated until LOADED, measured from then on."""
    measured_bytes: int = 0
    """While SIZING: what the books must be corrected to."""
    pins: int = 0
    """Requests that use it or wait for it; a pinned copy is never evicted."""
    busy_percent: int = 0
    """As it is told to others (`CopyRecord`); so is `used_ms`, as of `told_ms`."""
    told_ms: int = 0
    guarded_until_ms: int = 0
    """What was just loaded does not go for a lesser one until then. (Who waited for it has pinned it anyway.)"""
    source: Holding | None = None
    """Until the end of its load: what that reads, if not the store. Pinned."""
    fills: list[Holding] = field(default_factory=list)
    """What its load, or its unload, leaves in lower tiers when it has ended."""
    doomed: bool = False
    """Nobody wants it any more, but the loader is at work on it: it goes as soon as that has ended."""
    unload_started: bool = False
    estimated: bool = False
    error: str = ""
    retryable: bool = False
    starved_ms: int | None = None
    """While QUEUED: since when room for it was looked for in vain."""
    no_room: bool = False
    """The failure is that there was no room; `retryable` too."""
    expires_ms: int = 0
    """While FAILED: when it is forgotten."""

    def __repr__(self) -> str:
        return f"<{self.model.model_id} {self.state.value} {self.size_bytes}B pins={self.pins}>"

    @property
    def tenant(self) -> TenantId:
        return self.model.tenant

    @property
    def remaining(self) -> float:
        """See `placement.link.Waiting`."""
        return self.load_ms

    @property
    def requests(self) -> int:
        return self.pins

    def used(self, used_ms: int) -> None:
        """Somebody else wants it while it is on its way."""
        self.used_ms = max(self.used_ms, used_ms)
        self.uses += 1

    def asked(self, priority: Priority | None, is_prefetch: bool) -> None:
        """By somebody of this class (None: the model's), who may not be waiting."""
        self.priority = min(self.priority, priority or self.model.priority, key=RANK.__getitem__)
        self.is_prefetch = self.is_prefetch and is_prefetch

    def is_lesser(self, other: Copy) -> bool:
        """Whether it has less claim to be loaded than another: nobody waits for it, or who does is of a lower class."""
        return self.is_prefetch or RANK[self.priority] > RANK[other.priority]

    @property
    def worth(self) -> Worth:
        waited_ms = 0 if self.is_prefetch else self.waited_ms  # which waits until there is nothing else to do
        return Worth(self.size_bytes, self.reload_ms, self.run_ms, self.slo_ms, waited_ms)


class Cache(Books[CopyState, Move, Copy]):
    """The copies of one pod by model, the books, and the eviction order."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        super().__init__(capacity_bytes, policy, _LIFE)
        self.copies: Final = self.entries
        self.queue_ms = 0
        """What the loads queued and under way take together, as estimated; those under way count whole."""
        self.tenant_bytes: dict[TenantId, int] = {}
        """Committed, by tenant; who has nothing is left out."""
        self.is_kept: Callable[[ModelId], bool] = lambda model_id: False
        """Whether a model's copy does not go for room, used or not."""
        self.tenant_loads: dict[TenantId, int] = {}
        """Copies WAITING or LOADING, by tenant; who has none is left out."""

    def __repr__(self) -> str:
        return (
            f"loaded={self.bytes_in(CopyState.LOADED)} loading={self.bytes_in(*_LOADING)} "
            f"unloading={self.bytes_in(CopyState.UNLOADING)} promised={self.bytes_in(CopyState.WAITING)} "
            f"of {self.capacity_bytes}"
        )

    def estimate(self, copy: Copy, size_bytes: int, load_ms: int) -> None:
        """What a QUEUED copy will take, as far as is known."""
        assert copy.state is CopyState.QUEUED, copy
        self.queue_ms += load_ms - copy.load_ms
        copy.size_bytes, copy.load_ms = size_bytes, load_ms

    def evictable(self, now_ms: int) -> Generator[Copy, None, None]:
        with closing(super().evictable(now_ms)) as evictable:
            for copy in evictable:
                if not self.is_kept(copy.model.model_id):
                    yield copy

    def evictable_for(self, asking: Copy, now_ms: int) -> Generator[Copy, None, None]:
        """Those that may go for another copy, first to go first. Whoever walks closes it."""
        with closing(self.evictable(now_ms)) as evictable:
            for copy in evictable:
                if copy.guarded_until_ms <= now_ms or not asking.is_lesser(copy):
                    yield copy

    def _enter(self, copy: Copy) -> None:
        if copy.state is CopyState.LOADED:
            copy.size_bytes = copy.measured_bytes
        super()._enter(copy)
        self._attribute(copy, 1)

    def _leave(self, copy: Copy) -> None:
        super()._leave(copy)
        self._attribute(copy, -1)

    def _attribute(self, copy: Copy, sign: int) -> None:
        """Count what a copy holds in its state, or no longer."""
        if copy.state in _UNLOADED:
            self.queue_ms += sign * copy.load_ms
        for book, amount, states in (
            (self.tenant_bytes, copy.size_bytes, _LIFE.committed),
            (self.tenant_loads, 1, _UNDER_WAY),
        ):
            if copy.state in states:
                left = book.pop(copy.tenant, 0) + sign * amount
                if left:
                    book[copy.tenant] = left

    def check(self) -> None:
        super().check()
        for book, total in (
            (self.tenant_bytes, self.committed_bytes),
            (self.tenant_loads, self.count(*_UNDER_WAY)),
        ):
            assert sum(book.values()) == total, (book, total)
            assert all(amount > 0 for amount in book.values()), book
        assert self.queue_ms == sum(copy.load_ms for copy in self.copies.values() if copy.state in _UNLOADED)


_LOADING: Final = frozenset({CopyState.LOADING, CopyState.OVERDUE, CopyState.SIZING})
_UNDER_WAY: Final = frozenset({CopyState.WAITING, CopyState.LOADING})
_UNLOADED: Final = _UNDER_WAY | {CopyState.QUEUED}
_LIFE: Final = Life(
    TRANSITIONS,
    resident=_LOADING | {CopyState.LOADED, CopyState.UNLOADING},
    committed=_LOADING | {CopyState.LOADED, CopyState.WAITING},
    settled=CopyState.LOADED,
    gone=CopyState.GONE,
)
