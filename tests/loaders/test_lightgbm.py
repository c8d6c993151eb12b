"""`loaders.lightgbm`: the booster's own answers, one thread, no file that ends the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest

from loaders import recognised
from loaders.artifacts import resolve
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.lightgbm import LightgbmLoader

LOADER = LightgbmLoader()
SMALL: dict[str, Any] = {"num_leaves": 8, "min_data_in_leaf": 5, "num_threads": 1, "verbose": -1}


def trained(digits: tuple[Tensor, Tensor], rounds: int = 4, **parameters: Any) -> lightgbm.Booster:
    images, labels = digits
    objective, categories = parameters["objective"], parameters.pop("categories", [])
    data = lightgbm.Dataset(
        images,
        labels % 2 if objective == "binary" else labels,
        group=[len(labels) // 3] * 3 if objective == "lambdarank" else None,
        categorical_feature=categories,
        params={"verbose": -1},
    )
    return lightgbm.train({**SMALL, **parameters}, data, rounds)


def saved(booster: lightgbm.Booster, folder: Path, extension: str = ".txt") -> Artifact:
    path = folder / f"model{extension}"
    booster.save_model(path)
    return Artifact(path)


@pytest.fixture(scope="module")
def booster(digits: tuple[Tensor, Tensor]) -> lightgbm.Booster:
    return trained(digits, objective="multiclass", num_class=10)


@pytest.mark.parametrize("extension", [".txt", ".bst"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"objective": "regression"},
        {"objective": "binary"},
        {"objective": "multiclass", "num_class": 10},
        {"objective": "multiclassova", "num_class": 10},
        {"objective": "lambdarank"},
        {"objective": "poisson"},
        {"objective": "quantile", "alpha": 0.9},
        {"objective": "regression", "boosting": "dart"},
        {"objective": "regression", "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5},
        {"objective": "regression", "categories": [20, 21, 42]},
        {"objective": "regression", "linear_tree": True},
    ],
    ids=str,
)
def test_a_boosters_answers_are_its_own(
    tmp_path: Path, digits: tuple[Tensor, Tensor], parameters: dict[str, Any], extension: str
) -> None:
    original = trained(digits, **parameters)
    artifact = saved(original, tmp_path, extension)
    assert recognised(artifact.path) == "lightgbm"
    model = LOADER.load(artifact)
    images = digits[0].copy()
    images[::3, 18:44] = np.nan
    expected = np.asarray(original.predict(images))
    answer = model.infer({"x": images}, ["predict"])["predict"]
    np.testing.assert_array_equal(answer, expected)
    assert answer.dtype == np.float64
    assert model.signature.inputs == (TensorSpec("input-0", "FP64", (-1, 64)),)
    assert model.signature.outputs == (TensorSpec("predict", "FP64", (-1, *expected.shape[1:])),)
    assert model.signature.lenient


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name not in ("BOOL", "BYTES")])
def test_any_numeric_datatype(
    tmp_path: Path, digits: tuple[Tensor, Tensor], booster: lightgbm.Booster, datatype: str
) -> None:
    images = digits[0][:50]  # 0..16 is exact in all of them
    answer = LOADER.load(saved(booster, tmp_path)).infer({"x": images.astype(DTYPES[datatype])}, ["predict"])
    np.testing.assert_array_equal(answer["predict"], booster.predict(images))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (np.ones((1, 63)), r"rows of 64 features, got shape \[1, 63\]"),
        (np.ones(64), r"rows of 64 features, got shape \[64\]"),
        (np.full((1, 64), b"1", dtype=object), "takes numbers, got BYTES"),
    ],
)
def test_what_is_no_row_is_the_clients_fault(
    tmp_path: Path, booster: lightgbm.Booster, tensor: Tensor, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InferError, match=says) as refusal:
        LOADER.load(saved(booster, tmp_path)).infer({"x": tensor}, ["predict"])
    assert refusal.value.bad_input
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("extension", [".txt", ".bst"])
def test_a_damaged_or_missing_file_is_refused(tmp_path: Path, booster: lightgbm.Booster, extension: str) -> None:
    # LightGBM itself aborts the process on nearly every file that is cut off
    path = saved(booster, tmp_path, extension).path
    whole = path.read_bytes()
    end = whole.index(b"end of trees")
    for content in (b"", b"junk" * 100, b"\xff" * 100, *(whole[: end * i // 9] for i in range(1, 10))):
        path.write_bytes(content)
        with pytest.raises(LoaderError, match=f"model{extension} ") as refusal:
            LOADER.load(Artifact(path))
        assert "\n" not in str(refusal.value)
    path.unlink()
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.load(Artifact(path))
    assert refusal.value.retryable


@pytest.mark.parametrize("name", ["left_child", "right_child", "split_feature", "leaf_value", "threshold"])
def test_node_numbers_that_lead_nowhere_are_refused(tmp_path: Path, booster: lightgbm.Booster, name: str) -> None:
    path = saved(booster, tmp_path).path
    lines = path.read_text().replace("\r", "").split("\n")
    at = [index for index, line in enumerate(lines) if line.startswith(f"{name}=")][3]
    values = lines[at].split(" ")
    for last in ("9" * len(values[-1]), " " * len(values[-1])):
        lines[at] = " ".join([*values[:-1], last]) if name.startswith(("left", "right", "split")) else f"{name}="
        path.write_text("\n".join(lines))
        with pytest.raises(LoaderError, match=r"model.txt is no whole LightGBM model: "):
            LOADER.load(Artifact(path))


def test_files_of_other_formats_are_told_apart(tmp_path: Path, booster: lightgbm.Booster) -> None:
    none: frozenset[str] = frozenset()
    (tmp_path / "README.txt").write_text("a forest")
    mine = saved(booster, tmp_path, ".bst").path
    assert not recognised(tmp_path / "README.txt")
    assert resolve("lightgbm", str(tmp_path), allowed_code=none) == mine
    with pytest.raises(LoaderError, match=r"model.bst is no xgboost model: it seems to be lightgbm"):
        resolve("xgboost", str(mine), allowed_code=none)
    with pytest.raises(LoaderError, match=r"README.txt is no lightgbm model: it does not begin as one"):
        resolve("lightgbm", str(tmp_path / "README.txt"), allowed_code=none)


@pytest.mark.parametrize(("rounds", "leaves"), [(5, 4), (60, 20)])
def test_sizes_are_what_malloc_handed_out(
    tmp_path: Path, digits: tuple[Tensor, Tensor], rounds: int, leaves: int
) -> None:
    path = saved(trained(digits, rounds, objective="regression", num_leaves=leaves), tmp_path).path
    script = """
