"""`loaders.sizing`: the properties its first sentence promises, and the architecture of ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from loaders.base import Artifact
from loaders.onnx_file import architecture
from loaders.sizing import MAX_FACTOR, MAX_KEYS, Sizing, keys_of

KEYS = ("architecture", "format")


def test_nothing_measured_changes_nothing() -> None:
    assert Sizing().corrected(KEYS, 1000) == 1000
    assert Sizing().corrected((), 1000) == 1000


def test_one_measurement_counts_half_and_a_second_that_agrees_all() -> None:
    sizing = Sizing()
    sizing.learn(KEYS, 1000, 1440)
    assert sizing.corrected(KEYS, 1000) == 1200  # the square root of 1.44
    sizing.learn(KEYS, 1000, 1440)
    assert sizing.corrected(KEYS, 500) == 720


@given(st.lists(st.integers(1, 10**12), max_size=3), st.floats(0.3, 3.9))
def test_outliers_do_not_matter(outliers: list[int], factor: float) -> None:
    sizing = Sizing()
    for measured in (*outliers, *[round(10**6 * factor)] * 5):
        sizing.learn(KEYS, 10**6, measured)
    assert sizing.corrected(KEYS, 10**6) == pytest.approx(10**6 * factor, rel=0.001)


@given(st.lists(st.tuples(st.integers(0, 10**15), st.integers(0, 10**15)), max_size=20), st.integers(1, 10**15))
def test_corrections_are_bounded(measured: list[tuple[int, int]], expected: int) -> None:
    sizing = Sizing()
    for pair in measured:
        sizing.learn(KEYS, *pair)
    least, most = expected / MAX_FACTOR, expected * MAX_FACTOR
    assert least - 1 <= sizing.corrected(KEYS, expected) <= most + 1


def test_what_changed_shows() -> None:
    sizing = Sizing()
    for measured in (2000,) * 8 + (500,) * 8:
        sizing.learn(KEYS, 1000, measured)
    assert sizing.corrected(KEYS, 1000) == 500


def test_an_unknown_architecture_is_taken_for_one_of_its_format() -> None:
    sizing = Sizing()
    for _ in range(2):
        sizing.learn(("a", "format"), 1000, 2000)
        sizing.learn(("b", "format"), 1000, 2000)
    assert sizing.corrected(("c", "format"), 1000) == 2000
    for _ in range(2):
        sizing.learn(("c", "format"), 1000, 500)
    assert sizing.corrected(("c", "format"), 1000) == 500


def test_the_oldest_architectures_are_forgotten() -> None:
    sizing = Sizing()
    for number in range(MAX_KEYS + 1):
        for _ in range(2):
            sizing.learn((str(number),), 100, 200)
    assert [sizing.corrected((str(number),), 100) for number in (0, 1, MAX_KEYS)] == [100, 200, 200]


def graph(path: Path, *, wide: int = 4, seed: int = 0, activation: str = "Relu") -> Path:
    weights = np.random.default_rng(seed).standard_normal((8, wide)).astype(np.float32)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(activation, ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", wide])],
        [numpy_helper.from_array(weights, "w")],
    )
    path.write_bytes(helper.make_model(made).SerializeToString())
    return path


def test_architectures_of_onnx_files(tmp_path: Path) -> None:
    own = architecture(graph(tmp_path / "a.onnx"))
    assert architecture(graph(tmp_path / "b.onnx", seed=1)) == own  # other weights
    assert architecture(graph(tmp_path / "c.onnx", wide=5)) != own
    assert architecture(graph(tmp_path / "d.onnx", activation="Tanh")) != own


def test_what_is_alike(tmp_path: Path) -> None:
    onnx = Artifact(graph(tmp_path / "a.onnx"))
    assert keys_of("onnx", onnx, 5000) == (architecture(onnx.path),)
    assert keys_of("sklearn", Artifact(Path("model.skops")), 8191) == ("sklearn .skops 13",)
    assert keys_of("synthetic", Artifact(Path("synthetic")), 5) == ()
