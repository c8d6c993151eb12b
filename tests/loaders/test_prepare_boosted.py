"""`loaders.prepare.boosted`: graphs of XGBoost's and LightGBM's trees answer as the libraries do, missing values and
thresholds included, or are not made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost

from loaders import loader_for
from loaders.base import Artifact, Tensor
from loaders.prepare import PREPARERS, NotPreparable, named
from loaders.prepare.converted import ConvertedLoader


@pytest.fixture(autouse=True)
def any_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a graph is on a busy machine is not looked at here."""
    monkeypatch.setattr("loaders.prepare.boosted.check_gain", lambda *_: None)


@pytest.fixture(scope="module")
def data(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Digits with values missing, and values that FP32 does not have."""
    images = digits[0][:600] + np.random.default_rng(0).random((600, 64)) * 1e-3
    images[::3, 18:40] = np.nan
    return images, digits[1][:600]


def prepared(path: Path, format_name: str, folder: Path) -> tuple[Any, Any]:
    """The model as it is and its conversion."""
    folder.mkdir()
    named(PREPARERS[format_name].function)(Artifact(path), folder)
    return loader_for(format_name).load(Artifact(path)), ConvertedLoader().load(Artifact(folder))


def same(own: Any, conversion: Any, rows: Tensor) -> None:
    assert conversion.signature == own.signature
    for count in (1, 7, len(rows)):
        outputs = [spec.name for spec in own.signature.outputs]
        expected, found = (model.infer({"x": rows[:count]}, outputs) for model in (own, conversion))
        for name in outputs:
            assert expected[name].dtype == found[name].dtype
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"objective": "reg:squarederror"},
        {"objective": "reg:tweedie"},
        {"objective": "count:poisson", "base_score": 2.5},
        {"objective": "rank:ndcg"},
        {"objective": "binary:logistic"},
        {"objective": "multi:softmax", "num_class": 10},
        {"objective": "multi:softprob", "num_class": 10},
        {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.9]},
        {"objective": "reg:absoluteerror", "num_parallel_tree": 2, "subsample": 0.5},
    ],
    ids=str,
)
def test_xgboost_boosters(tmp_path: Path, data: tuple[Tensor, Tensor], parameters: dict[str, Any]) -> None:
    rows, labels = data
    labels = labels % 2 if "binary" in parameters["objective"] else labels
    booster = xgboost.train({**parameters, "max_depth": 4, "nthread": 1}, xgboost.DMatrix(rows, labels), 4)
    booster.save_model(tmp_path / "model.ubj")
    same(*prepared(tmp_path / "model.ubj", "xgboost", tmp_path / "form"), rows)


@pytest.mark.parametrize("classes", [2, 10])
def test_xgboost_classifiers_stopped_early(tmp_path: Path, data: tuple[Tensor, Tensor], classes: int) -> None:
    rows, labels = data
    estimator = xgboost.XGBClassifier(n_estimators=30, learning_rate=1.5, early_stopping_rounds=3, n_jobs=1)
    estimator.fit(rows[:400], labels[:400] % classes, eval_set=[(rows[400:], labels[400:] % classes)], verbose=False)
    assert estimator.best_iteration + 1 < estimator.get_booster().num_boosted_rounds()
    estimator.save_model(tmp_path / "model.json")
    own, conversion = prepared(tmp_path / "model.json", "xgboost", tmp_path / "form")
    same(own, conversion, rows)
    np.testing.assert_array_equal(conversion.infer({"x": rows}, ["predict"])["predict"], estimator.predict(rows))


@pytest.mark.parametrize(
    "parameters",
    [
        {"objective": "regression"},
        {"objective": "regression", "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5},
        {"objective": "regression", "boosting": "dart"},
        {"objective": "regression", "use_missing": False},
        {"objective": "poisson"},
        {"objective": "lambdarank"},
        {"objective": "binary", "sigmoid": 2.0},
        {"objective": "multiclass", "num_class": 10},
        {"objective": "multiclassova", "num_class": 10},
    ],
    ids=str,
)
def test_lightgbm_boosters(tmp_path: Path, data: tuple[Tensor, Tensor], parameters: dict[str, Any]) -> None:
    rows, labels = data
    group = [200] * 3 if parameters["objective"] == "lambdarank" else None
    labels = labels % 2 if parameters["objective"] == "binary" else labels
    dataset = lightgbm.Dataset(rows, labels, group=group, params={"verbose": -1})
    lightgbm.train({"num_threads": 1, "verbose": -1, "num_leaves": 9, **parameters}, dataset, 4).save_model(
        tmp_path / "model.txt"
    )
    same(*prepared(tmp_path / "model.txt", "lightgbm", tmp_path / "form"), rows)


@pytest.mark.parametrize("what", ["categories", "dart", "linear", "zero_as_missing"])
def test_what_a_graph_cannot_have_is_not_prepared(tmp_path: Path, data: tuple[Tensor, Tensor], what: str) -> None:
    rows, labels = data
    if what == "dart":
        booster = xgboost.train({"booster": "dart", "nthread": 1}, xgboost.DMatrix(rows, labels), 2)
        path, format_name = tmp_path / "model.ubj", "xgboost"
        booster.save_model(path)
    else:
        path, format_name = tmp_path / "model.txt", "lightgbm"
        how = {"linear": {"linear_tree": True}, "zero_as_missing": {"zero_as_missing": True}}.get(what, {})
        rows = np.nan_to_num(rows).round()
        dataset = lightgbm.Dataset(
            rows,
            labels,
            categorical_feature=[20, 28, 36] if what == "categories" else [],
            params={"verbose": -1, **how},
        )
        settings = {"num_threads": 1, "verbose": -1, "cat_smooth": 1, "min_data_per_group": 5, **how}
        lightgbm.train(settings, dataset, 9).save_model(path)
    (tmp_path / "form").mkdir()
    with pytest.raises(NotPreparable):
        named(PREPARERS[format_name].function)(Artifact(path), tmp_path / "form")
