"""`loaders.mlflow`: directories as MLflow 3.17 writes them. Where mlflow is not installed (it is not in `dev`), those
of the flavours that are data are written here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression

from loaders.base import Artifact, InferError, LoadedModel, LoaderError, ModelLost, Tensor, TensorSpec
from loaders.mlflow import MlflowLoader, inner
from loaders.prepare.preparation import Outcome, Preparation

LOADER = MlflowLoader()
ALLOWED = frozenset(["mlflow"])
ROWS, LABELS = load_wine(return_X_y=True)
ROWS = ROWS[:, :4]
NAMES = ["alcohol", "malic acid", "ash", "magnesium"]

COLUMNS = [{"type": "double", "name": name, "required": True} for name in NAMES]
TENSOR = [{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]
ANSWER = [{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]


def described(folder: Path, flavors: str, inputs: Any = TENSOR, outputs: Any = ANSWER) -> Path:
    """Write `MLmodel`: the signature is JSON in YAML."""
    folder.mkdir(exist_ok=True)
    signature = (
        f"signature:\n  inputs: {json.dumps(json.dumps(inputs))}\n  outputs: {json.dumps(json.dumps(outputs))}\n"
    )
    pyfunc = "  python_function:\n    loader_module: mlflow.sklearn\n    python_version: 3.11.7\n"
    (folder / "MLmodel").write_text(f"flavors:\n{flavors}{pyfunc}mlflow_version: 3.17.2\n{signature}")
    return folder


SKLEARN = "  sklearn:\n    code: null\n    pickled_model: model.skops\n    serialization_format: skops\n"


@pytest.fixture(scope="module")
def classifier() -> LogisticRegression:
    return LogisticRegression(max_iter=50, tol=0.1).fit(ROWS, LABELS)


@pytest.fixture
def saved(tmp_path: Path, classifier: LogisticRegression) -> Path:
    skops.io.dump(classifier, tmp_path / "model.skops")
    return described(tmp_path, SKLEARN)


def columns(rows: Tensor) -> dict[str, Tensor]:
    return {name: rows[:, n : n + 1] for n, name in enumerate(NAMES)}


def test_a_flavour_that_is_data_runs_no_code(saved: Path, classifier: LogisticRegression) -> None:
    model = LOADER.load(Artifact(saved))
    assert model.waits == 0
    answer = model.infer({"input-0": ROWS}, ["predict", "predict_proba"])
    np.testing.assert_array_equal(answer["predict"], classifier.predict(ROWS))
    np.testing.assert_array_equal(answer["predict_proba"], classifier.predict_proba(ROWS))
    assert model.size_bytes * 0.5 < LOADER.estimate_bytes(Artifact(saved)) < model.size_bytes * 3


def test_named_columns_come_one_by_one_or_together(saved: Path, classifier: LogisticRegression) -> None:
    described(saved, SKLEARN, COLUMNS)
    model = LOADER.load(Artifact(saved))
    assert model.signature.inputs[1] == TensorSpec("malic acid", "FP64", (-1, 1))
    assert model.signature.lenient
    wanted = classifier.predict(ROWS)
    shuffled = dict(sorted(columns(ROWS).items()))
    flat = {name: value.reshape(-1) for name, value in shuffled.items()}
    for inputs in (shuffled, flat, {"x": ROWS}):
        np.testing.assert_array_equal(model.infer(inputs, ["predict"])["predict"], wanted)
    with pytest.raises(InferError) as refused:
        model.infer({**flat, "ash": ROWS[:3, 0]}, ["predict"])
    assert refused.value.bad_input


@pytest.mark.parametrize(("extension", "field"), [("ubj", "xgboost"), ("lgb", "lightgbm")])
def test_boosters(tmp_path: Path, extension: str, field: str) -> None:
    booster: Any
    if field == "xgboost":
        xgboost = pytest.importorskip("xgboost")
        booster = xgboost.train({"max_depth": 2}, xgboost.DMatrix(ROWS, LABELS), 3)
        wanted = booster.predict(xgboost.DMatrix(ROWS))
    else:
        lightgbm = pytest.importorskip("lightgbm")
        booster = lightgbm.train({"verbose": -1}, lightgbm.Dataset(ROWS, LABELS), 3)
        wanted = booster.predict(ROWS)
    booster.save_model(tmp_path / f"model.{extension}")
    described(tmp_path, f"  {field}:\n    data: model.{extension}\n", COLUMNS)
    answer = LOADER.load(Artifact(tmp_path)).infer(columns(ROWS), ["predict"])
    np.testing.assert_allclose(answer["predict"], wanted, rtol=1e-6)


def test_a_pyfunc_is_refused_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"")
    described(tmp_path, SKLEARN.replace("model.skops", "model.pkl"))
    for attempt in (LOADER.estimate_bytes, LOADER.load):
        with pytest.raises(
            LoaderError, match=r"is a pyfunc \(mlflow.sklearn\), .* refused without --allow-code mlflow"
        ):
            attempt(Artifact(tmp_path))
    with pytest.raises(LoaderError, match="parameter 'threads' is 0"):
        LOADER.load(Artifact(tmp_path, {"threads": 0}, allowed_code=ALLOWED))


def test_a_pyfunc_whose_python_has_no_mlflow(tmp_path: Path) -> None:
    if importlib.util.find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    described(tmp_path, "")
    with pytest.raises(LoaderError, match="ModuleNotFoundError: No module named 'mlflow'"):
        LOADER.load(Artifact(tmp_path, allowed_code=ALLOWED))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "MLmodel is not YAML"),
        ("[]", "MLmodel has no flavors"),
        ("flavors: 1", "MLmodel has no flavors"),
        ("flavors: {spacy: {}}", "has no flavor that is served: python_function, onnx, xgboost"),
        ("flavors: !!python/object/apply:os.getpid []", "MLmodel is not YAML"),
        ("flavors: {sklearn: {pickled_model: ../model.skops}}", "'../model.skops' of flavor sklearn leads out of"),
        (
            "flavors: {sklearn: {pickled_model: model.skops}}\nsignature: {inputs: '[{'}",
            "signature.inputs is not under",
        ),
        (
            "flavors: {sklearn: {pickled_model: model.skops}}\nsignature: {inputs: '[1]'}",
            "signature.inputs is not under",
        ),
        ("flavors: {sklearn: {pickled_model: model.skops}}", "model.skops is not a skops archive"),
    ],
)
def test_what_mlflow_did_not_write(tmp_path: Path, text: str, says: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "MLmodel").write_text(text)
    for path in (folder, tmp_path):
        (path / "model.skops").write_bytes(b"none")
    with pytest.raises(LoaderError) as refused:
        LOADER.load(Artifact(folder))
    assert says in str(refused.value)


# With mlflow itself: what it saves, against its own predictions.

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def loaded() -> Iterator[Callable[..., tuple[LoadedModel, Any]]]:
    """Save a model with mlflow, and load it with ours and with mlflow."""
    models: list[LoadedModel] = []

    def load(path: Path, save: Callable[[str], Any], **parameters: Any) -> tuple[LoadedModel, Any]:
        import mlflow.pyfunc

        save(str(path / "m"))
        models.append(LOADER.load(Artifact(path / "m", parameters, model_id="m", allowed_code=ALLOWED)))
        return models[-1], mlflow.pyfunc.load_model(str(path / "m"))

    yield load
    for model in models:
        model.unload()


@needs_mlflow
@pytest.mark.parametrize("as_frame", [True, False])
@pytest.mark.parametrize("serialization", ["skops", "cloudpickle"])
def test_scikit_learn_as_mlflow_saves_it(
    tmp_path: Path, classifier: LogisticRegression, loaded: Any, serialization: str, as_frame: bool
) -> None:
    import mlflow.sklearn
    import pandas

    given = pandas.DataFrame(ROWS, columns=NAMES) if as_frame else ROWS
    signature = mlflow.models.infer_signature(given, LABELS)
    model, reference = loaded(
        tmp_path,
        lambda path: mlflow.sklearn.save_model(
            classifier, path, signature=signature, serialization_format=serialization, pip_requirements=[]
        ),
    )
    assert model.waits == (serialization == "cloudpickle")
    wanted = reference.predict(given)
    for inputs in ({"x": ROWS}, *([columns(ROWS)] if as_frame else [])):
        answer = model.infer(inputs, ["predict"])
        np.testing.assert_array_equal(answer["predict"], wanted)
    assert [spec.name for spec in model.signature.inputs] == (NAMES if as_frame else ["input-0"])


@needs_mlflow
def test_a_python_model_with_columns_of_text_and_numbers(tmp_path: Path, loaded: Any) -> None:
    import mlflow.pyfunc
    import pandas

    class Shouts(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return pandas.DataFrame({"twice": model_input["n"] * 2, "loud": model_input["t"].str.upper()})

    frame = pandas.DataFrame({"n": np.array([1, 2], np.int32), "t": ["ä", "b"]})
    signature = mlflow.models.infer_signature(frame, Shouts().predict(None, frame))
    sys.modules[__name__].__dict__.setdefault("pandas", pandas)
    model, reference = loaded(
        tmp_path,
        lambda path: mlflow.pyfunc.save_model(path, python_model=Shouts(), signature=signature, pip_requirements=[]),
    )
    assert model.signature.inputs == (TensorSpec("n", "INT32", (-1, 1)), TensorSpec("t", "BYTES", (-1, 1)))
    assert [spec.name for spec in model.signature.outputs] == ["twice", "loud"]
    inputs = {"t": np.array(["ä".encode(), b"b"], object), "n": np.array([[1], [2]], np.int64)}
    answer = model.infer(inputs, ["twice", "loud"])
    wanted = reference.predict(frame)
    assert answer["twice"].tolist() == wanted["twice"].tolist()
    assert [each.decode() for each in answer["loud"]] == wanted["loud"].tolist()
    with pytest.raises(InferError) as refused:
        model.infer({"n": inputs["n"]}, ["twice"])
    assert refused.value.bad_input
    assert not isinstance(refused.value, ModelLost)
    assert sorted(each.name for each in (tmp_path / "m").iterdir() if each.suffix == ".db") == []


@needs_mlflow
def test_onnx_as_mlflow_saves_it(tmp_path: Path, classifier: LogisticRegression, loaded: Any) -> None:
    import mlflow.onnx
    from skl2onnx import to_onnx

    rows = ROWS.astype(np.float32)
    graph = to_onnx(classifier, rows[:1], options={"zipmap": False})
    model, reference = loaded(tmp_path, lambda path: mlflow.onnx.save_model(graph, path, pip_requirements=[]))
    wanted = reference.predict(rows)
    answer = model.infer({"X": rows}, list(wanted))
    for name, value in wanted.items():
        np.testing.assert_allclose(answer[name], value, rtol=1e-5)


@needs_mlflow
@pytest.mark.parametrize("kind", ["booster", "classifier"])
@pytest.mark.parametrize("flavor", ["xgboost", "lightgbm"])
def test_boosters_as_mlflow_saves_them(tmp_path: Path, loaded: Any, flavor: str, kind: str) -> None:
    import mlflow

    framework: Any = pytest.importorskip(flavor)
    module = importlib.import_module(f"mlflow.{flavor}")
    if kind == "classifier":
        make = framework.XGBClassifier if flavor == "xgboost" else framework.LGBMClassifier
        booster = make(n_estimators=3).fit(ROWS, LABELS)
    elif flavor == "xgboost":
        booster = framework.train({"max_depth": 2}, framework.DMatrix(ROWS, LABELS), 3)
    else:
        booster = framework.train({"verbose": -1}, framework.Dataset(ROWS, LABELS), 3)
    signature = mlflow.models.infer_signature(ROWS, LABELS)
    model, reference = loaded(
        tmp_path, lambda path: module.save_model(booster, path, signature=signature, pip_requirements=[])
    )
    answer = model.infer({"x": ROWS}, ["predict"])["predict"]
    np.testing.assert_allclose(answer, np.asarray(reference.predict(ROWS)), rtol=1e-5)
    assert model.waits == (flavor == "lightgbm" and kind == "classifier")  # which skops holds in part as a pickle


def test_a_flavour_that_is_data_is_prepared_as_if_its_file_were_registered(saved: Path, tmp_path: Path) -> None:
    preparation = Preparation(tmp_path / "prepared", None)
    preparation.start()
    try:
        assert preparation.prepare("mlflow", Artifact(saved)) is Outcome.PREPARED
        assert preparation.prepare("sklearn", Artifact(saved / "model.skops")) is Outcome.FOUND
        prepared = preparation.find("mlflow", Artifact(saved))
        assert prepared is not None
        model = prepared.load()
        expected = LOADER.load(Artifact(saved)).infer({"input-0": ROWS}, ["predict"])
        np.testing.assert_array_equal(model.infer({"input-0": ROWS}, ["predict"])["predict"], expected["predict"])
        model.unload()
        prepared.close()
        described(saved, SKLEARN, COLUMNS)  # whose columns come one by one as well
        assert inner(Artifact(saved)) is None
    finally:
        preparation.close()