import sys
from pathlib import Path
from loaders.base import Artifact
from loaders.lightgbm import LightgbmLoader
from loaders.memory.process import malloc_bytes
loader, artifact = LightgbmLoader(), Artifact(Path(sys.argv[1]))
kept = [loader.load(artifact)]
before = malloc_bytes()
kept += [loader.load(artifact) for _ in range(8)]
print((malloc_bytes() - before) / 8, kept[0].size_bytes, loader.estimate_bytes(artifact))
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, timeout=60)
    taken, size, estimate = map(float, done.stdout.split())
    assert size == pytest.approx(taken, rel=0.25, abs=10_000)
    assert estimate == pytest.approx(taken, rel=0.25, abs=10_000)


def test_loads_and_requests_in_fresh_threads_start_no_openmp_team(tmp_path: Path, booster: lightgbm.Booster) -> None:
    script = """
import os, sys, threading
import numpy as np
from pathlib import Path
from loaders.base import Artifact
from loaders.lightgbm import LightgbmLoader
loader, threads = LightgbmLoader(), lambda: len(os.listdir("/proc/self/task"))
before, after = threads(), []
def run():
    model = loader.load(Artifact(Path(sys.argv[1])))
    model.infer({"x": np.zeros((9000, 64))}, ["predict"])
    after.append(threads())
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert after[0] <= before + 1, (before, after)
"""
    path = saved(booster, tmp_path).path
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)


def test_concurrent_requests_get_their_own_answers(
    tmp_path: Path,
    digits: tuple[Tensor, Tensor],
    booster: lightgbm.Booster,
    from_eight_threads: Callable[[Callable[[int], bool]], bool],
) -> None:
    model = LOADER.load(saved(booster, tmp_path))
    expected = np.asarray(booster.predict(digits[0]))
    assert from_eight_threads(
        lambda i: bool((model.infer({"x": digits[0][i : i + 9]}, ["predict"])["predict"] == expected[i : i + 9]).all())
    )
    model.unload()
