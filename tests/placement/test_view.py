"""The cluster as a pod sees it: newer registrations win in any order, a snapshot leaves nothing of the old view."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.records import (
    CopyRecord,
    CopyStatus,
    ModelRecord,
    PodRecord,
    Record,
    VModelRecord,
    copy_key,
    key_of,
    model_key,
    pod_key,
    vmodel_key,
)
from placement.view import ClusterView, same_contents
from tests.placement.pods import held, model_record, peer

_FIRST = ModelRecord("m", "onnx", "/1", revision=3, created=3)
_TOUCHED = replace(_FIRST, refs=1, revision=5)
_SECOND = ModelRecord("m", "onnx", "/2", revision=9, created=9)


def _records(view: ClusterView) -> object:
    copies = {model_id: dict(view.copies(model_id)) for model_id in "mn"}
    return view.models, view.vmodels, view.pods, view.in_transition, copies


def test_a_model_means_something_else_only_after_a_change_of_contents() -> None:
    view = ClusterView()
    assert view.apply(_FIRST) is None
    assert view.apply(_FIRST) is None
    assert view.apply(_TOUCHED) is None
    assert view.apply(_SECOND) == "m"
    assert view.remove("models/m") == "m"
    assert view.remove("models/m") is None


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"path": "/2"}, False),
        ({"format": "torch"}, False),
        ({"key": "{}"}, False),
        ({"created": 4}, False),
        ({"last_used_ms": 7, "refs": 2, "auto_delete": True, "revision": 8}, True),
    ],
)
def test_contents(change: dict[str, object], same: bool) -> None:
    assert same_contents(_FIRST, replace(_FIRST, **change)) is same  # type: ignore[arg-type]


@pytest.mark.parametrize("order", list(permutations([_FIRST, _TOUCHED, _SECOND])))
def test_the_newer_registration_wins_in_any_order(order: tuple[ModelRecord, ...]) -> None:
    """One record may be read ahead of the watch, and a resumed watch repeats itself."""
    view = ClusterView()
    for record in (*order, *order):
        view.apply(record)
    assert view.models["m"].revision == 9


def test_a_watch_that_is_behind_does_not_remove_what_was_read_ahead() -> None:
    view = ClusterView()
    view.apply(_SECOND)
    view.apply(_FIRST)
    assert view.remove("models/m", 7) is None
    assert view.models["m"] is _SECOND
    assert view.remove("models/m", 12) == "m"


def test_the_newer_vmodel_wins_and_an_older_removal_does_not_count() -> None:
    view = ClusterView()
    new, old = VModelRecord("v", "b", "b", revision=5), VModelRecord("v", "a", "b", revision=2)
    view.apply(new)
    view.apply(old)
    assert view.vmodels["v"] is new
    assert not view.in_transition
    view.remove("vmodels/v", 3)
    assert view.vmodels
    view.remove("vmodels/v", 6)
    assert not view.vmodels


def test_in_transition_follows_the_vmodels() -> None:
    view = ClusterView()
    view.apply(VModelRecord("v", "a", "b"))
    view.apply(VModelRecord("w", "a", "b"))
    assert view.in_transition == {"v", "w"}
    view.apply(VModelRecord("v", "b", "b"))
    view.remove("vmodels/w")
    assert not view.in_transition


@pytest.mark.parametrize("key", ["models/x", "vmodels/x", "pods/x", "copies/x/y", "copies/x", "things/x", "", "models"])
def test_removing_what_is_not_known_is_fine(key: str) -> None:
    view = ClusterView()
    view.apply(_FIRST)
    assert view.remove(key) is view.remove(key, 100) is None
    assert view.models


def test_copies_of_a_model_with_slashes() -> None:
    view = ClusterView()
    view.apply(held("p", "team/m"))
    view.apply(held("q", "team/m"))
    view.remove(copy_key("p", "team/m"))
    assert list(view.copies("team/m")) == ["q"]
    view.remove(copy_key("q", "team/m"))
    assert not view.copies("team/m")


def test_sizes_are_the_last_measured_else_the_mean() -> None:
    view = ClusterView()
    assert (view.size_bytes("m"), view.measured("m")) == (0, None)
    for model_id in "mno":
        view.apply(model_record(model_id))
    view.apply(held("p", "m", size_bytes=10, registration=1))
    view.apply(held("p", "n", size_bytes=20, registration=1))
    assert (view.size_bytes("m"), view.measured("m"), view.size_bytes("o"), view.measured("o")) == (10, 10, 15, None)
    view.apply(held("q", "m", size_bytes=40, registration=1))
    view.remove(copy_key("p", "m"))
    view.remove(copy_key("q", "m"))
    assert (view.size_bytes("m"), view.size_bytes("o")) == (40, 30), "known beyond the copies"
    view.remove(model_key("m"))
    assert view.size_bytes("o") == 20


def test_only_what_is_loaded_is_measured() -> None:
    view = ClusterView()
    view.apply(model_record("m"))
    for status in (CopyStatus.LOADING, CopyStatus.FAILED):
        view.apply(held("p", "m", status, size_bytes=10, registration=1))
    assert view.measured("m") is None


def test_a_size_says_nothing_of_another_registration() -> None:
    """A pod that lags tells of its old copy after the model was registered anew: its size must not be promised."""
    view = ClusterView()
    view.apply(_SECOND)
    view.apply(held("p", "m", size_bytes=10, registration=_FIRST.created))
    assert view.measured("m") is None
    view.apply(held("q", "m", size_bytes=70, registration=_SECOND.created))
    view.apply(held("p", "m", size_bytes=10, registration=_FIRST.created))
    assert view.measured("m") == 70


def test_sizes_do_not_pile_up_for_models_that_are_gone() -> None:
    view = ClusterView()
    view.apply(held("p", "m", size_bytes=10))
    view.remove(copy_key("p", "m"))
    assert view.size_bytes("other") == 0
    view.apply(held("p", "m", size_bytes=10))
    view.replace([])
    assert view.size_bytes("other") == 0


def test_a_snapshot_tells_which_models_are_gone_or_mean_something_else() -> None:
    view = ClusterView()
    for record in (_FIRST, model_record("gone"), model_record("same"), VModelRecord("v", "a", "b"), peer("p")):
        view.apply(record)
    assert view.replace([_SECOND, model_record("same"), model_record("new")]) == ["m", "gone"]
    assert set(view.models) == {"m", "same", "new"}
    assert not view.vmodels
    assert not view.pods
    assert not view.in_transition


def test_a_registry_that_starts_anew_with_lower_numbers() -> None:
    """After a wipe or a restored backup: what was measured under the old numbers does not block what is told now."""
    view = ClusterView()
    view.apply(_SECOND)
    view.apply(held("p", "m", size_bytes=10, registration=9))
    assert view.replace([_FIRST]) == ["m"]
    assert view.models["m"] is _FIRST
    view.apply(held("p", "m", size_bytes=20, registration=3))
    assert view.measured("m") == 20


_RECORDS: list[Record] = [
    _FIRST,
    _SECOND,
    model_record("n"),
    VModelRecord("v", "m", "n", revision=1),
    VModelRecord("v", "n", "n", revision=2),
    peer("p"),
    PodRecord("q", "h:1", 5),
    held("p", "m", size_bytes=3, registration=3),
    held("q", "m", size_bytes=4, registration=9),
    held("q", "m", CopyStatus.FAILED),
    CopyRecord("n", "p", CopyStatus.LOADED, size_bytes=9, registration=1),
]
_SNAPSHOTS = st.lists(st.sampled_from(_RECORDS), unique_by=key_of).filter(
    lambda records: _SECOND in records or not any(isinstance(r, CopyRecord) and r.registration == 9 for r in records)
)  # no registry holds a copy of a registration that is still to come


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.lists(st.sampled_from(_RECORDS)), _SNAPSHOTS, st.randoms(use_true_random=False))
def test_a_snapshot_equals_a_fresh_view(history: list[Record], snapshot: list[Record], rng: Random) -> None:
    """Whatever was there before and in any order; only sizes of models that stay are remembered on top."""
    view, fresh = ClusterView(), ClusterView()
    for record in history:
        view.apply(record)
    view.replace(snapshot)
    fresh.replace(rng.sample(snapshot, len(snapshot)))
    assert _records(view) == _records(fresh)
    for model_id in view.models:
        assert fresh.measured(model_id) in (told := _told(snapshot, view.models[model_id]) or {None})
        assert view.measured(model_id) in told | (_told(history, view.models[model_id]) if None in told else set())


def _told(records: list[Record], model: ModelRecord) -> set[int | None]:
    """The sizes that these records tell of this registration."""
    copies = [r for r in records if isinstance(r, CopyRecord) and r.status is CopyStatus.LOADED]
    return {r.size_bytes for r in copies if (r.model_id, r.registration) == (model.model_id, model.created)}


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.lists(st.sampled_from(_RECORDS)))
def test_removing_everything_leaves_nothing(history: list[Record]) -> None:
    view = ClusterView()
    for record in history:
        view.apply(record)
    for record in history:
        view.remove(key_of(record))
    assert _records(view) == _records(ClusterView())
    assert view.size_bytes("unknown") == 0


def test_keys() -> None:
    assert (model_key("a"), vmodel_key("a"), pod_key("a")) == ("models/a", "vmodels/a", "pods/a")


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_what_was_unloaded_where_is_remembered_until_it_is_loaded_or_removed(by_snapshot: bool) -> None:
    """The leader reloads what went with its pod, and leaves alone what a pod gave up."""
    view = ClusterView()
    records: list[Record] = [model_record("m"), peer("p1"), peer("p2")]
    for record in (*records, held("p1", "m", used_ms=5), held("p2", "m", used_ms=7)):
        view.apply(record)
    assert view.unloaded("m") is None
    if by_snapshot:
        view.replace([records[0], records[1]])
        assert view.unloaded("m") == ("p2", 7), "of two, the one whose pod is gone too"
    else:
        view.remove("copies/p1/m")
        assert view.unloaded("m") is None
        view.remove("copies/p2/m")
        assert view.unloaded("m") == ("p2", 7)
    view.apply(held("p1", "m"))
    assert view.unloaded("m") is None
    view.remove("copies/p1/m")
    view.replace([]) if by_snapshot else view.remove("models/m")
    assert view.unloaded("m") is None
