"""Tenants: shares, guarantees, limits, turns (the invariants in `placement.tenants`)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.records import CopyRecord, CopyStatus, ModelRecord, PodRecord, TenantRecord, copy_key, model_key
from placement.tenants import Tenants, choose
from placement.view import ClusterView

_SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=300)


@dataclass(frozen=True, eq=False)
class Held:
    tenant: str
    size_bytes: int


def _tenants(*records: TenantRecord, capacity_bytes: int = 100, others_bytes: int = 0) -> Tenants:
    view = ClusterView()
    for record in records:
        view.apply(record)
    view.apply(PodRecord("here", "", capacity_bytes))
    if others_bytes:
        view.apply(PodRecord("there", "", others_bytes))
    tenants = Tenants("here", capacity_bytes, view)
    tenants.refresh()
    return tenants


def _choose(tenants: Tenants, copies: list[Held], need_bytes: int, asking: str, own_bytes: int = 0) -> str | None:
    """The tenants that give, in order."""
    used: dict[str, int] = {}
    for copy in copies:
        used[copy.tenant] = used.get(copy.tenant, 0) + copy.size_bytes
    chosen = choose(copies, need_bytes, own_bytes, asking, used, tenants.shares(used, asking))
    return None if chosen is None else "".join(copy.tenant for copy in chosen)


def test_tenants_above_their_share_give_first() -> None:
    """Although the coldest copy is another's."""
    copies = [Held("a", 10), *(Held("b", 10) for _ in range(9))]
    assert _choose(_tenants(), copies, 10, "a") == "b"
    assert _choose(_tenants(), copies, 20, "c") == "bb"


def test_whoever_is_above_its_share_gives_itself() -> None:
    copies = [Held("a", 10), *(Held("b", 10) for _ in range(9))]
    assert _choose(_tenants(), copies, 10, "b") == "b"


def test_weights_make_shares() -> None:
    copies = [Held("a", 10) for _ in range(5)] + [Held("b", 10) for _ in range(5)]
    assert _choose(_tenants(TenantRecord("a", weight=1), TenantRecord("b", weight=4)), copies, 10, "b") == "a"
    assert _choose(_tenants(TenantRecord("a", weight=4), TenantRecord("b", weight=1)), copies, 10, "a") == "b"


def test_within_shares_the_coldest_gives() -> None:
    copies = [Held("a", 10), Held("b", 10)] * 2 + [Held("c", 60)]
    tenants = _tenants(TenantRecord("c", weight=8))
    assert _choose(tenants, copies, 10, "a") in ("a", "b")


def test_guarantees_hold() -> None:
    """One tenant's storm cannot evict another's guaranteed working set."""
    tenants = _tenants(TenantRecord("a", guaranteed_bytes=40), TenantRecord("b", weight=1000))
    copies = [Held("a", 20)] * 3 + [Held("b", 20)] * 2
    assert _choose(tenants, copies, 20, "b") == "a"  # one is above the guarantee
    assert _choose(tenants, copies, 60, "b") == "abb"
    assert _choose(tenants, copies, 80, "b") is None


def test_a_guarantee_is_held_pod_by_pod() -> None:
    """In proportion to capacity; copies are whole."""
    tenants = _tenants(TenantRecord("a", guaranteed_bytes=40), capacity_bytes=100, others_bytes=300)
    assert tenants.floor_bytes("a") == 10
    assert _choose(tenants, [Held("a", 8), Held("a", 8), Held("b", 84)], 8, "b") == "b"
    assert _choose(tenants, [Held("a", 30), Held("b", 10)], 20, "b") is None


def test_a_limit_takes_the_tenants_own_room() -> None:
    copies = [Held("b", 10), Held("a", 10), Held("a", 10)]
    tenants = _tenants(TenantRecord("a", max_bytes=20))
    assert tenants.above_limit_bytes("a", 20, 10) == 10
    assert tenants.above_limit_bytes("b", 20, 10) == 0
    assert _choose(tenants, copies, 0, "a", own_bytes=10) == "a"
    assert _choose(tenants, copies, 0, "a", own_bytes=30) is None


