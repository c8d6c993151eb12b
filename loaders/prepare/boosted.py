"""XGBoost and LightGBM boosters as ONNX graphs: their trees in one `TreeEnsembleRegressor` (ai.onnx.ml 3), then what
the objective makes of the sum. Written from the files' own numbers, so that XGBoost's thresholds stay FP32 and
LightGBM's FP64, as the libraries compare them.

Boosters with splits by category, linear leaves, several values in a leaf or zeros for missing values are served as they
are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from loaders.base import Artifact, LoadedModel, Tensor
from loaders.prepare import NotPreparable
from loaders.prepare.converted import Conversion, ConvertedLoader, Feed, write
from loaders.prepare.trust import check_agreement, check_gain
from loaders.ubjson import parsed

_OPSETS: Final = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
_LINKS: Final = {
    **dict.fromkeys(("binary:logistic", "reg:logistic", "binary", "cross_entropy", "multiclassova"), "Sigmoid"),
    **dict.fromkeys(("multi:softprob", "multi:softmax", "multiclass"), "Softmax"),
    **dict.fromkeys(("count:poisson", "reg:gamma", "reg:tweedie", "poisson", "gamma", "tweedie"), "Exp"),
}
"""By objective; others leave the sum as it is. That they do is not taken for granted: answers are compared."""
_ROWS: Final = 64


@dataclass(slots=True)
class _Forest:
    """Nodes of all trees in one row; `left` and `right` count within a tree."""

    sizes: list[int]
    left: Tensor
    right: Tensor
    splits: Tensor
    features: Tensor
    thresholds: Tensor
    nan_left: Tensor
    values: Tensor
    targets: list[int]
    """Of each tree."""
    width: int
    groups: int
    mode: str
    link: str
    factor: float = 1.0
    """Of the sum, before the link."""


def prepare_xgboost(artifact: Artifact, folder: Path) -> None:
    """Write the form `converted`.

    Raises:
        NotPreparable: it has what a graph cannot have, its graph does not agree, or is not faster.
        LoaderError: the booster does not load.
    """
    from loaders.xgboost import XgboostLoader

    own = XgboostLoader().load(artifact)
    booster = own.booster
    learner = parsed(bytes(booster.save_raw("ubj")))["learner"]
    if learner["gradient_booster"]["name"] != "gbtree":
        raise NotPreparable(f"a {learner['gradient_booster']['name']} booster is no sum of trees")
    model = learner["gradient_booster"]["model"]
    last = model["iteration_indptr"][own.rounds[1]] if own.rounds[1] else len(model["trees"])
    trees = model["trees"][:last]
    if any(np.any(tree["split_type"]) or tree["tree_param"]["size_leaf_vector"] != "1" for tree in trees):
        raise NotPreparable("it splits by category, or has several values in a leaf")
    left, right, features, thresholds, nan_left = (
        _joined(tree[name] for tree in trees)
        for name in ("left_children", "right_children", "split_indices", "split_conditions", "default_left")
    )
    splits = left != -1
    forest = _Forest(
        [len(tree["left_children"]) for tree in trees],
        *(left, right, splits, features, np.where(splits, thresholds, 0), nan_left.astype(bool)),
        np.where(splits, 0, thresholds),
        list(model["tree_info"][:last]),
        int(booster.num_features()),
        max(1, *(int(learner["learner_model_param"][name]) for name in ("num_class", "num_target"))),
        "BRANCH_LT",
        _LINKS.get(learner["objective"]["name"], ""),
    )
    row = np.zeros((1, forest.width), np.float32)
    margin = booster.inplace_predict(row, predict_type="margin", iteration_range=own.rounds)
    _prepare(own, forest, np.float32, margin.reshape(-1), folder)


def prepare_lightgbm(artifact: Artifact, folder: Path) -> None:
    """See `prepare_xgboost`."""
    from loaders.lightgbm import LightgbmLoader

    own = LightgbmLoader().load(artifact)
    booster = own.booster
    head, *blocks = re.split(rb"\n(?=Tree=)", artifact.path.read_bytes().partition(b"\nend of trees")[0])
    names = _lines(head)
    trees = [_lines(block) for block in blocks]
    if any(int(tree[b"num_cat"]) or int(tree.get(b"is_linear", 0)) for tree in trees):
        raise NotPreparable("it splits by category, or has linear leaves")
    objective, *settings = names.get(b"objective", b"none").decode().split()
    told = dict(setting.partition(":")[::2] for setting in settings)
    groups = int(names[b"num_tree_per_iteration"])
    parts = [_lightgbm_tree(tree) for tree in trees]
    left, right, splits, features, thresholds, nan_left, values = (_joined(part) for part in zip(*parts, strict=True))
    forest = _Forest(
        [len(part[0]) for part in parts],
        *(left, right, splits.astype(bool), features, thresholds, nan_left.astype(bool), values),
        [number % groups for number in range(len(trees))],
        int(names[b"max_feature_idx"]) + 1,
        groups,
        "BRANCH_LEQ",
        "" if "sqrt" in settings else _LINKS.get(objective, ""),
        (groups / len(trees) if b"average_output" in names else 1.0)
        * (float(told.get("sigmoid", 1)) if _LINKS.get(objective) == "Sigmoid" else 1.0),
    )
    raw = np.asarray(booster.predict(np.zeros((1, forest.width)), raw_score=True)).reshape(-1)
    _prepare(own, forest, np.float64, raw, folder)


def _lightgbm_tree(tree: Mapping[bytes, bytes]) -> tuple[Tensor, ...]:
    """Its splits, then its leaves."""
    leaves = int(tree[b"num_leaves"])

    def of(name: bytes, kind: type) -> Tensor:
        return np.array([*map(kind, tree[name].split())], kind)

    values = of(b"leaf_value", float)
    if leaves == 1:
        one = np.zeros(1, np.int64)
        return one, one, one, one, np.zeros(1), one, values
    children = [
        np.where(each < 0, leaves - 2 - each, each) for each in (of(b"left_child", int), of(b"right_child", int))
    ]
    decisions, thresholds = of(b"decision_type", int), of(b"threshold", float)
    missing = (decisions >> 2) & 3
    if (missing == 1).any():
        raise NotPreparable("it takes zeros for missing values")
    nan_left = np.where(missing == 2, (decisions & 2) > 0, thresholds >= 0)  # without missing values NaN counts as zero
    pad = np.zeros(leaves, np.int64)
    return (
        np.concatenate([children[0], pad]),
        np.concatenate([children[1], pad]),
        np.concatenate([pad[1:] + 1, pad]),
        np.concatenate([of(b"split_feature", int), pad]),
        np.concatenate([thresholds, pad.astype(float)]),
        np.concatenate([nan_left, pad]),
        np.concatenate([np.zeros(leaves - 1), values]),
    )


def _prepare(
    own: LoadedModel,
    forest: _Forest,
    dtype: type[np.floating[Any]],
    margin: Tensor,
    folder: Path,
) -> None:
    graph = _graph(forest, dtype, np.zeros(forest.groups), own, only_sum=True)
    start = _run(graph, np.zeros((1, forest.width), dtype))
    graph = _graph(forest, dtype, margin - start, own)
    datatype = "FP32" if dtype is np.float32 else "FP64"
    feed = Feed("X", datatype, 0, forest.width, takes_nan=True, takes_infinite=True)
    answers = {spec.name: spec.name for spec in own.signature.outputs}
    names = tuple(spec.name for spec in own.signature.inputs) if len(own.signature.inputs) > 1 else ()
    write(Conversion(own.signature, (feed,), answers, forest.width, names), graph, folder)
    conversion = ConvertedLoader().load(Artifact(folder))
    probes = [*_probes(forest, dtype, np.random.default_rng(0))]
    check_agreement(own, conversion, [{"input-0": rows} for rows in probes])
    check_gain(own, conversion, [{"input-0": probes[0][:count]} for count in (1, 32)])


def _graph(
    forest: _Forest, dtype: type[np.floating[Any]], base: Tensor, own: LoadedModel, *, only_sum: bool = False
) -> bytes:
    ids = np.concatenate([np.arange(size) for size in forest.sizes])
    trees = np.repeat(np.arange(len(forest.sizes)), forest.sizes)
    leaves = ~forest.splits
    is_double = dtype is np.float64
    suffix = "_as_tensor" if is_double else ""

    def reals(name: str, values: Tensor) -> dict[str, Any]:
        array = np.asarray(values, dtype)
        return {f"{name}{suffix}": numpy_helper.from_array(array, name) if is_double else array.tolist()}

    ensemble = helper.make_node(
        "TreeEnsembleRegressor",
        ["X"],
        ["sum"],
        domain="ai.onnx.ml",
        n_targets=forest.groups,
        nodes_treeids=trees.tolist(),
        nodes_nodeids=ids.tolist(),
        nodes_featureids=np.where(forest.splits, forest.features, 0).tolist(),
        nodes_modes=np.where(forest.splits, forest.mode, "LEAF").tolist(),
        nodes_truenodeids=np.where(forest.splits, forest.left, 0).tolist(),
        nodes_falsenodeids=np.where(forest.splits, forest.right, 0).tolist(),
        nodes_missing_value_tracks_true=(forest.nan_left & forest.splits).astype(int).tolist(),
        target_treeids=trees[leaves].tolist(),
        target_nodeids=ids[leaves].tolist(),
        target_ids=np.array(forest.targets)[trees[leaves]].tolist(),
        **reals("nodes_values", forest.thresholds),
        **reals("target_weights", forest.values[leaves]),
        **reals("base_values", base),
    )
    kind = TensorProto.DOUBLE if is_double else TensorProto.FLOAT
    given = [helper.make_tensor_value_info("X", kind, ["n", forest.width])]
    if only_sum:
        nodes, constants, outputs = (
            [ensemble],
            dict[str, Any](),
            [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
        )
    else:
        nodes, constants, outputs = _answers(forest, own)
        nodes.insert(0, ensemble)
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "boosted", given, outputs, held)
    made: bytes = helper.make_model(graph, opset_imports=_OPSETS, ir_version=8).SerializeToString()
    return made


def _answers(forest: _Forest, own: LoadedModel) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """What the model's `predict` and `predict_proba` make of the sum."""
    nodes: list[Any] = []
    constants: dict[str, Any] = {"half": np.float32(0.5), "one": np.float32(1)}
    scores = "sum"
    if forest.factor != 1:
        constants["factor"] = np.float32(forest.factor)
        nodes.append(helper.make_node("Mul", [scores, "factor"], ["scaled"]))
        scores = "scaled"
    if forest.link:
        link = helper.make_node(forest.link, [scores], ["scores"])
        if forest.link == "Softmax":
            link.attribute.append(helper.make_attribute("axis", 1))
        nodes.append(link)
        scores = "scores"
    specs = {spec.name: spec for spec in own.signature.outputs}
    kinds = {"INT64": TensorProto.INT64, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE}
    predict, answer = specs["predict"], scores
    if forest.groups > 1 and predict.shape == (-1,):
        nodes.append(helper.make_node("ArgMax", [scores], ["best"], axis=1, keepdims=0))
        answer = "best"
    elif predict.datatype == "INT64":
        nodes.append(helper.make_node("Greater", [scores, "half"], ["above"]))
        answer = "above"
    nodes.append(helper.make_node("Cast", [answer], ["predict"], to=kinds[predict.datatype]))
    if "predict_proba" in specs and forest.groups == 1:
        nodes.append(helper.make_node("Sub", ["one", scores], ["other"]))
        nodes.append(helper.make_node("Concat", ["other", scores], ["predict_proba"], axis=1))
    elif "predict_proba" in specs:
        nodes.append(helper.make_node("Identity", [scores], ["predict_proba"]))
    outputs = [helper.make_tensor_value_info(name, kinds[spec.datatype], None) for name, spec in specs.items()]
    return nodes, constants, outputs


