"""`loaders.synthetic`: the identity, at the price that was asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.base import Artifact, InferError, LoaderError
from loaders.datatypes import DTYPES
from loaders.synthetic import SyntheticLoader

LOADER = SyntheticLoader()


@pytest.mark.parametrize("datatype", DTYPES)
def test_the_input_comes_back_unchanged(datatype: str) -> None:
    model = LOADER.load(Artifact(Path("synthetic")))
    tensor = np.ones((1, 3, 64), DTYPES[datatype])
    assert model.infer({"anything": tensor}, ["OUTPUT0"])["OUTPUT0"] is tensor
    assert model.signature.lenient


def test_one_input_only() -> None:
    with pytest.raises(InferError, match="one input, got 2") as refusal:
        LOADER.load(Artifact(Path("synthetic"))).infer({"a": np.ones(1), "b": np.ones(1)}, ["OUTPUT0"])
    assert refusal.value.bad_input


def test_settings_of_the_file_and_parameters_over_them(tmp_path: Path) -> None:
    path = tmp_path / "m.synthetic.json"
    path.write_text(json.dumps({"size_bytes": 5_000, "estimate_bytes": 4_000, "load_ms": 30, "infer_ms": 20.5}))
    artifact = Artifact(path, {"size_bytes": 7_000, "storage_key": "s3"})
    assert LOADER.estimate_bytes(artifact) == 4_000
    start = time.monotonic()
    model = LOADER.load(artifact)
    model.infer({"x": np.ones(1)}, ["OUTPUT0"])
    assert model.size_bytes == 7_000
    assert time.monotonic() - start >= 0.05
    model.unload()


def test_sizes_are_at_least_one() -> None:
    artifact = Artifact(Path("synthetic"), {"size_bytes": 0})
    assert LOADER.estimate_bytes(artifact) == LOADER.load(artifact).size_bytes == 1


@pytest.mark.parametrize("retryable", [True, False])
def test_fails_as_told(retryable: bool) -> None:
    with pytest.raises(LoaderError, match=r"^disk on fire$") as failure:
        LOADER.load(Artifact(Path("synthetic"), {"fail": "disk on fire", "retryable": retryable}))
    assert failure.value.retryable == retryable


@pytest.mark.parametrize(
    "parameter", [{"size": 1}, {"size_bytes": -1}, {"load_ms": "1"}, {"load_ms": True}, {"fail": 1}, {"retryable": 1}]
)
def test_wrong_settings_are_refused_by_name(parameter: dict[str, Any]) -> None:
    with pytest.raises(LoaderError, match=f"parameter '{next(iter(parameter))}'"):
        LOADER.estimate_bytes(Artifact(Path("synthetic"), parameter))


@pytest.mark.parametrize(("text", "says"), [("", "is not JSON"), ("[1]", "is not a JSON object"), (None, "not exist")])
def test_a_file_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "m.synthetic.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoaderError, match=says):
        LOADER.load(Artifact(path))
