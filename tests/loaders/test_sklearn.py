"""`loaders.sklearn`: the estimator's own answers, no code from skops files, one thread."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.cluster import KMeans
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.sklearn import SklearnLoader

LOADER = SklearnLoader()
SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    ".skops": skops.io.dump,
    ".joblib": joblib.dump,
    ".pkl": lambda model, path: path.write_bytes(pickle.dumps(model)),
}


def saved(model: Any, folder: Path, extension: str = ".skops") -> Artifact:
    path = folder / f"model{extension}"
    SAVERS[extension](model, path)
    return Artifact(path)


@pytest.mark.parametrize("extension", SAVERS)
def test_answers_are_the_estimators_own(
    tmp_path: Path, digits: tuple[Tensor, Tensor], digits_model: LogisticRegression, extension: str
) -> None:
    model = LOADER.load(saved(digits_model, tmp_path, extension))
    assert model.signature.inputs == (TensorSpec("input-0", "FP64", (-1, 64)),)
    assert model.signature.outputs == (
        TensorSpec("predict", "INT64", (-1,)),
        TensorSpec("predict_proba", "FP64", (-1, 10)),
    )
    assert model.signature.lenient
    assert model.signature.default_outputs == ("predict",)  # MLServer's and KServe's scikit-learn servers
    answer = model.infer({"predict": digits[0]}, ["predict_proba", "predict"])
    np.testing.assert_array_equal(answer["predict"], digits_model.predict(digits[0]))
    np.testing.assert_array_equal(answer["predict_proba"], digits_model.predict_proba(digits[0]))
    assert [tensor.dtype for tensor in answer.values()] == [np.float64, np.int64]


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name not in ("BOOL", "INT8")])
def test_any_numeric_datatype_and_strings_of_numbers(
    tmp_path: Path, digits: tuple[Tensor, Tensor], digits_model: LogisticRegression, datatype: str
) -> None:
    images = digits[0][:20]
    to_bytes = np.array([[str(value).encode() for value in row] for row in images], dtype=object)
    given = to_bytes if datatype == "BYTES" else images.astype(DTYPES[datatype])  # 0..16 is exact in all of them
    answer = LOADER.load(saved(digits_model, tmp_path)).infer({"x": given}, ["predict"])
    np.testing.assert_array_equal(answer["predict"], digits_model.predict(images))


ESTIMATORS = [
    RandomForestClassifier(30, random_state=0, n_jobs=-1),
    GradientBoostingClassifier(n_estimators=5, max_depth=3, random_state=0),
    HistGradientBoostingClassifier(max_iter=5),
    KNeighborsClassifier(n_jobs=-1),
    MLPClassifier((300,), max_iter=30, tol=0.5, random_state=0),
    SVC(),
    make_pipeline(StandardScaler(), LogisticRegression(max_iter=50, tol=0.1)),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_common_estimators_pass_skops_and_start_no_threads(
    tmp_path: Path, digits: tuple[Tensor, Tensor], estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits[0][:500], digits[1][:500]
    artifact = saved(estimator.fit(images, labels), tmp_path)
    expected = estimator.predict(images)
    model = LOADER.load(artifact)
    monkeypatch.delattr("threading.Thread.start")
    np.testing.assert_array_equal(model.infer({"input-0": images}, ["predict"])["predict"], expected)
    assert [spec.name for spec in model.signature.outputs][1:] == ["predict_proba"] * hasattr(
        estimator, "predict_proba"
    )
    # Sizes: state as pickled, which holds the arrays once; the estimate may also hold skops' copies of seeds.
    assert model.size_bytes == pytest.approx(len(pickle.dumps(estimator)), rel=0.2, abs=8192)
    assert model.size_bytes * 0.7 < LOADER.estimate_bytes(artifact) < model.size_bytes * 1.5 + 200_000


def test_requests_in_fresh_threads_start_no_openmp_team(tmp_path: Path, digits: tuple[Tensor, Tensor]) -> None:
    # libgomp: the number of threads belongs to the calling thread, a limit set elsewhere does not hold
    images, labels = digits
    saved(HistGradientBoostingClassifier(max_iter=3).fit(images[:300], labels[:300]), tmp_path)
    np.save(tmp_path / "images.npy", images)
    script = """
