"""Trees in ONNX graphs as scikit-learn's are: thresholds in double precision, and NaN goes where the estimator has it
go.

skl2onnx 1.20 writes thresholds as FP32 and forgets where a decision tree sends missing values. Its `TreeEnsemble*`
nodes get both from the fitted trees here, in the attributes of ai.onnx.ml version 3, whose double kernels compare and
add as scikit-learn does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.ensemble._forest import ForestClassifier
from sklearn.tree._tree import Tree

_OPERATORS: Final = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
_DOUBLES: Final = ("nodes_values", "class_weights", "target_weights", "base_values")


def exact(model: onnx.ModelProto, estimator: Any, *, is_double: bool, widen: bool) -> None:
    """Change a graph that skl2onnx made of an estimator, if its trees are the estimator's.

    `is_double`: it was made with inputs of FP64; `widen`: what follows its trees expects FP64 too.
    """
    nodes = [node for node in model.graph.node if node.op_type in _OPERATORS]
    trees = [_told(tree) for tree in _trees(estimator)]
    if not nodes or not _are_these(nodes, trees):
        return
    following = iter(trees)
    for node in nodes:
        _retouch(node, [next(following) for _ in _groups(node)], is_double=is_double)
    if is_double:
        forest = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
        if isinstance(forest, ForestClassifier) and forest.n_outputs_ == len(nodes) == 1 and not widen:
            _let_forest_vote(model.graph, nodes[0], forest)
        for number, node in enumerate(nodes):
            _cast(model.graph, node, number, widen=widen, narrow=not _is_histogram(estimator))
        for opset in model.opset_import:
            if opset.domain == "ai.onnx.ml":
                opset.version = 3


def with_finite_thresholds(estimator: Any) -> Any:
    """The estimator, changed: where all but NaN goes left the threshold is infinite, and skl2onnx would never end."""
    for tree in _trees(estimator):
        if isinstance(tree, Tree):
            tree.threshold[np.isinf(tree.threshold)] = np.finfo(np.float32).max
    return estimator


def _told(tree: Any) -> tuple[Any, Any]:
    """Of each node: its threshold, and whether NaN goes left."""
    if isinstance(tree, Tree):
        return tree.threshold, tree.__getstate__()["nodes"]["missing_go_to_left"]
    return tree.nodes["num_threshold"], tree.nodes["missing_go_to_left"]


def _trees(part: Any) -> Iterator[Any]:
    """An estimator's trees in the order of training: `Tree`, or of histogram boosting `TreePredictor`."""
    if hasattr(part, "tree_"):
        yield part.tree_
        return
    if hasattr(part, "_predictors"):
        yield from (predictor for iteration in part._predictors for predictor in iteration)
        return
    for name in ("estimators_", "calibrated_classifiers_"):
        for inner in np.ravel(np.array(getattr(part, name, ()), object)):
            yield from _trees(inner)
    for name in ("steps", "estimator", "estimator_", "best_estimator_", "final_estimator_"):
        inner = getattr(part, name, None)
        if name == "steps" and inner:
            yield from _trees(inner[-1][1])
        elif inner is not None and name.endswith("_") and not hasattr(part, "estimators_"):
            yield from _trees(inner)


def _is_histogram(part: Any) -> bool:
    last = part.steps[-1][1] if hasattr(part, "steps") else part
    return hasattr(last, "_predictors")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _groups(node: onnx.NodeProto) -> list[int]:
    """Nodes of each of its trees."""
    return [len(list(nodes)) for _, nodes in groupby(_attributes(node)["nodes_treeids"])]


def _are_these(nodes: list[onnx.NodeProto], trees: list[tuple[Any, Any]]) -> bool:
    """Whether nodes have these trees, by their thresholds."""
    told = [_attributes(node) for node in nodes]
    values = np.concatenate([np.array(each["nodes_values"], np.float32) for each in told])
    inner = np.concatenate([np.array([mode != b"LEAF" for mode in each["nodes_modes"]]) for each in told])
    thresholds = np.concatenate([values for values, _ in trees]) if trees else np.empty(0)
    return [len(values) for values, _ in trees] == [size for node in nodes for size in _groups(node)] and np.allclose(
        values[inner], thresholds[inner].astype(np.float32), rtol=1e-6, equal_nan=True
    )


