"""`loaders.onnx_file`: weights told from the file agree with what sessions take, and any other file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sklearn.ensemble import RandomForestClassifier

from loaders.base import LoaderError, Tensor
from loaders.onnx_file import weigh


def test_dense_weights_count_once_and_half_precision_twice(save_mlp: Callable[..., Path]) -> None:
    # onnx.proto, TensorProto: raw_data is the weights' own size
    full = weigh(save_mlp(256, 512, 64, name="full"))
    half = save_mlp(256, 512, 64, name="half", dtype=np.float16)
    weights = 4 * (256 * 512 + 512 * 64)
    assert full == pytest.approx(weights, abs=110_000)
    assert weigh(half) == pytest.approx(full, rel=0.01)
    assert weigh(half, widened=False) == pytest.approx(full - weights / 2, rel=0.01)


def test_external_data_counts_like_internal(save_mlp: Callable[..., Path]) -> None:
    # onnx.proto, TensorProto.external_data
    inside = weigh(save_mlp(256, 512, 64, name="inside"))
    outside = save_mlp(256, 512, 64, name="outside", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert outside.stat().st_size < 2_000
    assert weigh(outside) == pytest.approx(inside, rel=0.01)
    (outside.parent / "w.bin").unlink()
    with pytest.raises(LoaderError, match=r"w\.bin does not exist") as refusal:
        weigh(outside)
    assert refusal.value.retryable


def test_nodes_and_trees_weigh_more_than_their_text(
    save_onnx: Callable[..., Path], tmp_path: Path, digits: tuple[Tensor, Tensor]
) -> None:
    nodes = [helper.make_node("Abs", [f"t{i}" if i else "x"], [f"t{i + 1}" if i < 99 else "y"]) for i in range(100)]
    infos = [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])]
    assert weigh(save_onnx(nodes, *infos)) == pytest.approx(385_000, rel=0.02)

    from skl2onnx import to_onnx

    images, labels = digits
    forest = RandomForestClassifier(10, random_state=0).fit(images, labels)
    path = tmp_path / "forest.onnx"
    path.write_bytes(to_onnx(forest, images[:1].astype(np.float32), options={"zipmap": False}).SerializeToString())
    assert weigh(path) > 4 * path.stat().st_size


def test_every_truncation_is_refused(save_mlp: Callable[..., Path], tmp_path: Path) -> None:
    whole = save_mlp(8, 8, 2).read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(whole) - 16, 7):  # opset_import is the last field: without it the graph is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(LoaderError, match=r"cut\.onnx is not an ONNX model"):
            weigh(path)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_size_or_a_reason(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    try:
        assert weigh(path) >= 1
    except LoaderError as error:
        assert "any.onnx is not an ONNX model" in str(error)  # noqa: PT017 - either outcome is right
