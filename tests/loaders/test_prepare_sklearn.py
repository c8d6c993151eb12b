"""`loaders.prepare.sklearn`: graphs that answer, and refuse, as the estimators do. Authority: scikit-learn's own
predictions; MLServer's pandas codec and KServe's named inputs for columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_diabetes, load_wine
from sklearn.ensemble import (
    GradientBoostingRegressor,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC

from loaders.base import Artifact, InferError, LoadedModel, Tensor
from loaders.prepare import Damaged, NotPreparable
from loaders.prepare.converted import GRAPH, ConvertedLoader
from loaders.prepare.sklearn import prepare
from loaders.sklearn import SklearnLoader

pytestmark = pytest.mark.filterwarnings("ignore")  # of skl2onnx; the child ignores them too

Both = tuple[LoadedModel, LoadedModel]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Both]:
    """`both(fitted)`: the model as scikit-learn has it, and converted, whether that is faster or not."""
    monkeypatch.setattr("loaders.prepare.sklearn.check_gain", lambda *_: None)

    def convert(estimator: Any) -> Both:
        joblib.dump(estimator, tmp_path / "model.joblib")
        artifact, folder = Artifact(tmp_path / "model.joblib"), tmp_path / "form"
        folder.mkdir()
        prepare(artifact, folder)
        return SklearnLoader().load(artifact), ConvertedLoader().load(Artifact(folder))

    return convert


CLASSIFIERS = [
    RandomForestClassifier(20, random_state=0),
    LogisticRegression(max_iter=50, tol=0.1),
    SVC(),
    MLPClassifier((20,), max_iter=30, tol=0.5, random_state=0),
    make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0)),
]
REGRESSORS = [
    RandomForestRegressor(20, random_state=0),
    GradientBoostingRegressor(n_estimators=10, random_state=0),
    make_pipeline(MinMaxScaler(), HistGradientBoostingRegressor(max_iter=10, random_state=0)),
]


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("labels", [[0, 1, 2], ["barolo", "grignolino", "barbera"]], ids=["numbers", "strings"])
def test_classifiers_answer_as_before(both: Callable[[Any], Both], estimator: Any, labels: list[Any]) -> None:
    rows, classes = load_wine(return_X_y=True)
    own, converted = both(estimator.fit(rows[::2], np.array(labels)[classes[::2]]))
    assert converted.signature == own.signature
    outputs = [spec.name for spec in own.signature.outputs]
    expected, found = (model.infer({"input-0": rows}, outputs) for model in (own, converted))
    np.testing.assert_array_equal(found["predict"], expected["predict"])
    assert [found[name].dtype for name in outputs] == [expected[name].dtype for name in outputs]
    if len(outputs) > 1:
        np.testing.assert_allclose(found["predict_proba"], expected["predict_proba"], atol=1e-6)


@pytest.mark.parametrize("trees", [7, 10, 20, 50])
def test_ties_of_two_classes_go_as_before(both: Callable[[Any], Both], trees: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2000, 3))
    own, converted = both(RandomForestClassifier(trees, random_state=0).fit(rows[:300], rng.integers(0, 2, 300)))
    expected, found = (model.infer({"x": rows}, ["predict", "predict_proba"]) for model in (own, converted))
    assert trees % 2 or (expected["predict_proba"][:, 0] == 0.5).sum() > 20
    np.testing.assert_array_equal(found["predict"], expected["predict"])
    np.testing.assert_allclose(found["predict_proba"], expected["predict_proba"], atol=1e-6)


@pytest.mark.parametrize("estimator", REGRESSORS, ids=lambda each: type(each).__name__)
def test_regressors_answer_as_before(both: Callable[[Any], Both], estimator: Any) -> None:
    rows, target = load_diabetes(return_X_y=True)
    own, converted = both(estimator.fit(rows, target))
    expected, found = (model.infer({"input-0": rows}, ["predict"])["predict"] for model in (own, converted))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "tensor",
    [
        np.ones((1, 12)),
        np.ones(13),
        np.full((1, 13), np.nan),
        np.full((1, 13), np.inf),
        np.full((1, 13), 1e39),
        np.full((1, 13), b"dog", dtype=object),
        np.full((1, 13), b"1.5", dtype=object),
        np.full((1, 13), b"\xff", dtype=object),
        np.ones((0, 13)),
        np.ones((2, 13), np.int8),
        np.ones((2, 13), np.float16),
    ],
    ids=["narrow", "1-D", "NaN", "infinite", "beyond FP32", "word", "decimal", "not UTF-8", "no rows", "INT8", "FP16"],
)
@pytest.mark.parametrize("estimator", [LogisticRegression(tol=0.1), RandomForestClassifier(5)], ids=["linear", "trees"])
def test_what_one_refuses_the_other_does(both: Callable[[Any], Both], estimator: Any, tensor: Tensor) -> None:
    rows, classes = load_wine(return_X_y=True)
    own, converted = both(estimator.fit(rows, classes))
    assert _said(converted, {"x": tensor}) == _said(own, {"x": tensor})


def _said(model: LoadedModel, request: Mapping[str, Tensor]) -> list[Any] | bool:
    """A prediction, or that the client is to blame for there being none."""
    try:
        return [each.tolist() for each in model.infer(request, ["predict"]).values()]
    except InferError as error:
        return error.bad_input


@pytest.mark.parametrize("share", [0.0, 0.2], ids=["whole", "holes"])
def test_missing_values_go_where_the_trees_were_taught(both: Callable[[Any], Both], share: float) -> None:
    rows, classes = load_wine(return_X_y=True)
    rng = np.random.default_rng(0)
    taught, holes = (np.where(rng.random(rows.shape) < each, np.nan, rows) for each in (share, 0.2))
    own, converted = both(RandomForestClassifier(10, random_state=0).fit(taught, classes))
    expected, found = (model.infer({"x": holes}, ["predict_proba"])["predict_proba"] for model in (own, converted))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_does_not_convert_is_refused(both: Callable[[Any], Both]) -> None:
    rows, classes = load_wine(return_X_y=True)
    with pytest.raises(NotPreparable, match="NearestCentroid"):
        both(NearestCentroid().fit(rows, classes))


def test_a_wrong_graph_is_found_out(both: Callable[[Any], Both]) -> None:
    # skl2onnx 1.20 takes the logarithm of 1 + tf for 1 + the logarithm of tf
    estimator = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression())
    with pytest.raises(NotPreparable, match="its conversion"):
        both(estimator.fit(["free money free", "call me", "free prize", "lunch at noon"], [1, 0, 1, 0]))


def test_a_damaged_graph_or_description_is_told(tmp_path: Path, both: Callable[[Any], Both]) -> None:
    rows, classes = load_wine(return_X_y=True)
    both(LogisticRegression(tol=0.1).fit(rows, classes))
    folder = tmp_path / "form"
    graph, description = folder / GRAPH, folder / "conversion.json"
    for path in (graph, description):
        whole = path.read_bytes()
        for content in (b"", b"junk", whole[:-9], whole.replace(b"t", b"u")):
            path.write_bytes(content)
            with pytest.raises(Damaged, match="damaged"):
                ConvertedLoader().load(Artifact(folder))
        path.write_bytes(whole)
    assert ConvertedLoader().load(Artifact(folder)).signature.platform == "sklearn"


@pytest.mark.parametrize(
    ("encoder", "final"),
    [
        (OneHotEncoder(handle_unknown="ignore"), LogisticRegression()),
        (OneHotEncoder(), RandomForestClassifier(10, random_state=0)),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")), SVC()),
    ],
    ids=["unknown ignored", "unknown refused", "imputed"],
)
def test_columns_of_a_data_frame(both: Callable[[Any], Both], encoder: Any, final: Any) -> None:
    people, plans = census()
    columns = ColumnTransformer([("numbers", StandardScaler(), ["age", "income"]), ("strings", encoder, ["city"])])
    own, converted = both(make_pipeline(columns, final).fit(people, plans))
    for model in (own, converted):
        assert [(spec.name, spec.datatype, spec.shape) for spec in model.signature.inputs] == [
            ("age", "FP64", (-1, 1)),
            ("income", "FP64", (-1, 1)),
            ("city", "BYTES", (-1, 1)),
        ]
    expected = own.estimator.predict(people)  # type: ignore[attr-defined]
    by_name = {  # pandas codec: any datatype, [n] or [n, 1], in any order
        "city": np.array([city.encode() for city in people["city"]], object).reshape(-1, 1),
        "age": people["age"].to_numpy(np.int64),
        "income": people["income"].to_numpy(),
    }
    together = np.array([[str(value).encode() for value in row] for row in people.to_numpy(object)], object)
    unknown = {**by_name, "city": np.full(len(people), b"Atlantis", object)}
    for model in (own, converted):
        for request in (by_name, {"input-0": together}):
            np.testing.assert_array_equal(model.infer(request, ["predict"])["predict"], expected.astype("S"))
        for wrong, says in (
            ({"age": by_name["age"], "city": by_name["city"]}, "takes the columns age, income, city, got age, city"),
            ({**by_name, "age": by_name["age"][:3]}, "as many rows as the others"),
            ({**by_name, "income": by_name["city"]}, "could not convert string"),
        ):
            with pytest.raises(InferError, match=says) as refusal:
                model.infer(wrong, ["predict"])
            assert refusal.value.bad_input
    assert _said(own, unknown) == _said(converted, unknown)


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(),
        TfidfVectorizer(ngram_range=(1, 2), stop_words="english"),
        CountVectorizer(lowercase=False, token_pattern=r"[^ ]+"),
    ],
    ids=["defaults", "pairs without stop words", "own pattern"],
)
@pytest.mark.parametrize("final", [LogisticRegression(), LinearSVC()], ids=["logistic", "svm"])
def test_texts(both: Callable[[Any], Both], vectorizer: Any, final: Any) -> None:
    texts = [
        "Free money now",
        "Call me tomorrow",
        "WIN a free prize",
        "Größe und Maß",
        "the lunch at noon",
        "数据 is big",
    ]
    own, converted = both(make_pipeline(vectorizer, final).fit(texts, ["spam", "ham", "spam", "ham", "ham", "ham"]))
    asked = [*texts, "", "FREE größe!", "don't e-mail: 3.14", "a\tfree\nlunch", "unheard-of"]
    for some in (asked, *([text] for text in asked)):
        request = {"x": np.array([text.encode() for text in some], object)}
        assert _said(converted, request) == _said(own, request)
    for wrong in (np.array([b"\xff"], object), np.array([], object)):
        assert _said(converted, {"x": wrong}) is _said(own, {"x": wrong}) is True


def census() -> tuple[pandas.DataFrame, Tensor]:
    """People and the plan that they have."""
    rng = np.random.default_rng(0)
    age = rng.integers(18, 80, 200)
    city = rng.choice(["Bern", "Zürich", "Genf"], 200)
    people = pandas.DataFrame({"age": age, "income": rng.normal(3e4, 1e4, 200), "city": city})
    return people, np.where((age > 40) ^ (city == "Bern"), "basic", "premium")
