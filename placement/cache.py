"""One pod's copies and its bytes, exact to the byte.

Every byte of capacity is in one of five books:

    loaded      LOADED copies, at their measured size
    loading     LOADING and SIZING copies, at their estimate until the books are corrected
    unloading   UNLOADING copies: still in memory
    promised    WAITING copies: not taken yet, but spoken for
    free        the rest

Two invariants hold after every change (`check` asserts them):

    loaded + loading + unloading <= capacity    what is in memory
    loaded + loading + promised  <= capacity    what will be once unloads have finished
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from placement.lifecycle import CopyState, Move, next_state
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
    """These three: as in `Worth`."""
    state: CopyState = CopyState.QUEUED
    size_bytes: int = 0
    """What the books hold for it: estimated until LOADED, measured from then on."""
    measured_bytes: int = 0
    """While SIZING: what the books must be corrected to."""
    pins: int = 0
    """Requests that use it or wait for it; a pinned copy is never evicted."""
    doomed: bool = False
    """Nobody wants it any more, but the loader is at work on it: it goes as soon as that has ended."""
    unload_started: bool = False
    estimated: bool = False
    error: str = ""
    retryable: bool = False
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

    def join(self, used_ms: int, priority: Priority | None, is_prefetch: bool) -> None:
        """Somebody else wants it while it is on its way."""
        self.used_ms = max(self.used_ms, used_ms)
        self.uses += 1
        self.is_prefetch = self.is_prefetch and is_prefetch
        self.raise_priority(priority)

    def raise_priority(self, priority: Priority | None) -> None:
        """To a request's own; None: it has none, so the model's counts."""
        self.priority = min(self.priority, priority or self.model.priority, key=RANK.__getitem__)

    @property
    def worth(self) -> Worth:
        return Worth(self.size_bytes, self.reload_ms, self.run_ms, self.slo_ms)


class Cache:
    """The copies of one pod by model, the books, and the eviction order."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        self.capacity_bytes = capacity_bytes
        self.policy = policy
        self.copies: dict[ModelId, Copy] = {}
        self._bytes = dict.fromkeys(CopyState, 0)
        self._in_state: dict[CopyState, dict[ModelId, Copy]] = {state: {} for state in CopyState}
        self.queue_ms = 0
        """What the loads queued and under way take together, as estimated; those under way count whole."""
        self.tenant_bytes: dict[TenantId, int] = {}
        """Committed, by tenant; who has nothing is left out."""
        self.tenant_loads: dict[TenantId, int] = {}
        """Copies WAITING or LOADING, by tenant; who has none is left out."""

    def __repr__(self) -> str:
        b = self._bytes
        return (
            f"loaded={b[CopyState.LOADED]} loading={b[CopyState.LOADING] + b[CopyState.SIZING]} "
            f"unloading={b[CopyState.UNLOADING]} promised={b[CopyState.WAITING]} of {self.capacity_bytes}"
        )

    def count(self, *states: CopyState) -> int:
        return sum(len(self._in_state[state]) for state in states)

    def in_state(self, state: CopyState) -> Collection[Copy]:
        """Live: in order of their coming into the state."""
        return self._in_state[state].values()

    def bytes_in(self, *states: CopyState) -> int:
        return sum(self._bytes[state] for state in states)

    @property
    def committed_bytes(self) -> int:
        """Loaded, loading or promised: what is spoken for once unloads have finished."""
        return self.bytes_in(*_COMMITTED)

    @property
    def resident_bytes(self) -> int:
        """What is in memory by the books."""
        return self.bytes_in(CopyState.LOADED, CopyState.LOADING, CopyState.SIZING, CopyState.UNLOADING)

    @property
    def free_bytes(self) -> int:
        """What a load may take right now."""
        return self.capacity_bytes - self.resident_bytes

    def add(self, copy: Copy) -> None:
        """Take up a QUEUED copy, which holds no bytes yet."""
        assert copy.model.model_id not in self.copies, copy
        self.copies[copy.model.model_id] = copy
        self._in_state[copy.state][copy.model.model_id] = copy
        self.queue_ms += copy.load_ms

    def estimate(self, copy: Copy, size_bytes: int, load_ms: int) -> None:
        """What a QUEUED copy will take, as far as is known."""
        assert copy.state is CopyState.QUEUED, copy
        self.queue_ms += load_ms - copy.load_ms
        copy.size_bytes, copy.load_ms = size_bytes, load_ms

    def move(self, copy: Copy, move: Move, now_ms: int) -> None:
        """The only way a copy's state changes: the table, the books and the eviction order stay in step.

        Raises:
            IllegalMove: nothing has changed.
        """
        before, after = copy.state, next_state(copy.state, move)
        model_id = copy.model.model_id
        del self._in_state[before][model_id]
        if before in _HOLDING:
            self._bytes[before] -= copy.size_bytes
            self._attribute(copy, before, -1)
        if before in _UNLOADED and after not in _UNLOADED:
            self.queue_ms -= copy.load_ms
        copy.state, copy.since_ms = after, now_ms
        if move is Move.SETTLE:
            copy.size_bytes = copy.measured_bytes
        if after is CopyState.LOADED:
            self.policy.insert(model_id, copy.worth, copy.used_ms, copy.uses)
        elif before is CopyState.LOADED:
            self.policy.remove(model_id)
        if after is CopyState.GONE:
            del self.copies[model_id]
            return
        self._in_state[after][model_id] = copy
        if after in _HOLDING:
            self._bytes[after] += copy.size_bytes
            self._attribute(copy, after, 1)

    def _attribute(self, copy: Copy, state: CopyState, sign: int) -> None:
        """Count what a copy holds in a state for its tenant, or no longer."""
        for book, amount, states in (
            (self.tenant_bytes, copy.size_bytes, _COMMITTED),
            (self.tenant_loads, 1, _UNDER_WAY),
        ):
            if state in states:
                left = book.pop(copy.tenant, 0) + sign * amount
                if left:
                    book[copy.tenant] = left

    def evictable(self, now_ms: int) -> Generator[Copy, None, None]:
        """The LOADED copies that nobody uses, first to go first. Whoever walks closes it."""
        with closing(self.policy.coldest(now_ms)) as coldest:
            for model_id in coldest:
                copy = self.copies[model_id]
                if not copy.pins:
                    yield copy

    def check(self) -> None:
        """Assert the invariants and that the books equal the sum of the copies (tests and the simulator call it)."""
        for state in CopyState:
            copies = {model_id: copy for model_id, copy in self.copies.items() if copy.state is state}
            assert self._in_state[state] == copies, state
            held = sum(copy.size_bytes for copy in copies.values()) if state in _HOLDING else 0
            assert self._bytes[state] == held, (state, self._bytes[state], held)
        assert sorted(self.policy.coldest(0)) == sorted(self._in_state[CopyState.LOADED])
        assert self.resident_bytes <= self.capacity_bytes, self
        assert self.committed_bytes <= self.capacity_bytes, self
        for book, total in (
            (self.tenant_bytes, self.committed_bytes),
            (self.tenant_loads, self.count(*_UNDER_WAY)),
        ):
            assert sum(book.values()) == total, (book, total)
            assert all(amount > 0 for amount in book.values()), book
        assert self.queue_ms == sum(copy.load_ms for copy in self.copies.values() if copy.state in _UNLOADED)
        assert all(copy.pins >= 0 for copy in self.copies.values())


_COMMITTED: Final = (CopyState.LOADED, CopyState.LOADING, CopyState.SIZING, CopyState.WAITING)
_UNDER_WAY: Final = (CopyState.WAITING, CopyState.LOADING)
_UNLOADED: Final = (CopyState.QUEUED, *_UNDER_WAY)
_HOLDING: Final = frozenset(
    {CopyState.WAITING, CopyState.LOADING, CopyState.SIZING, CopyState.LOADED, CopyState.UNLOADING}
)
