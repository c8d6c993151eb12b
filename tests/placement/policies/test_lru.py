"""Exact least-recently-used by time of use, against a model that sorts (issue 2, part 4)."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.policies.base import Worth
from placement.policies.lru import Lru

_IDS = st.sampled_from("abcdefgh")
_TIMES = st.integers(1, 50)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), _IDS, _TIMES),
        st.tuples(st.just("touch"), _IDS, _TIMES),
        st.tuples(st.just("remove"), _IDS, _TIMES),
        st.tuples(st.just("walk"), _IDS, st.integers(0, 8)),
    ),
    max_size=120,
)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(_STEPS)
def test_order_is_by_last_use_then_by_arrival(steps: list[tuple[str, str, int]]) -> None:
    lru, naive, arrivals = Lru(), dict[str, tuple[int, int]](), 0
    for what, model_id, number in steps:
        if what == "insert":
            arrivals += 1
            lru.insert(model_id, Worth(1), number)
            naive[model_id] = (number, arrivals)
        elif what == "touch" and model_id in naive:
            lru.touch(model_id, number)
            used_ms, arrival = naive[model_id]
            naive[model_id] = (max(used_ms, number), arrival)
        elif what == "remove":
            lru.remove(model_id)
            naive.pop(model_id, None)
        order = sorted(naive, key=naive.__getitem__)
        if what == "walk":
            with closing(lru.coldest(0)) as coldest:  # left half-way, as one that needs no more victims does
                assert list(islice(coldest, number)) == order[:number]
        assert lru.oldest_used_ms() == (naive[order[0]][0] if order else 0)
    assert list(lru.coldest(0)) == sorted(naive, key=naive.__getitem__)


def test_insertion_at_any_age() -> None:
    """ModelMesh, registerModel.lastUsedTime: a bulk registration must not push out what is in use."""
    lru = Lru()
    lru.insert("used now", Worth(1), 1_000)
    lru.insert("an hour old", Worth(1), 400)
    lru.insert("two hours old", Worth(1), 100)
    assert list(lru.coldest(0)) == ["two hours old", "an hour old", "used now"]


def test_an_earlier_use_does_not_make_a_copy_older() -> None:
    lru = Lru()
    lru.insert("a", Worth(1), 10)
    lru.insert("b", Worth(1), 20)
    lru.touch("b", 5)
    assert list(lru.coldest(0)) == ["a", "b"]


def test_removing_what_is_not_there_is_fine() -> None:
    Lru().remove("a")


def test_the_heap_does_not_grow_with_churn_nor_with_touches() -> None:
    lru = Lru()
    for number in range(20_000):
        lru.insert(f"m{number}", Worth(1), number)
        lru.touch(f"m{number}", number + 5)
        if number >= 100:
            lru.remove(f"m{number - 100}")
        lru.oldest_used_ms()
    assert len(lru._order._heap) <= 2 * 101 + 64
    assert list(lru.coldest(0)) == [f"m{number}" for number in range(19_900, 20_000)]


def test_reinsertion_of_one_model_does_not_grow_the_heap() -> None:
    lru = Lru()
    for number in range(1_000):
        lru.insert("m", Worth(1), 1_000 - number)
    assert len(lru._order._heap) <= 2 + 64
    assert list(lru.coldest(0)) == ["m"]
    assert lru.oldest_used_ms() == 1