def _retouch(node: onnx.NodeProto, trees: list[tuple[Any, Any]], *, is_double: bool) -> None:
    told = _attributes(node)
    thresholds = np.concatenate([values for values, _ in trees])
    left = np.concatenate([way for _, way in trees]).astype(bool)
    inner = np.array([mode != b"LEAF" for mode in told["nodes_modes"]])
    told["nodes_missing_value_tracks_true"] = (left & inner).astype(int).tolist()
    if is_double:
        told["nodes_values"] = np.where(inner, thresholds, 0.0)
        for name in _DOUBLES:
            if name in told:
                told[f"{name}_as_tensor"] = numpy_helper.from_array(np.array(told.pop(name), np.float64), name)
        told.pop("nodes_hitrates", None)
    _describe(node, told)


def _let_forest_vote(graph: onnx.GraphProto, node: onnx.NodeProto, forest: Any) -> None:
    """Have a forest's trees add their classes' shares up before the sum is divided, as scikit-learn does: dividing each
    share first decides some ties otherwise, and of two classes ONNX Runtime compares one with a half."""
    told, is_binary = _attributes(node), len(forest.classes_) == 2
    shares = [tree.tree_.value[:, 0, :] for tree in forest.estimators_]
    names = ("class_treeids", "class_nodeids", "class_ids")
    places = np.stack([told[name] for name in names], 1)
    if is_binary:  # the sign of the difference decides, unless all are positive
        votes = np.array([shares[tree][leaf][1] - shares[tree][leaf][0] for tree, leaf, _ in places])
        if len(set(told["class_ids"])) != 1 or votes.min() >= 0:
            return
    else:  # most leaves are of one class
        votes = np.array([shares[tree][leaf][label] for tree, leaf, label in places])
        places, votes = places[votes != 0], votes[votes != 0]
    told |= {name: column.tolist() for name, column in zip(names, places.T, strict=True)}
    told["class_weights_as_tensor"] = numpy_helper.from_array(votes, "class_weights")
    _describe(node, told)
    at, scores = list(graph.node).index(node), node.output[1]
    node.output[1] = "forest_votes"
    after = [helper.make_node("Div", ["forest_votes", "forest_trees"], ["forest_means" if is_binary else scores])]
    constants = {"forest_trees": float(len(shares))}
    if is_binary:
        after += [
            helper.make_node("Add", ["forest_means", "forest_one"], ["forest_doubled"]),
            helper.make_node("Mul", ["forest_doubled", "forest_half"], [scores]),
        ]
        constants |= {"forest_one": 1.0, "forest_half": 0.5}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
    for made in reversed(after):
        graph.node.insert(at + 1, made)


def _describe(node: onnx.NodeProto, told: dict[str, Any]) -> None:
    del node.attribute[:]
    said = {name: value for name, value in told.items() if not isinstance(value, list) or value}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in sorted(said.items()))


def _cast(graph: onnx.GraphProto, node: onnx.NodeProto, number: int, *, widen: bool, narrow: bool) -> None:
    """Round the input to FP32 and back, as scikit-learn's trees do, and widen the scores for what follows."""
    at = list(graph.node).index(node)
    name = f"tree{number}"
    if widen:
        scores = node.output[-1]
        node.output[len(node.output) - 1] = f"{name}_scores"
        graph.node.insert(at + 1, helper.make_node("Cast", [f"{name}_scores"], [scores], to=TensorProto.DOUBLE))
    if narrow:
        given, single, double = node.input[0], f"{name}_single", f"{name}_double"
        node.input[0] = double
        graph.node.insert(at, helper.make_node("Cast", [single], [double], to=TensorProto.DOUBLE))
        graph.node.insert(at, helper.make_node("Cast", [given], [single], to=TensorProto.FLOAT))