def _probes(forest: _Forest, dtype: type[np.floating[Any]], rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows around thresholds in both precisions, some with missing values; then far out."""
    pools = []
    for feature in range(forest.width):
        values = np.unique(forest.thresholds[forest.splits & (forest.features == feature)]).astype(dtype)
        values = values[np.isfinite(values)] if len(values) else np.zeros(1, dtype)
        near = [values, np.nextafter(values, dtype(-np.inf)), np.nextafter(values, dtype(np.inf))]
        pools.append(np.concatenate([*near, values.astype(np.float32).astype(dtype), rng.normal(size=8).astype(dtype)]))
    for share in (0.0, 0.1, 0.6):
        for _ in range(4):
            rows = np.stack([rng.choice(pool, _ROWS) for pool in pools], 1)
            rows[rng.random(rows.shape) < share] = np.nan
            yield rows
    for scale in (1e-6, 1.0, 1e4, 1e12):
        yield (rng.normal(size=(_ROWS, forest.width)) * scale).astype(dtype)
    yield np.full((1, forest.width), np.nan, dtype)
    yield np.zeros((1, forest.width), dtype)
    yield rng.choice([np.inf, -np.inf, 0, 1], (_ROWS, forest.width)).astype(dtype)
    for row in np.stack([rng.choice(pool, 8) for pool in pools], 1):
        yield row.reshape(1, -1)


def _run(graph: bytes, rows: Tensor) -> Tensor:
    import onnxruntime

    found: Tensor = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"X": rows})[0]
    return found.reshape(-1).astype(np.float64)


def _joined(parts: Any) -> Tensor:
    return np.concatenate([np.asarray(part) for part in parts])


def _lines(block: bytes) -> dict[bytes, bytes]:
    return dict(line.partition(b"=")[::2] for line in block.splitlines())
