"""The books of one tier: what lies there and what is promised, by state, exact to the byte.

Two invariants hold after every change (`check` asserts them):

    what lies there                                       <= capacity
    what will lie there once all that is to go has gone   <= capacity

So bytes count from the moment they are promised, and until what gives them up has finished.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import closing
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from placement.lifecycle import follow
from placement.policies.base import EvictionPolicy, Worth
from placement.records import ModelId, ModelRecord


class Entry(Protocol):
    """What the books hold of one model."""

    model: ModelRecord
    state: Any
    since_ms: int
    used_ms: int
    uses: int
    size_bytes: int
    pins: int

    @property
    def worth(self) -> Worth: ...


S = TypeVar("S", bound=Enum)
M = TypeVar("M", bound=Enum)
E = TypeVar("E", bound=Entry)


class Life(NamedTuple, Generic[S, M]):
    """The states of an entry, and what they mean for the books."""

    table: Mapping[S, Mapping[M, S]]
    resident: frozenset[S]
    """It takes bytes."""
    committed: frozenset[S]
    """It takes bytes, or will, and is not on its way out."""
    settled: S
    """It may be evicted: the policy knows it."""
    gone: S


class Books(Generic[S, M, E]):
    """Entries by model, their bytes, and the eviction order."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy, life: Life[S, M]) -> None:
        self.capacity_bytes = capacity_bytes
        self.policy = policy
        self.entries: dict[ModelId, E] = {}
        self._life = life
        self.committed_bytes = 0
        """What is spoken for once all that is to go has gone."""
        self.resident_bytes = 0
        """What lies there by the books."""
        self._bytes = dict.fromkeys(life.table, 0)
        self._in_state: dict[S, dict[ModelId, E]] = {state: {} for state in life.table}

    def count(self, *states: S) -> int:
        return sum(len(self._in_state[state]) for state in states)

    def in_state(self, state: S) -> Collection[E]:
        """Live: in order of their coming into the state."""
        return self._in_state[state].values()

    def bytes_in(self, *states: S) -> int:
        return sum(self._bytes[state] for state in states)

    @property
    def free_bytes(self) -> int:
        """What may be taken right now."""
        return self.capacity_bytes - self.resident_bytes

    def add(self, entry: E) -> None:
        """Take up an entry in its first state."""
        assert entry.model.model_id not in self.entries, entry
        self.entries[entry.model.model_id] = entry
        self._enter(entry)

    def move(self, entry: E, move: M, now_ms: int) -> None:
        """The only way a state changes: the table, the books and the eviction order stay in step.

        Raises:
            IllegalMove: nothing has changed.
        """
        after = follow(self._life.table, entry.state, move)
        self._leave(entry)
        entry.state, entry.since_ms = after, now_ms
        if after is self._life.gone:
            del self.entries[entry.model.model_id]
        else:
            self._enter(entry)

    def resize(self, entry: E, size_bytes: int) -> None:
        """What it takes was found to be another amount."""
        self._leave(entry)
        entry.size_bytes = size_bytes
        self._enter(entry)

    def evictable(self, now_ms: int) -> Generator[E, None, None]:
        """The settled entries that nobody uses, first to go first. Whoever walks closes it."""
        with closing(self.policy.coldest(now_ms)) as coldest:
            for model_id in coldest:
                entry = self.entries[model_id]
                if not entry.pins:
                    yield entry

    def _enter(self, entry: E) -> None:
        self._in_state[entry.state][entry.model.model_id] = entry
        self._count(entry.state, entry.size_bytes)
        if entry.state is self._life.settled:
            self.policy.insert(entry.model.model_id, entry.worth, entry.used_ms, entry.uses)

    def _leave(self, entry: E) -> None:
        del self._in_state[entry.state][entry.model.model_id]
        self._count(entry.state, -entry.size_bytes)
        if entry.state is self._life.settled:
            self.policy.remove(entry.model.model_id)

    def _count(self, state: S, size_bytes: int) -> None:
        is_resident, is_committed = state in self._life.resident, state in self._life.committed
        if is_resident:
            self.resident_bytes += size_bytes
        if is_committed:
            self.committed_bytes += size_bytes
        if is_resident or is_committed:
            self._bytes[state] += size_bytes

    def check(self) -> None:
        """Assert the invariants and that the books equal the sum of the entries (tests and the simulator call it)."""
        for state in self._life.table:
            entries = {model_id: entry for model_id, entry in self.entries.items() if entry.state is state}
            assert self._in_state[state] == entries, state
            takes = state in self._life.resident | self._life.committed
            held = sum(entry.size_bytes for entry in entries.values()) if takes else 0
            assert self._bytes[state] == held, (state, self._bytes[state], held)
        assert self.resident_bytes == self.bytes_in(*self._life.resident)
        assert self.committed_bytes == self.bytes_in(*self._life.committed)
        assert sorted(self.policy.coldest(0)) == sorted(self._in_state[self._life.settled])
        assert self.resident_bytes <= self.capacity_bytes, self
        assert self.committed_bytes <= self.capacity_bytes, self
        assert all(entry.pins >= 0 for entry in self.entries.values())
