"""The table of a copy's life (docs/ARCHITECTURE.md): every move that is not in it raises, and changes nothing."""

from __future__ import annotations

import re

import pytest

from placement import lifecycle
from placement.cache import Cache, Copy
from placement.lifecycle import IN_FLIGHT, TRANSITIONS, CopyState, IllegalMove, Move, next_state
from placement.policies.lru import Lru
from tests.placement.pods import model_record

LEGAL = [(state, move) for state, moves in TRANSITIONS.items() for move in moves]
ILLEGAL = [(state, move) for state in CopyState for move in Move if move not in TRANSITIONS[state]]


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(CopyState)


@pytest.mark.parametrize(("state", "move"), LEGAL)
def test_legal_moves(state: CopyState, move: Move) -> None:
    assert next_state(state, move) is TRANSITIONS[state][move]


@pytest.mark.parametrize(("state", "move"), ILLEGAL)
def test_illegal_moves_raise_and_change_nothing(state: CopyState, move: Move) -> None:
    cache = Cache(10, Lru())
    copy = Copy(model_record("m"), since_ms=1, used_ms=1, size_bytes=3, measured_bytes=4)
    cache.add(copy)
    for earlier in _way_to(state):
        cache.move(copy, earlier, 2)
    before = (repr(cache), repr(copy), copy.since_ms, copy.size_bytes, dict(cache.copies))
    with pytest.raises(IllegalMove, match=re.escape(f"no move {move.value!r} from {state.value!r}")):
        cache.move(copy, move, 3)
    assert (repr(cache), repr(copy), copy.since_ms, copy.size_bytes, dict(cache.copies)) == before
    cache.check()


def test_every_state_can_be_reached_and_left_but_for_gone() -> None:
    for state in CopyState:
        _way_to(state)
    assert [state for state, moves in TRANSITIONS.items() if not moves] == [CopyState.GONE]


def test_every_move_is_used() -> None:
    assert {move for _, move in LEGAL} == set(Move)


def test_in_flight_is_what_leads_to_loaded_without_being_unloaded() -> None:
    leads = {CopyState.LOADED}
    while more := {s for s, moves in TRANSITIONS.items() if leads & set(moves.values())} - leads:
        leads |= more
    assert leads - {CopyState.LOADED} == IN_FLIGHT


def test_the_docstrings_diagram_is_the_table() -> None:
    assert lifecycle.__doc__ is not None
    drawn = {
        CopyState[state]: {CopyState[name] for name in after.split(" | ")}
        for state, after in re.findall(r"^ +([A-Z]+) -> ([A-Z |]+)$", lifecycle.__doc__, re.MULTILINE)
    }
    assert drawn == {state: set(moves.values()) for state, moves in TRANSITIONS.items() if moves}


def test_the_docstring_explains_every_state() -> None:
    assert lifecycle.__doc__ is not None
    assert set(re.findall(r"^([A-Z]+) {2,}\S", lifecycle.__doc__, re.MULTILINE)) == {s.name for s in CopyState}


def _way_to(target: CopyState) -> list[Move]:
    """The shortest way from QUEUED."""
    ways: dict[CopyState, list[Move]] = {CopyState.QUEUED: []}
    for state in (todo := [CopyState.QUEUED]):
        for move, after in TRANSITIONS[state].items():
            if after not in ways:
                ways[after] = [*ways[state], move]
                todo.append(after)
    return ways[target]