@_SETTINGS
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=12),
    st.integers(-20, 60),
    st.integers(0, 20),
    st.sampled_from("abcd"),
    st.tuples(*[st.integers(0, 50)] * 3),
    st.tuples(*[st.integers(1, 5)] * 3),
)
def test_invariants(
    held: list[tuple[str, int]],
    need_bytes: int,
    own_bytes: int,
    asking: str,
    guarantees: tuple[int, ...],
    weights: tuple[int, ...],
) -> None:
    records = [
        TenantRecord(t, guaranteed_bytes=g, weight=w) for t, g, w in zip("abc", guarantees, weights, strict=True)
    ]
    tenants = _tenants(*records)
    copies = [Held(tenant, size_bytes) for tenant, size_bytes in held]
    used = {t: sum(copy.size_bytes for copy in copies if copy.tenant == t) for t in "abc"}
    chosen = choose(copies, need_bytes, own_bytes, asking, used, tenants.shares(used, asking))
    if chosen is None:
        return
    assert [copy for copy in copies if copy in chosen] == chosen  # each once, coldest first
    assert sum(copy.size_bytes for copy in chosen) >= need_bytes
    assert sum(copy.size_bytes for copy in chosen if copy.tenant == asking) >= own_bytes
    for tenant in set(used) - {asking}:
        given = sum(copy.size_bytes for copy in chosen if copy.tenant == tenant)
        assert not given or used[tenant] - given >= tenants.floor_bytes(tenant)


def test_turns() -> None:
    """Start-time fair queueing: work is shared by weight, and whoever was away has saved up nothing."""
    tenants = _tenants(TenantRecord("b", weight=2))
    started = {"a": 0, "b": 0}
    for _ in range(300):
        tenant = min(started, key=tenants.turn)
        tenants.started(tenant, 5.0)
        started[tenant] += 1
    assert started == {"a": pytest.approx(100, abs=1), "b": pytest.approx(200, abs=1)}
    order = ""
    for _ in range(4):  # c comes late
        tenant = min("ac", key=tenants.turn)
        tenants.started(tenant, 5.0)
        order += tenant
    assert order.count("c") == 2


def test_loads_under_way() -> None:
    tenants = _tenants(TenantRecord("a", max_loads=2))
    assert tenants.may_start("a", 1)
    assert not tenants.may_start("a", 2)
    assert tenants.may_start("b", 99)


def test_the_view_counts_tenants() -> None:
    """Whatever the order in which records come and go."""
    view = ClusterView()
    view.apply(CopyRecord("m", "p", CopyStatus.LOADED, size_bytes=5))
    view.apply(ModelRecord("m", "", "", tenant="a"))
    view.apply(CopyRecord("m", "q", CopyStatus.LOADED, size_bytes=7))
    view.apply(ModelRecord("n", "", "", tenant="a"))
    assert view.tenant_models("a") == 2
    assert view.tenant_bytes("a", without="p") == 7
    assert view.tenant_bytes("a", without="x") == 12
    view.apply(CopyRecord("m", "q", CopyStatus.FAILED))
    assert view.tenant_bytes("a", without="x") == 5
    view.apply(ModelRecord("m", "", "", tenant="b", revision=1))
    assert (view.tenant_bytes("a", without=""), view.tenant_bytes("b", without="")) == (0, 5)
    view.remove(copy_key("p", "m"))
    assert view.tenant_bytes("b", without="") == 0
    view.remove(model_key("m"))
    assert (view.tenant_models("a"), view.tenant_models("b")) == (1, 0)
    view.replace([ModelRecord("m", "", "", tenant="c"), CopyRecord("m", "p", CopyStatus.LOADED, size_bytes=3)])
    assert (view.tenant_bytes("c", without=""), view.tenant_models("a")) == (3, 0)