import os, sys, threading
import numpy as np
from pathlib import Path
from loaders import loader_for
from loaders.base import Artifact
model = loader_for("sklearn").load(Artifact(Path(sys.argv[1]) / "model.skops"))
images = np.load(sys.argv[1] + "/images.npy")
count = lambda: len(os.listdir("/proc/self/task"))
before, after = count(), []
def run():
    model.infer({"x": images}, ["predict"])
    after.append(count())
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert after[0] <= before + 1, (before, after)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("labels", "datatype", "expected"),
    [
        (np.array(["ham", "spam"]), "BYTES", b"spam"),
        (np.array(["ham", "späm"], dtype=object), "BYTES", "späm".encode()),
        (np.array([False, True]), "BOOL", True),
        (np.array([3, 4], np.uint8), "INT64", 4),
        (np.array([0.0, 1.0]), "FP64", 1.0),
    ],
)
def test_predict_is_of_the_classes_datatype(tmp_path: Path, labels: Tensor, datatype: str, expected: object) -> None:
    estimator = LogisticRegression().fit([[0.0], [1.0], [5.0], [6.0]], labels[[0, 0, 1, 1]])
    model = LOADER.load(saved(estimator, tmp_path, ".joblib"))
    assert model.signature.outputs[0].datatype == datatype
    assert model.infer({"x": np.array([[7.0]])}, ["predict"])["predict"].tolist() == [expected]


