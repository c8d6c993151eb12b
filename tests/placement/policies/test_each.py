"""The property each policy is known for, by its paper."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from placement.policies.base import EvictionPolicy, Worth
from placement.policies.gdsf import Gdsf
from placement.policies.lfu import Lfu
from placement.policies.lru2 import CORRELATED_MS, Lru2
from placement.policies.s3fifo import S3Fifo
from placement.policies.sieve import Sieve
from placement.policies.slo_density import FAST_MS, WAITS, SloDensity

_NOW_MS = 10_000_000


def _order(policy: EvictionPolicy, now_ms: int = _NOW_MS) -> list[str]:
    return list(policy.coldest(now_ms))


def _filled(policy: EvictionPolicy, model_ids: str, at_ms: int = 1_000) -> None:
    for model_id in model_ids:
        policy.insert(model_id, Worth(1), at_ms)


def test_lru2_orders_by_the_use_before_the_last() -> None:
    """O'Neil et al. 1993, definition 2.2: those without a second use first, by LRU among themselves."""
    policy = Lru2()
    for model_id, uses_ms in {"a": (1_000, 90_000), "b": (20_000, 30_000), "c": (80_000,), "d": (70_000,)}.items():
        policy.insert(model_id, Worth(1), uses_ms[0])
        for used_ms in uses_ms[1:]:
            policy.touch(model_id, used_ms)
    assert _order(policy) == ["d", "c", "a", "b"]


def test_lru2_counts_a_burst_once_and_remembers_those_that_went() -> None:
    """Section 2.1: Correlated Reference Period, Retained Information."""
    policy = Lru2()
    _filled(policy, "ab", 5_000)
    for after_ms in range(0, CORRELATED_MS, 100):
        policy.touch("a", 5_000 + after_ms)
    assert _order(policy) == ["a", "b"]
    policy.evict("a")
    policy.insert("a", Worth(1), 60_000)
    assert _order(policy) == ["b", "a"], "its use at 5 s is its last but one"


def test_lfu_orders_by_number_of_uses_whenever_they_were() -> None:
    policy = Lfu()
    _filled(policy, "abc")
    for _ in range(3):
        policy.touch("a", 2_000)
    policy.touch("b", 9_000)
    assert _order(policy) == ["c", "b", "a"]
    policy.evict("a")
    policy.insert("a", Worth(1), 9_500)
    assert _order(policy) == ["c", "b", "a"], "five uses in all"


def test_sieves_hand_passes_what_was_used_and_stays_where_it_is() -> None:
    """Zhang et al. 2024, figure 2: no copy moves; the next look starts where the last one ended."""
    policy = Sieve()
    _filled(policy, "abcdef")
    for model_id in "abd":
        policy.touch(model_id, 2_000)
    assert _order(policy) == ["c", "e", "f", "a", "b", "d"]
    policy.evict("c")
    policy.insert("g", Worth(1), 3_000)
    assert _order(policy) == ["e", "f", "g", "a", "b", "d"], "from d on: a and b come after the newest"
    policy.touch("e", 4_000)
    policy.evict("f")
    policy.touch("a", 5_000)
    assert _order(policy) == ["g", "b", "d", "e", "a"], "what the hand has passed counts as not used since"


def test_sieves_hand_moves_on_when_its_copy_is_removed() -> None:
    policy = Sieve()
    _filled(policy, "abc")
    policy.evict("a")
    policy.remove("b")
    assert _order(policy) == ["c"]
    policy.remove("c")
    assert _order(policy) == []


def test_s3fifo_gives_up_new_copies_first_and_moves_used_ones_on() -> None:
    """Yang et al. 2023, algorithm 1: a second use within the small queue is needed to enter the main one."""
    policy = S3Fifo()
    _filled(policy, "abc")
    for model_id in "abb":
        policy.touch(model_id, 2_000)
    assert _order(policy) == ["a", "c", "b"]


def test_s3fifo_takes_what_it_remembers_into_the_main_queue() -> None:
    policy = S3Fifo()
    _filled(policy, "abcd")
    policy.evict("a")
    policy.insert("a", Worth(1), 3_000)
    _filled(policy, "e", 4_000)
    assert _order(policy) == ["b", "c", "d", "e", "a"]


