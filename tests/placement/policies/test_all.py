"""What every eviction policy promises (`placement.policies.base`)."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.policies import POLICIES
from placement.policies.base import EvictionPolicy, Worth

_IDS = st.sampled_from("abcdefgh")
_GAPS_MS = st.sampled_from([0, 1, 5, 400, 1_500, 90_000])
_WORTHS = st.builds(
    Worth,
    size_bytes=st.sampled_from([1, 10, 10_000]),
    reload_ms=st.sampled_from([0.1, 20.0, 500.0]),
    run_ms=st.sampled_from([0.0, 50.0]),
    waited_ms=st.sampled_from([0.0, 70.0]),
)
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "touch", "touch", "evict", "remove", "revalue", "walk"]),
        _IDS,
        _GAPS_MS,
        _WORTHS,
        st.integers(0, 3),
    ),
    max_size=80,
)

each_policy = pytest.mark.parametrize("name", POLICIES)


def _play(policy: EvictionPolicy, steps: list[tuple[str, str, int, Worth, int]]) -> tuple[dict[str, int], int]:
    """Do the steps; returns the last use of each that is left, and what time it is."""
    now_ms, used_ms = 1_000_000, dict[str, int]()
    for what, model_id, gap_ms, worth, number in steps:
        now_ms += gap_ms
        match what:
            case "insert" if model_id not in used_ms:
                policy.insert(model_id, worth, now_ms, number)
                used_ms[model_id] = now_ms
            case "touch" if model_id in used_ms:
                policy.touch(model_id, now_ms)
                used_ms[model_id] = now_ms
            case "revalue" if model_id in used_ms:
                policy.revalue(model_id, worth)
            case "remove":
                policy.remove(model_id)
                used_ms.pop(model_id, None)
            case "evict" if used_ms:
                with closing(policy.coldest(now_ms)) as coldest:  # not always the first: that may be pinned
                    victim = list(islice(coldest, number + 1))[-1]
                policy.evict(victim)
                del used_ms[victim]
            case "walk":
                with closing(policy.coldest(now_ms)) as coldest:  # left half-way
                    list(islice(coldest, number))
    return used_ms, now_ms


@each_policy
@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(steps=_STEPS)
def test_the_residents_once_each_in_an_order_that_follows_from_what_was_done(
    name: str, steps: list[tuple[str, str, int, Worth, int]]
) -> None:
    policy, twin = POLICIES[name](), POLICIES[name]()
    used_ms, now_ms = _play(policy, steps)
    order = list(policy.coldest(now_ms))
    assert sorted(order) == sorted(used_ms), "each once, and none that was removed"
    assert order == list(policy.coldest(now_ms)), "asking changes nothing"
    _play(twin, steps)
    assert order == list(twin.coldest(now_ms)), "deterministic"
    oldest_ms = policy.oldest_used_ms()
    assert (oldest_ms > 0) == bool(used_ms)
    if used_ms and name != "lru2":  # which remembers uses that count, not all
        assert oldest_ms == used_ms[order[0]]


@each_policy
@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(steps=_STEPS, number=st.integers(0, 7), gap_ms=_GAPS_MS)
def test_a_use_never_makes_a_copy_colder(
    name: str, steps: list[tuple[str, str, int, Worth, int]], number: int, gap_ms: int
) -> None:
    used, unused = POLICIES[name](), POLICIES[name]()
    used_ms, now_ms = _play(used, steps)
    _play(unused, steps)
    if used_ms:
        model_id = sorted(used_ms)[number % len(used_ms)]
        used.touch(model_id, now_ms + gap_ms)
        before = list(unused.coldest(now_ms + gap_ms)).index(model_id)
        assert list(used.coldest(now_ms + gap_ms)).index(model_id) >= before


@each_policy
def test_a_use_before_the_last_one_changes_nothing(name: str) -> None:
    """ModelMesh, registerModel.lastUsedTime: a copy may be touched with a time that lies back."""
    policy, twin = POLICIES[name](), POLICIES[name]()
    for one in (policy, twin):
        for model_id, used_ms in (("a", 10_000), ("b", 20_000)):
            one.insert(model_id, Worth(1), used_ms)
    policy.touch("b", 5_000)
    assert list(policy.coldest(30_000)) == list(twin.coldest(30_000))
    assert policy.oldest_used_ms() == twin.oldest_used_ms()


@each_policy
def test_memory_is_bounded_by_what_is_loaded(name: str) -> None:
    """10^5 models pass through a pod that holds ten."""
    policy = POLICIES[name]()
    loaded = 0
    for number in range(100_000):
        policy.insert(f"m{number}", Worth(1), 1_000 + number, 1 + number % 3)
        policy.touch(f"m{number}", 1_000 + number)
        if loaded == 10:
            with closing(policy.coldest(1_000 + number)) as coldest:
                policy.evict(next(coldest))
        else:
            loaded += 1
    assert _objects(policy) < 2_000


def _objects(thing: object) -> int:
    """How much hangs on it: itself, its members, its attributes."""
    if isinstance(thing, dict):
        return 1 + sum(_objects(key) + _objects(value) for key, value in thing.items())
    if isinstance(thing, list | tuple | set):
        return 1 + sum(map(_objects, thing))
    slots = [getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
    return 1 + sum(map(_objects, slots)) + (_objects(vars(thing)) if hasattr(thing, "__dict__") else 0)


@pytest.mark.parametrize("name", ["lru2", "lfu", "sieve", "s3fifo", "slo_density"])
def test_a_scan_pushes_out_nothing_that_is_in_regular_use(name: str) -> None:
    """Scan resistance: what is asked for once goes before what is asked for again and again, though that was used
    longer ago. LRU fails this."""

    def survivors(policy: EvictionPolicy) -> set[str]:
        now_ms = 1_000_000
        for number in range(100):
            now_ms += 2_000
            model_id = f"regular{number % 5}"
            (policy.touch if number >= 5 else lambda m, t: policy.insert(m, Worth(1), t))(model_id, now_ms)
        for number in range(200):
            now_ms += 100
            policy.insert(f"scan{number}", Worth(1), now_ms)
            if number >= 10:
                with closing(policy.coldest(now_ms)) as coldest:
                    policy.evict(next(coldest))
        return {model_id for model_id in policy.coldest(now_ms) if model_id.startswith("regular")}

    assert survivors(POLICIES["lru"]()) == set()
    assert survivors(POLICIES[name]()) == {f"regular{number}" for number in range(5)}
