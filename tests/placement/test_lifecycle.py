"""The tables of states (docs/ARCHITECTURE.md), of copies and of what lower tiers hold: every move that is not in them
raises, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from placement import holdings, lifecycle
from placement.books import Books
from placement.cache import Cache, Copy
from placement.holdings import Holding, Holdings, HoldMove, HoldState
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, TRANSITIONS, CopyState, IllegalMove, Move, follow
from placement.policies.lru import Lru
from placement.records import Tier
from tests.placement.pods import model_record


class Table(NamedTuple):
    module: ModuleType
    states: type[Enum]
    moves: type[Enum]
    rows: Mapping[Any, Mapping[Any, Any]]
    books: Callable[[], Books[Any, Any, Any]]
    entry: Callable[[], Any]

    @property
    def first(self) -> Enum:
        return next(iter(self.states))

    @property
    def gone(self) -> Enum:
        return self.states["GONE"]

    def way_to(self, target: Enum) -> list[Any]:
        """The shortest way from the first state."""
        ways: dict[Enum, list[Any]] = {self.first: []}
        for state in (todo := [self.first]):
            for move, after in self.rows[state].items():
                if after not in ways:
                    ways[after] = [*ways[state], move]
                    todo.append(after)
        return ways[target]


def _copy() -> Copy:
    return Copy(model_record("m"), since_ms=1, used_ms=1, size_bytes=3, measured_bytes=4)


def _holding() -> Holding:
    return Holding(Tier.HOST, model_record("m"), 3, since_ms=1, used_ms=1)


TABLES = {
    "copy": Table(lifecycle, CopyState, Move, TRANSITIONS, lambda: Cache(10, Lru()), _copy),
    "holding": Table(holdings, HoldState, HoldMove, holdings.TRANSITIONS, lambda: Holdings(10, Lru()), _holding),
}
LEGAL = [(name, state, move) for name, table in TABLES.items() for state in table.states for move in table.rows[state]]
ILLEGAL = [
    (name, state, move)
    for name, table in TABLES.items()
    for state in table.states
    for move in table.moves
    if move not in table.rows[state]
]
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@each_table
def test_every_state_has_a_row(table: Table) -> None:
    assert set(table.rows) == set(table.states)


@pytest.mark.parametrize(("name", "state", "move"), LEGAL)
def test_legal_moves(name: str, state: Enum, move: Enum) -> None:
    table = TABLES[name]
    books, entry = table.books(), table.entry()
    books.add(entry)
    for earlier in (*table.way_to(state), move):
        books.move(entry, earlier, 2)
    assert entry.state is follow(table.rows, state, move)
    books.check()


@pytest.mark.parametrize(("name", "state", "move"), ILLEGAL)
def test_illegal_moves_raise_and_change_nothing(name: str, state: Enum, move: Enum) -> None:
    table = TABLES[name]
    books, entry = table.books(), table.entry()
    books.add(entry)
    for earlier in table.way_to(state):
        books.move(entry, earlier, 2)
    before = (repr(books), repr(entry), entry.since_ms, entry.size_bytes, dict(books.entries))
    with pytest.raises(IllegalMove, match=re.escape(f"no move {move.value!r} from {state.value!r}")):
        books.move(entry, move, 3)
    assert (repr(books), repr(entry), entry.since_ms, entry.size_bytes, dict(books.entries)) == before
    books.check()


@each_table
def test_every_state_can_be_reached_and_left_but_for_gone(table: Table) -> None:
    for state in table.states:
        table.way_to(state)
    assert [state for state, moves in table.rows.items() if not moves] == [table.gone]


@each_table
def test_every_move_is_used(table: Table) -> None:
    assert {move for moves in table.rows.values() for move in moves} == set(table.moves)


def test_in_flight_is_what_leads_to_loaded_without_being_unloaded() -> None:
    leads = {CopyState.LOADED}
    while more := {s for s, moves in TRANSITIONS.items() if leads & set(moves.values())} - leads:
        leads |= more
    assert leads - {CopyState.LOADED} - HAS_FAILED == IN_FLIGHT


@each_table
def test_the_docstrings_diagram_is_the_table(table: Table) -> None:
    assert table.module.__doc__ is not None
    drawn = {
        table.states[state]: {table.states[name] for name in after.split(" | ")}
        for state, after in re.findall(r"^ +([A-Z]+) -> ([A-Z |]+)$", table.module.__doc__, re.MULTILINE)
    }
    assert drawn == {state: set(moves.values()) for state, moves in table.rows.items() if moves}


@each_table
def test_the_docstring_explains_every_state(table: Table) -> None:
    assert table.module.__doc__ is not None
    explained = set(re.findall(r"^([A-Z]+) {2,}\S", table.module.__doc__, re.MULTILINE))
    assert explained == {state.name for state in table.states}
