"""The books of one pod, exact to the byte (docs/ARCHITECTURE.md)."""

from __future__ import annotations

from contextlib import closing

import pytest

from placement.cache import Cache, Copy
from placement.lifecycle import CopyState, Move
from placement.policies.lru import Lru
from tests.placement.pods import model_record


def _copy(cache: Cache, model_id: str, size_bytes: int, *moves: Move, used_ms: int = 1) -> Copy:
    copy = Copy(model_record(model_id), since_ms=0, used_ms=used_ms)
    cache.add(copy)
    copy.size_bytes = copy.measured_bytes = size_bytes
    for move in moves:
        cache.move(copy, move, 5)
    return copy


_LOADED = (Move.PROMISE, Move.START, Move.FINISH, Move.SETTLE)


@pytest.fixture
def cache() -> Cache:
    return Cache(100, Lru())


@pytest.mark.parametrize(
    ("moves", "committed", "resident"),
    [
        ((), 0, 0),
        (_LOADED[:1], 7, 0),  # promised: spoken for, not taken
        (_LOADED[:2], 7, 7),
        (_LOADED[:3], 7, 7),
        (_LOADED, 7, 7),
        ((*_LOADED, Move.EVICT), 0, 7),  # bytes are free only when the unload has finished
        ((*_LOADED, Move.EVICT, Move.UNLOADED), 0, 0),
        ((*_LOADED, Move.EVICT, Move.REJECT), 0, 0),
        ((*_LOADED[:2], Move.FAIL), 0, 0),
    ],
)
def test_which_book_a_state_is_in(cache: Cache, moves: tuple[Move, ...], committed: int, resident: int) -> None:
    copy = _copy(cache, "a", 7, *moves)
    assert (cache.committed_bytes, cache.resident_bytes, cache.free_bytes) == (committed, resident, 100 - resident)
    assert cache.count(copy.state) == (0 if copy.state is CopyState.GONE else 1)
    cache.check()


def test_settling_corrects_the_books_to_what_was_measured(cache: Cache) -> None:
    copy = _copy(cache, "a", 7, *_LOADED[:3])
    copy.measured_bytes = 11
    assert cache.bytes_in(CopyState.SIZING) == 7
    cache.move(copy, Move.SETTLE, 6)
    assert cache.bytes_in(CopyState.LOADED) == copy.size_bytes == 11
    assert copy.since_ms == 6
    cache.check()


def test_a_copy_that_is_gone_is_forgotten(cache: Cache) -> None:
    _copy(cache, "a", 7, Move.DROP)
    assert not cache.copies
    _copy(cache, "a", 7)
    assert list(cache.copies) == ["a"]
    cache.check()


def test_two_copies_of_one_model_are_a_bug(cache: Cache) -> None:
    _copy(cache, "a", 7)
    with pytest.raises(AssertionError):
        _copy(cache, "a", 7)


def test_evictable_coldest_first(cache: Cache) -> None:
    for number, used_ms in enumerate([30, 10, 20, 40]):
        _copy(cache, f"m{number}", 10, *_LOADED, used_ms=used_ms)
    for _ in range(2):  # asking changes nothing
        with closing(cache.evictable(0)) as evictable:
            assert [copy.model.model_id for copy in evictable] == ["m1", "m2", "m0", "m3"]


def test_never_evictable_are_the_pinned_and_any_but_loaded(cache: Cache) -> None:
    _copy(cache, "pinned", 10, *_LOADED).pins = 1
    for number in range(4):
        _copy(cache, f"m{number}", 10, *_LOADED[:number])
    _copy(cache, "unloading", 10, *_LOADED, Move.EVICT)
    free = _copy(cache, "free", 10, *_LOADED)
    assert list(cache.evictable(0)) == [free]


def test_books_by_tenant(cache: Cache) -> None:
    copy = _copy(cache, "a", 7, Move.PROMISE)
    assert (cache.tenant_bytes, cache.tenant_loads) == ({"": 7}, {"": 1})
    cache.move(copy, Move.START, 1)
    copy.measured_bytes = 9
    cache.move(copy, Move.FINISH, 1)
    assert (cache.tenant_bytes, cache.tenant_loads) == ({"": 7}, {})
    cache.move(copy, Move.SETTLE, 1)
    assert cache.tenant_bytes == {"": 9}
    cache.move(copy, Move.EVICT, 1)
    assert cache.tenant_bytes == {}


def test_states_are_listed_in_order_of_arrival(cache: Cache) -> None:
    first, second = _copy(cache, "b", 1), _copy(cache, "a", 1)
    assert list(cache.in_state(CopyState.QUEUED)) == [first, second]
    cache.move(second, Move.PROMISE, 1)
    cache.move(first, Move.PROMISE, 1)
    assert list(cache.in_state(CopyState.WAITING)) == [second, first]


@pytest.mark.parametrize("book", ["resident", "committed"])
def test_check_tells_when_a_book_exceeds_the_capacity(cache: Cache, book: str) -> None:
    _copy(cache, "a", 60, *_LOADED, *([Move.EVICT] if book == "resident" else []))
    _copy(cache, "b", 60, *_LOADED[: 2 if book == "resident" else 1])
    with pytest.raises(AssertionError):
        cache.check()


def test_check_tells_when_a_size_was_changed_behind_the_books(cache: Cache) -> None:
    _copy(cache, "a", 60, *_LOADED).size_bytes = 61
    with pytest.raises(AssertionError):
        cache.check()


def test_repr_tells_the_books(cache: Cache) -> None:
    _copy(cache, "a", 1, *_LOADED)
    _copy(cache, "b", 2, *_LOADED[:3])
    _copy(cache, "c", 3, *_LOADED[:1])
    _copy(cache, "d", 4, *_LOADED, Move.EVICT)
    assert repr(cache) == "loaded=1 loading=2 unloading=4 promised=3 of 100"