def test_regressors_clusters_and_text(tmp_path: Path, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    regressor = LOADER.load(saved(LinearRegression().fit(images, np.stack([labels, labels / 2], 1)), tmp_path))
    assert regressor.signature.outputs == (TensorSpec("predict", "FP64", (-1, 2)),)
    assert regressor.infer({"x": images[:3]}, ["predict"])["predict"].shape == (3, 2)
    clusters = LOADER.load(saved(KMeans(3, n_init=1, random_state=0).fit(images), tmp_path))
    assert clusters.signature.outputs == (TensorSpec("predict", "INT64", (-1,)),)
    assert clusters.infer({"x": images[:3]}, ["predict"])["predict"].dtype == np.int64
    text = make_pipeline(HashingVectorizer(n_features=64), SGDClassifier(random_state=0))
    model = LOADER.load(saved(text.fit(["good day", "bad day"] * 9, [1, 0] * 9), tmp_path))
    assert model.signature.inputs == (TensorSpec("input-0", "BYTES", (-1,)),)
    words = np.array([[b"good"], [b"bad"]], dtype=object)
    assert model.infer({"x": words}, ["predict"])["predict"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (np.ones((1, 63)), "63 features"),
        (np.full((1, 64), np.nan), "NaN"),
        (np.ones(64), "2D array"),
        (np.full((1, 64), b"dog", dtype=object), "convert string"),
        (np.full((1, 64), b"\xff", dtype=object), "utf-8"),
    ],
)
def test_values_that_sklearn_refuses_are_the_clients_fault(
    tmp_path: Path, digits_model: LogisticRegression, tensor: Tensor, says: str
) -> None:
    with pytest.raises(InferError, match=says) as refusal:
        LOADER.load(saved(digits_model, tmp_path)).infer({"x": tensor}, ["predict"])
    assert refusal.value.bad_input


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)

    def predict(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("where", ["step", "reduced"])
def test_a_skops_file_cannot_run_code(tmp_path: Path, where: str) -> None:  # skops, "Secure persistence"
    from sklearn.preprocessing import FunctionTransformer

    mark = tmp_path / "ran"
    evil: Any = FunctionTransformer(os.mkdir, kw_args={"mode": 0o700}) if where == "step" else Payload(mark)
    artifact = saved(make_pipeline(evil, LogisticRegression()), tmp_path)
    with pytest.raises(LoaderError, match=r"types that are not trusted.*(mkdir|Payload)"):
        LOADER.load(artifact)
    assert not mark.exists()


def test_a_pickle_can_run_code_which_is_why_it_needs_permission(tmp_path: Path) -> None:
    # Python, pickle: "Only unpickle data you trust". The refusal itself: test_artifacts.py
    mark = tmp_path / "ran"
    with pytest.raises(LoaderError, match="has no predict"):
        LOADER.load(saved(Payload(mark), tmp_path, ".joblib"))
    assert mark.exists()


@pytest.mark.parametrize("extension", SAVERS)
def test_a_damaged_or_missing_file_is_refused(tmp_path: Path, digits_model: LogisticRegression, extension: str) -> None:
    path = saved(digits_model, tmp_path, extension).path
    whole = path.read_bytes()
    for content in (b"", b"junk" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(LoaderError, match=f"model{extension}"):
            LOADER.load(Artifact(path))
    path.unlink()
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.load(Artifact(path))
    assert refusal.value.retryable


def test_an_object_that_predicts_nothing_is_refused(tmp_path: Path, digits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(LoaderError, match="a StandardScaler has no predict"):
        LOADER.load(saved(StandardScaler().fit(digits[0]), tmp_path))


def test_another_versions_model_loads_with_its_warning_logged(
    tmp_path: Path, digits_model: LogisticRegression, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # scikit-learn, "Model persistence": InconsistentVersionWarning
    monkeypatch.setattr("sklearn.base.__version__", "0.24.2")
    artifact = saved(digits_model, tmp_path, ".joblib")
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING, "loaders"):
        LOADER.load(artifact)
    assert "from version 0.24.2 when using version" in caplog.text


def test_declarations_name_the_one_input_and_known_outputs(tmp_path: Path, digits_model: LogisticRegression) -> None:
    artifact = saved(digits_model, tmp_path)
    hint = (TensorSpec("images", "FP32", (-1, 64)),)
    both = tuple(TensorSpec(name, "FP32", (-1, 10)) for name in ("predict_proba", "predict"))
    for declared, defaults in ((both, ("predict",)), (both[:1], ())):
        signature = LOADER.load(Artifact(artifact.path, inputs=hint, outputs=declared)).signature
        assert signature.inputs == hint
        assert [spec.datatype for spec in signature.outputs] == ["INT64", "FP64"][-len(declared) :]
        assert signature.default_outputs == defaults
    with pytest.raises(LoaderError, match=r"declared outputs score FP64 \[-1\], the model has predict INT64"):
        LOADER.load(Artifact(artifact.path, outputs=(TensorSpec("score", "FP64", (-1,)),)))
    with pytest.raises(LoaderError, match="takes one input"):
        LOADER.load(Artifact(artifact.path, inputs=hint * 2))


def test_an_unsafe_skops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:  # CVE-2025-54412, -54413, -54886
    monkeypatch.setattr("loaders.sklearn.version", lambda package: "0.12.0")
    with pytest.raises(LoaderError, match=r"pip install 'skops>=0\.13'"):
        SklearnLoader()


def test_concurrent_requests_get_their_own_answers(
    tmp_path: Path,
    digits: tuple[Tensor, Tensor],
    digits_model: LogisticRegression,
    from_eight_threads: Callable[[Callable[[int], bool]], bool],
) -> None:
    model = LOADER.load(saved(digits_model, tmp_path))
    expected = digits_model.predict(digits[0])
    assert from_eight_threads(
        lambda i: bool((model.infer({"x": digits[0][i : i + 9]}, ["predict"])["predict"] == expected[i : i + 9]).all())
    )
    model.unload()
