"""Expected and measured bytes on a pod: what is learned, what the books get, and the metric."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client import generate_latest

from loaders.base import Artifact
from loaders.memory import arenas
from loaders.storage.source import Storage
from mesh.metrics import Metrics
from mesh.models import Models
from mesh.sizes import Sizes
from placement.engine import Engine
from placement.limits import Limits
from placement.policies import POLICIES
from placement.records import ModelRecord
from placement.view import ClusterView

ARTIFACT = Artifact(Path("model.skops"))


def test_what_was_measured_corrects_the_next_estimate() -> None:
    sizes = Sizes()
    for model_id in "ab":
        sizes.expect(model_id, "sklearn", ARTIFACT, 1000)
        assert sizes.settle(model_id, "sklearn", 2000) == 2000
    assert sizes.expect("c", "sklearn", ARTIFACT, 1000) == 2000
    assert sizes.settle("c", "sklearn", 1000) == 2000  # the loader tells its own estimate: it could not measure
    assert sizes.expect("d", "lightgbm", ARTIFACT, 1000) == 1000
    assert sizes.settle("unheard of", "sklearn", 7) == 7


def test_a_form_that_was_prepared_meanwhile_teaches_nothing() -> None:
    sizes = Sizes()
    for model_id in "ab":
        sizes.expect(model_id, "sklearn", ARTIFACT, 1000)
        assert sizes.settle(model_id, "converted", 100) == 100
    assert sizes.expect("c", "sklearn", ARTIFACT, 1000) == 1000
    assert sizes.errors == {}


def write_deep(path: Path, seed: int) -> None:
    """Three hundred small layers."""
    rng = np.random.default_rng(seed)
    weights = {f"w{i}": rng.standard_normal((24, 24)).astype(np.float32) for i in range(300)}
    nodes, name = [], "x"
    for i in range(300):
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [name := f"t{i}"]))
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 24])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 24])],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


@pytest.mark.skipif(arenas.in_use() is None, reason="the C library is not glibc")
def test_models_of_one_architecture(tmp_path: Path) -> None:
    """Measured by the loading thread's arena, though they are below what the sum of all arenas could tell."""
    models = Models(Storage(tmp_path / "cache", None, None, tmp_path), frozenset())
    residents = []
    for seed in range(4):  # of the first, the framework's own bytes are not known
        write_deep(path := tmp_path / f"{seed}.onnx", seed)
        record = ModelRecord(str(seed), "onnx", str(path), "", 0)
        expected_bytes = models.estimate_bytes(record)
        residents.append(models.load(record))
        measured_bytes = residents[-1].size_bytes
    assert 2e6 < measured_bytes < 5e6
    assert expected_bytes == pytest.approx(measured_bytes, rel=0.05)
    for resident in residents:
        resident.unload()
    limits = Limits(capacity_bytes=1, load_slots=1)
    engine = Engine("a", "localhost:1", limits, ClusterView(), POLICIES["lru"], Random(0))
    told = generate_latest(Metrics(engine, sizes=models.sizes).registry).decode()
    found = re.search(r'densemesh_size_error_count{format="onnx"} (\d)', told)
    assert found is not None
    assert int(found[1]) >= 3