def test_s3fifo_counts_bytes_and_not_copies() -> None:
    """One model in the small queue may outweigh all in the main one, and the other way round."""
    policy = S3Fifo()
    for model_id, size_bytes in (("large", 1_000), ("small", 1)):
        policy.insert(model_id, Worth(size_bytes), 1_000)
        policy.evict(model_id)
        policy.insert(model_id, Worth(size_bytes), 2_000)  # remembered: enters the main queue
    policy.insert("new", Worth(100), 3_000)
    assert _order(policy) == ["large", "new", "small"], "100 of 1101 bytes are less than a tenth"
    policy.revalue("new", Worth(200))
    assert _order(policy) == ["new", "large", "small"]


def test_gdsf_orders_by_uses_times_cost_over_size() -> None:
    """Cherkasova 1998: Pr(f) = Clock + Fr(f) * Cost(f) / Size(f)."""
    policy = Gdsf()
    policy.insert("dear", Worth(10, reload_ms=50), 1_000)
    policy.insert("cheap", Worth(10, reload_ms=10), 1_000)
    policy.insert("large", Worth(100, reload_ms=50), 1_000)
    policy.insert("often", Worth(10, reload_ms=10), 1_000, uses=4)
    assert _order(policy) == ["large", "cheap", "often", "dear"]
    policy.touch("often", 2_000)
    policy.touch("often", 2_000)
    assert _order(policy) == ["large", "cheap", "dear", "often"]
    policy.revalue("large", Worth(100, reload_ms=5_000))
    assert _order(policy)[0] == "cheap"


def test_gdsfs_clock_never_goes_back_and_ages_what_is_not_used() -> None:
    policy, rng, clocks = Gdsf(), Random(1), [0.0]
    policy.insert("was dear", Worth(1, reload_ms=50), 1_000)
    for number in range(400):
        policy.insert(f"m{number}", Worth(rng.randint(1, 9), reload_ms=rng.uniform(1, 9)), 1_000 + number)
        if number >= 10:
            policy.evict(_order(policy)[0])
            clocks.append(policy.clock)
    assert all(before <= after for before, after in pairwise(clocks))
    assert clocks[-1] > 50
    assert "was dear" not in _order(policy)


def test_slo_density_on_an_idle_link_holds_what_cannot_be_reloaded_in_time() -> None:
    """As often used and as dear per byte, but one reload keeps the SLO and the others break it."""
    policy = SloDensity()
    policy.insert("in time", Worth(90_000, reload_ms=90), _NOW_MS)
    policy.insert("too late", Worth(101_000, reload_ms=101), _NOW_MS)
    policy.insert("long run", Worth(85_000, reload_ms=85, run_ms=50), _NOW_MS)
    assert _order(policy) == ["in time", "too late", "long run"]
    policy.revalue("too late", Worth(101_000, reload_ms=101, slo_ms=500))
    assert _order(policy) == ["too late", "in time", "long run"]


def test_slo_density_on_a_busy_link_holds_as_many_as_it_can() -> None:
    """When every load waits for longer than the SLO, every miss is late, and a large one costs the room of many."""
    for waited_ms, first in ((0, "small"), (200, "large")):
        policy = SloDensity()
        for _ in range(WAITS):
            policy.insert("small", Worth(10_000, reload_ms=10, waited_ms=waited_ms), _NOW_MS)
        policy.insert("large", Worth(150_000, reload_ms=150, waited_ms=waited_ms), _NOW_MS)
        assert _order(policy, _NOW_MS + 1_000)[0] == first


def test_slo_density_remembers_habits_longer_than_bursts() -> None:
    policy = SloDensity()
    _filled(policy, "ab", 1_000)
    for number in range(40):  # once a minute for 40 minutes
        policy.touch("a", 1_000 + number * 60_000)
    burst_ms = 1_000 + 39 * 60_000
    for number in range(20):
        policy.touch("b", burst_ms + number)
    assert _order(policy, burst_ms + 1_000) == ["a", "b"], "now the burst"
    assert _order(policy, burst_ms + 10 * FAST_MS) == ["b", "a"], "ten minutes later the habit"


def test_slo_density_knows_the_rate_of_what_comes_back() -> None:
    policy = SloDensity()
    _filled(policy, "a", 1_000)
    for number in range(100):
        policy.touch("a", 1_000 + number)
    policy.evict("a")
    _filled(policy, "ba", 30_000)
    assert _order(policy, 40_000) == ["b", "a"]
