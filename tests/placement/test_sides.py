"""Who gets a canary's share. Authority: docs/ARCHITECTURE.md, A canary; KServe's canaryTrafficPercent for the words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from placement.records import VModelRecord
from placement.sides import Sides

_CANARY = VModelRecord("v", "old", "new", canary=True, canary_percent=10)
_KEYS = [f"user {number}" for number in range(5_000)]


def sides(pod_id: str = "p1", loaded: bool = True) -> Sides:
    return Sides(pod_id, lambda _: loaded)


def of(percent: int, vmodel_id: str = "v") -> VModelRecord:
    return replace(_CANARY, vmodel_id=vmodel_id, canary_percent=percent)


@pytest.mark.parametrize("percent", [0, 1, 10, 37, 50, 99])
@pytest.mark.parametrize("requests", [100, 333, 2_000])
def test_shares_are_right_within_a_few_requests(percent: int, requests: int) -> None:
    chosen = sides()
    got = sum(chosen.choose(of(percent), None) == "new" for _ in range(requests))
    assert abs(got - requests * percent / 100) <= 3


def test_a_client_that_alternates_has_the_share_of_both_kinds() -> None:
    """Strict turns would give a canary of 50 % one kind of requests only."""
    chosen = sides()
    got = Counter((n % 2, chosen.choose(of(50), None)) for n in range(1_000))
    assert all(abs(count - 250) <= 10 for count in got.values())


def test_vmodels_do_not_take_each_others_turns() -> None:
    chosen = sides()
    got = Counter((name, chosen.choose(of(20, name), None)) for _ in range(500) for name in ("v", "w", "v"))
    assert abs(got["v", "new"] - 200) <= 3
    assert abs(got["w", "new"] - 100) <= 3


def test_a_key_has_the_same_side_on_every_pod() -> None:
    chosen = [[sides(pod_id).choose(of(30), key) for key in _KEYS] for pod_id in ("p1", "p2")]
    assert chosen[0] == chosen[1]
    assert abs(chosen[0].count("new") / len(_KEYS) - 0.3) < 0.02


def test_a_share_that_grows_moves_keys_to_the_target_only() -> None:
    chosen, before = sides(), set[str]()
    for percent in (0, 1, 10, 50, 99):
        now = {key for key in _KEYS if chosen.choose(of(percent), key) == "new"}
        assert before <= now
        before = now


def test_another_canary_gets_other_keys_first() -> None:
    chosen = sides()
    first, second = (
        {key for key in _KEYS if chosen.choose(replace(of(10), target=target), key) == target}
        for target in ("new", "newer")
    )
    assert len(first & second) < len(first) / 4


@pytest.mark.parametrize("key", [None, "user 1"])
def test_a_target_that_is_not_loaded_gets_nothing(key: str | None) -> None:
    chosen = sides(loaded=False)
    assert {chosen.choose(of(99), key) for _ in range(100)} == {"old"}


def test_turns_are_forgotten_with_the_canary() -> None:
    chosen = sides()
    first = [chosen.choose(of(50), None) for _ in range(7)]
    chosen.forget(but={"v"})
    assert [chosen.choose(of(50), None) for _ in range(7)] != first
    chosen.forget(but=())
    assert [chosen.choose(of(50), None) for _ in range(7)] == first


def test_a_turn_that_was_not_used_comes_next() -> None:
    """Else requests that are looked at twice would shift the shares: here, every one for the target."""
    chosen, got = sides(), Counter[str]()
    for _ in range(1_000):
        model_id = chosen.choose(of(50), None)
        if model_id == "new":
            chosen.give_back("v", model_id)
            model_id = chosen.choose(of(50), None)
        got[model_id] += 1
    assert abs(got["new"] - 500) <= 3


def test_a_turn_of_a_target_that_went_is_the_active_models() -> None:
    chosen = sides()
    chosen.give_back("v", "new")
    assert chosen.choose(replace(of(50), target="newer"), None) == "old"


def test_requests_from_before_the_target_is_loaded_do_not_count_afterwards() -> None:
    loaded = False
    chosen = Sides("p1", lambda _: loaded)
    for _ in range(10):
        chosen.give_back("v", chosen.choose(of(90), None))
        assert chosen.choose(of(90), None) == "old"
    loaded = True
    assert [chosen.choose(of(90), None) for _ in range(10)].count("new") >= 8
