"""`loaders.xgboost`: the answers of the interface that wrote the file, one thread, no file that ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
from sklearn.datasets import load_diabetes, make_multilabel_classification

from loaders import recognised
from loaders.artifacts import resolve
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.xgboost import XgboostLoader

LOADER = XgboostLoader()
SMALL: dict[str, Any] = {"n_estimators": 4, "max_depth": 3, "n_jobs": 1}


def saved(model: Any, folder: Path, extension: str = ".ubj") -> Artifact:
    written = folder / f"saved{extension.replace('.bst', '.ubj')}"
    model.save_model(written)
    return Artifact(written.rename(folder / f"model{extension}"))


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> xgboost.XGBClassifier:
    return xgboost.XGBClassifier(**SMALL).fit(*digits)


@pytest.mark.parametrize("extension", [".ubj", ".json", ".bst"])
def test_a_classifiers_answers_are_classes_and_probabilities(
    tmp_path: Path, digits: tuple[Tensor, Tensor], classifier: xgboost.XGBClassifier, extension: str
) -> None:
    artifact = saved(classifier, tmp_path, extension)
    assert recognised(artifact.path) == "xgboost"
    model = LOADER.load(artifact)
    assert model.signature.inputs == (TensorSpec("input-0", "FP32", (-1, 64)),)
    assert model.signature.outputs == (
        TensorSpec("predict", "INT64", (-1,)),
        TensorSpec("predict_proba", "FP32", (-1, 10)),
    )
    assert model.signature.lenient
    assert model.signature.default_outputs == ("predict",)  # MLServer's XGBoost runtime
    answer = model.infer({"predict": digits[0]}, ["predict_proba", "predict"])
    np.testing.assert_array_equal(answer["predict"], classifier.predict(digits[0]))
    np.testing.assert_array_equal(answer["predict_proba"], classifier.predict_proba(digits[0]))
    assert [tensor.dtype for tensor in answer.values()] == [np.float32, np.int64]


def test_two_classes_and_several_labels(tmp_path: Path, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    rows, several = make_multilabel_classification(n_samples=200, n_features=6, random_state=0)
    for x, y, width in ((images, labels % 2, 2), (rows, several, several.shape[1])):
        estimator = xgboost.XGBClassifier(**SMALL).fit(x, y)
        model = LOADER.load(saved(estimator, tmp_path))
        answer = model.infer({"x": x}, ["predict", "predict_proba"])
        np.testing.assert_array_equal(answer["predict"], estimator.predict(x))
        np.testing.assert_array_equal(answer["predict_proba"], estimator.predict_proba(x))
        assert model.signature.outputs[1].shape == (-1, width)


@pytest.mark.parametrize(
    "parameters",
    [
        {"objective": "reg:squarederror"},
        {"objective": "binary:logistic"},
        {"objective": "multi:softmax", "num_class": 10},
        {"objective": "multi:softprob", "num_class": 10},
        {"objective": "rank:ndcg"},
        {"objective": "count:poisson"},
        {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.9]},
        {"booster": "dart", "rate_drop": 0.5},
        {"booster": "gblinear"},
        {"num_parallel_tree": 3, "subsample": 0.5},
    ],
    ids=str,
)
def test_a_boosters_answers_are_its_own(
    tmp_path: Path, digits: tuple[Tensor, Tensor], parameters: dict[str, Any]
) -> None:
    images, labels = digits
    y = labels % 2 if "binary" in parameters.get("objective", "") else labels
    booster = xgboost.train({**parameters, "nthread": 1}, xgboost.DMatrix(images, y), 3)
    model = LOADER.load(saved(booster, tmp_path))
    expected = booster.predict(xgboost.DMatrix(images))
    answer = model.infer({"x": images}, ["predict"])["predict"]
    np.testing.assert_allclose(answer, expected, rtol=1e-6)  # dart sums in another order in place
    assert model.signature.outputs == (TensorSpec("predict", "FP32", (-1, *expected.shape[1:])),)


def test_rounds_after_the_best_one_count_as_in_the_interface_that_wrote_them(tmp_path: Path) -> None:
    rows, targets = load_diabetes(return_X_y=True)
    held_out = [(rows[300:], targets[300:])]
    estimator = xgboost.XGBRegressor(n_estimators=40, learning_rate=0.9, early_stopping_rounds=5, n_jobs=1)
    estimator.fit(rows[:300], targets[:300], eval_set=held_out, verbose=False)
    booster = estimator.get_booster()
    assert estimator.best_iteration + 1 < booster.num_boosted_rounds()
    model = LOADER.load(saved(estimator, tmp_path))
    np.testing.assert_array_equal(model.infer({"x": rows}, ["predict"])["predict"], estimator.predict(rows))
    booster.set_attr(scikit_learn=None)
    model = LOADER.load(saved(booster, tmp_path))
    expected = booster.predict(xgboost.DMatrix(rows))  # its documentation: all rounds unless told otherwise
    np.testing.assert_array_equal(model.infer({"x": rows}, ["predict"])["predict"], expected)


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name not in ("BOOL", "BYTES")])
def test_any_numeric_datatype_with_missing_values(
    tmp_path: Path, digits: tuple[Tensor, Tensor], classifier: xgboost.XGBClassifier, datatype: str
) -> None:
    images = digits[0][:50].astype(DTYPES[datatype])  # 0..16 is exact in all of them
    if datatype.startswith(("FP", "BF")):
        images[::3, 20:40] = np.nan
    answer = LOADER.load(saved(classifier, tmp_path)).infer({"x": images}, ["predict_proba"])
    np.testing.assert_array_equal(answer["predict_proba"], classifier.predict_proba(images.astype(np.float32)))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (np.ones((1, 63)), r"rows of 64 features, got shape \[1, 63\]"),
        (np.ones(64), r"rows of 64 features, got shape \[64\]"),
        (np.ones((1, 8, 8)), "rows of 64 features"),
        (np.full((1, 64), b"1", dtype=object), "takes numbers, got BYTES"),
    ],
)
def test_what_is_no_row_is_the_clients_fault(
    tmp_path: Path, classifier: xgboost.XGBClassifier, tensor: Tensor, says: str
) -> None:
    with pytest.raises(InferError, match=says) as refusal:
        LOADER.load(saved(classifier, tmp_path)).infer({"x": tensor}, ["predict"])
    assert refusal.value.bad_input


@pytest.mark.parametrize("extension", [".ubj", ".json", ".bst"])
def test_a_damaged_or_missing_file_is_refused(
    tmp_path: Path, classifier: xgboost.XGBClassifier, extension: str
) -> None:
    path = saved(classifier, tmp_path, extension).path
    whole = path.read_bytes()
    for content in (b"", b"junk" * 100, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(LoaderError, match=f"model{extension} ") as refusal:
            LOADER.load(Artifact(path))
        assert "\n" not in str(refusal.value)
    path.unlink()
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.load(Artifact(path))
    assert refusal.value.retryable


def test_node_numbers_that_lead_nowhere_are_refused(
    tmp_path: Path, classifier: xgboost.XGBClassifier, digits: tuple[Tensor, Tensor]
) -> None:
    # XGBoost follows them: each of these ends the process while it loads or predicts, or never ends
    path = saved(classifier, tmp_path, ".json").path
    whole = path.read_text()
    assert LOADER.load(Artifact(path))
    for name, wrong in (("left_children", 0), ("right_children", 99), ("split_indices", 1 << 20), ("parents", 77)):
        model = json.loads(whole)
        model["learner"]["gradient_booster"]["model"]["trees"][3][name][1] = wrong
        path.write_text(json.dumps(model))
        with pytest.raises(LoaderError, match=r"model.json is no whole XGBoost model: its \w+ cannot be right"):
            LOADER.load(Artifact(path))


def test_files_of_other_formats_are_told_apart(tmp_path: Path, classifier: xgboost.XGBClassifier) -> None:
    none: frozenset[str] = frozenset()
    settings, mine = tmp_path / "model-settings.json", saved(classifier, tmp_path, ".bst").path
    settings.write_text('{"name": "m"}')
    assert not recognised(settings)
    assert resolve("xgboost", str(tmp_path), allowed_code=none) == mine
    with pytest.raises(LoaderError, match=r"model.bst is no lightgbm model: it seems to be xgboost"):
        resolve("lightgbm", str(mine), allowed_code=none)
    with pytest.raises(LoaderError, match=r"model-settings.json is no xgboost model: it does not begin as one"):
        resolve("xgboost", str(settings), allowed_code=none)


@pytest.mark.parametrize("extension", [".ubj", ".json"])
@pytest.mark.parametrize(("trees", "depth"), [(5, 2), (40, 4)])
def test_sizes_are_what_malloc_handed_out(
    tmp_path: Path, digits: tuple[Tensor, Tensor], extension: str, trees: int, depth: int
) -> None:
    estimator = xgboost.XGBRegressor(n_estimators=trees, max_depth=depth, n_jobs=1).fit(*digits)
    path = saved(estimator, tmp_path, extension).path
    script = """
