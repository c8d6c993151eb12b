"""`loaders.memory.dedup`: identical tensors are one part, whatever order models come and go in."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loaders.memory.dedup import Catalogue, Part, Unit, units_of
from loaders.memory.layout import LARGE_BYTES
from tests.loaders.weights_made import KIB, made, tensor


def _ignored(part: Part, pieces: Sequence[Part]) -> None:
    assert [unit for piece in pieces for unit in piece.units] == list(part.units)


def test_units_are_large_tensors_and_runs_of_small_ones() -> None:
    sizes = [100, 300, LARGE_BYTES, LARGE_BYTES + 5, 7, 0, 9]
    contents = made([tensor(n, size) for n, size in enumerate(sizes)]).contents
    units = list(units_of(contents))
    assert len(units) == 4
    assert sum(unit.size_bytes for unit in units) == contents.layout.size_bytes
    assert all(unit.size_bytes % 512 == 0 for unit in units)
    again = list(units_of(made([tensor(n, size) for n, size in enumerate(sizes)]).contents))
    assert units == again


def test_a_model_that_shares_nothing_is_one_part() -> None:
    catalogue = Catalogue(_ignored)
    known = catalogue.add("a", made([tensor(n) for n in range(20)]).contents)
    assert len(known.parts) == 1


def test_fine_tunes_share_their_backbone() -> None:
    catalogue = Catalogue(_ignored)
    backbone = [tensor(n) for n in range(6)]
    fleet = [catalogue.add(n, made([*backbone, tensor(100 + n), tensor(200 + n)]).contents) for n in range(5)]
    assert {tuple(len(part.units) for part in known.parts) for known in fleet} == {(6, 2)}
    assert len({known.parts[0] for known in fleet}) == 1
    assert len({known.parts[1] for known in fleet}) == 5


def test_a_changed_layer_in_the_middle_leaves_two_shared_parts() -> None:
    catalogue = Catalogue(_ignored)
    layers = [tensor(n) for n in range(7)]
    first = catalogue.add("a", made(layers).contents)
    second = catalogue.add("b", made([*layers[:3], tensor(99), *layers[4:]]).contents)
    assert [len(part.units) for part in first.parts] == [3, 1, 3]
    assert [part in first.parts for part in second.parts] == [True, False, True]


def test_the_same_model_twice_is_shared_even_if_it_is_small() -> None:
    catalogue = Catalogue(_ignored)
    small = made([tensor(1, 100), tensor(2, 50)]).contents
    assert catalogue.add("a", small).parts == catalogue.add("b", small).parts


def test_a_small_run_is_not_worth_a_cut() -> None:
    catalogue = Catalogue(_ignored)
    catalogue.add("a", made([tensor(1), tensor(2, KIB), tensor(3)]).contents)
    known = catalogue.add("b", made([tensor(4), tensor(2, KIB), tensor(5)]).contents)
    assert len(known.parts) == 1


def test_equal_tensors_of_one_model_are_stored_for_each_place() -> None:
    """A part stands for one place of a model, or models of one architecture would differ in where things lie."""
    catalogue = Catalogue(_ignored)
    zeros = made([tensor(1), tensor(0), tensor(0), tensor(2)]).contents
    known = catalogue.add("a", zeros)
    assert [len(part.units) for part in known.parts] == [4]
    assert catalogue.add("b", zeros).parts == known.parts


def test_what_a_transfer_reads_or_writes_is_not_cut() -> None:
    catalogue = Catalogue(_ignored)
    layers = [tensor(n) for n in range(4)]
    first = catalogue.add("a", made(layers).contents)
    first.parts[0].transfers += 1
    alone = catalogue.add("b", made([*layers[:2], tensor(9)]).contents)
    assert len(first.parts) == len(alone.parts) == 1
    assert catalogue.add("c", made(layers).contents).parts == first.parts  # as it is, it can be shared


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1, max_size=8), st.booleans()), max_size=25
    )
)
def test_parts_are_the_models_bytes_each_once(drawn: list[tuple[int, list[int], bool]]) -> None:
    """Against a naive model: what each model consists of, unit by unit."""
    catalogue = Catalogue(_ignored)
    pool = [tensor(n, size) for n, size in enumerate((64 * KIB, 64 * KIB, 100 * KIB, 200, 300, 64 * KIB))]
    truth: dict[int, list[Unit]] = {}
    for key, which, stays in drawn:
        if key in truth:
            catalogue.remove(key)
            del truth[key]
        if stays:
            contents = made([pool[n] for n in which]).contents
            catalogue.add(key, contents)
            truth[key] = list(units_of(contents))
        for other, units in truth.items():
            known = catalogue.models[other]
            assert [unit for part in known.parts for unit in part.units] == units
            assert len(set(known.parts)) == len(known.parts)
            assert all(part.models[other] is known for part in known.parts)
    for key in truth:
        catalogue.remove(key)
    assert not catalogue._where