import sys
from pathlib import Path
from loaders.base import Artifact
from loaders.memory.process import malloc_bytes
from loaders.xgboost import XgboostLoader
loader, artifact = XgboostLoader(), Artifact(Path(sys.argv[1]))
kept = [loader.load(artifact)]
before = malloc_bytes()
kept += [loader.load(artifact) for _ in range(8)]
print((malloc_bytes() - before) / 8, kept[0].size_bytes, loader.estimate_bytes(artifact))
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, timeout=60)
    taken, size, estimate = map(float, done.stdout.split())
    assert size == pytest.approx(taken, rel=0.25, abs=10_000)
    assert estimate == pytest.approx(taken, rel=0.25, abs=10_000)


def test_loads_and_requests_in_fresh_threads_start_no_openmp_team(
    tmp_path: Path, classifier: xgboost.XGBClassifier
) -> None:
    script = """
import os, sys, threading
import numpy as np
from pathlib import Path
from loaders.base import Artifact
from loaders.xgboost import XgboostLoader
loader, threads = XgboostLoader(), lambda: len(os.listdir("/proc/self/task"))
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
    path = saved(classifier, tmp_path).path
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)


def test_concurrent_requests_get_their_own_answers(
    tmp_path: Path,
    digits: tuple[Tensor, Tensor],
    classifier: xgboost.XGBClassifier,
    from_eight_threads: Callable[[Callable[[int], bool]], bool],
) -> None:
    images, labels = digits
    linear = xgboost.train({"booster": "gblinear", "nthread": 1}, xgboost.DMatrix(images, labels), 2)
    expected = classifier.predict_proba(images), linear.predict(xgboost.DMatrix(images))
    for estimator, output, right in ((classifier, "predict_proba", expected[0]), (linear, "predict", expected[1])):
        model = LOADER.load(saved(estimator, tmp_path))
        assert from_eight_threads(
            lambda i: bool((model.infer({"x": images[i : i + 9]}, [output])[output] == right[i : i + 9]).all())  # noqa: B023
        )
        model.unload()


def test_declarations_name_the_one_input_and_known_outputs(tmp_path: Path, classifier: xgboost.XGBClassifier) -> None:
    path = saved(classifier, tmp_path).path
    hint = (TensorSpec("images", "FP64", (-1, 64)),)
    signature = LOADER.load(
        Artifact(path, inputs=hint, outputs=(TensorSpec("predict_proba", "FP32", (-1, 10)),))
    ).signature
    assert signature.inputs == hint
    assert [spec.name for spec in signature.outputs] == ["predict_proba"]
    with pytest.raises(LoaderError, match=r"declared outputs score FP64 \[-1\], the model has predict INT64"):
        LOADER.load(Artifact(path, outputs=(TensorSpec("score", "FP64", (-1,)),)))
    with pytest.raises(LoaderError, match="unknown parameter 'rounds': xgboost models take none"):
        LOADER.load(Artifact(path, {"rounds": 3}))
