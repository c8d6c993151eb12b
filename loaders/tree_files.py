"""Whether the trees of an XGBoost or LightGBM file are trees. Both libraries follow the node numbers in a file without
looking, so that a damaged one ends the process when it is loaded or asked; one that passes here does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

_OF_EACH_NODE: Final = (
    *("left_children", "right_children", "parents", "split_indices", "split_conditions", "split_type"),
    *("default_left", "loss_changes", "sum_hessian"),
)
_OF_EACH_LEAF: Final = (b"leaf_weight", b"leaf_count")
_OF_EACH_SPLIT: Final = (
    *(b"split_feature", b"split_gain", b"threshold", b"decision_type", b"left_child", b"right_child"),
    *(b"internal_value", b"internal_weight", b"internal_count"),
)
_IN_NUMBERS: Final = b" 0123456789.e+-infa"
_END: Final = b"end of trees\n"
_MAX_CATEGORY: Final = 1 << 24
"""XGBoost's own limit: categories are FP32."""


def check_xgboost(model: Any) -> None:
    """`model`: the file, parsed.

    Raises:
        ValueError: it is not what XGBoost writes.
    """
    try:
        learner = model["learner"]
        sizes = {name: int(learner["learner_model_param"][name]) for name in ("num_feature", "num_class", "num_target")}
        _expect(min(sizes.values()) >= 0, "learner_model_param")
        groups = max(1, sizes["num_class"], sizes["num_target"])
        booster = learner["gradient_booster"]
        if booster["name"] == "gblinear":
            _expect(len(booster["model"]["weights"]) == (sizes["num_feature"] + 1) * groups, "weights")
            return
        forest = booster["gbtree"]["model"] if booster["name"] == "dart" else booster["model"]
        trees = forest["trees"]
        _expect(
            len(trees) == int(forest["gbtree_model_param"]["num_trees"]) == len(forest["tree_info"]), "number of trees"
        )
        _expect(booster["name"] != "dart" or len(booster["weight_drop"]) == len(trees), "weight_drop")
        _expect(all(0 <= group < groups for group in forest["tree_info"]), "tree_info")
        rounds = np.asarray(forest.get("iteration_indptr", (0, len(trees))), np.int64)
        _expect(rounds[0] == 0 and rounds[-1] == len(trees) and bool((np.diff(rounds) >= 0).all()), "iteration_indptr")
        if trees:
            _check_nodes(trees, sizes["num_feature"], sizes["num_target"])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"it lacks parts or has others in their place: {error!r}") from error


def check_lightgbm(content: bytes) -> bytes:
    """`content`: the file. What predictions depend on of it: the rest, training parameters among them, is not checked.

    Raises:
        ValueError: it is not what LightGBM writes.
    """
    head, _, rest = content.partition(b"\ntree_sizes=")
    names = dict(line.partition(b"=")[::2] for line in head.splitlines())
    sizes, _, trees = rest.partition(b"\n\n")
    at = 0
    try:
        features = int(names[b"max_feature_idx"]) + 1
        _expect(features == len(names[b"feature_names"].split(b" ")), "feature_names")
        _expect(int(names[b"num_class"]) > 0 and int(names[b"num_tree_per_iteration"]) > 0, "num_class")
        for index, size in enumerate(map(int, sizes.split())):
            first, _, tree = trees[at : at + size].partition(b"\n")
            _expect(first == b"Tree=%d" % index and size > 0, "tree_sizes")
            _check_tree(dict(line.partition(b"=")[::2] for line in tree.splitlines()), features)
            at += size
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0].decode(errors='replace')}") from error
    _expect(trees[at:].startswith(_END), "end")
    return content[: len(content) - len(trees) + at] + _END


def _check_tree(tree: Mapping[bytes, bytes], features: int) -> None:
    leaves, linear = int(tree[b"num_leaves"]), int(tree.get(b"is_linear", 0))
    _expect(leaves > 0, "num_leaves")
    for name, values in tree.items():
        _expect(not values.translate(None, _IN_NUMBERS), name.decode(errors="replace"))

    def numbers(name: bytes, count: int, kind: type[int] | type[float] = int) -> npt.NDArray[Any]:
        values = [*map(kind, tree[name].split())]
        _expect(len(values) == count, name.decode())
        return np.array(values, kind)

    numbers(b"shrinkage", 1, float)
    for names, count in ((_OF_EACH_LEAF, leaves), (_OF_EACH_SPLIT, leaves - 1)):
        for name in names:
            _expect(len([*map(float, tree[name].split())]) == count or leaves == 1, name.decode())
    numbers(b"leaf_value", leaves, float)
    left, right = numbers(b"left_child", leaves - 1), numbers(b"right_child", leaves - 1)
    below = np.concatenate([left, right])
    _expect(bool(((below >= -leaves) & (below < leaves - 1) & (below != 0)).all()), "children")
    _expect(len(np.unique(below)) == len(below), "children")
    used = numbers(b"split_feature", leaves - 1)
    _expect(bool(((used >= 0) & (used < features)).all()), "split_feature")
    by_category = (numbers(b"decision_type", leaves - 1) & 1).astype(bool)
    if (categories := int(tree[b"num_cat"])) or by_category.any():
        bounds = numbers(b"cat_boundaries", categories + 1)
        _expect(bounds[0] == 0 and bool((np.diff(bounds) >= 0).all()), "cat_boundaries")
        words = numbers(b"cat_threshold", int(bounds[-1]))
        _expect(bool(((words >= 0) & (words < 1 << 32)).all()), "cat_threshold")
        which = numbers(b"threshold", leaves - 1, float)[by_category]
        _expect(bool(((which >= 0) & (which < categories)).all()), "threshold")
    if linear:
        counts = numbers(b"num_features", leaves)
        _expect(bool((counts >= 0).all()), "num_features")
        terms = int(counts.sum())
        used = numbers(b"leaf_features", terms)
        _expect(bool(((used >= 0) & (used < features)).all()), "leaf_features")
        numbers(b"leaf_coeff", terms, float)
        numbers(b"leaf_const", leaves, float)


def _check_nodes(trees: Sequence[Mapping[str, Any]], features: int, targets: int) -> None:
    counts = np.array([len(tree["left_children"]) for tree in trees])
    _expect(bool(counts.all()), "left_children")
    for name in _OF_EACH_NODE:
        _expect(all(len(tree[name]) == count for tree, count in zip(trees, counts, strict=True)), name)
    column = {name: np.concatenate([tree[name] for tree in trees]) for name in _OF_EACH_NODE[:4]}
    _expect(all(values.dtype.kind in "iu" for values in column.values()), "node numbers")
    left, right = column["left_children"], column["right_children"]
    splits = left != -1
    _check_children(counts, left, right, column["parents"], splits)
    _expect(
        bool((column["split_indices"][splits] < features).all()) and column["split_indices"].min() >= 0, "split_indices"
    )
    for index, (tree, count) in enumerate(zip(trees, counts, strict=True)):
        _expect(tree["id"] == index and int(tree["tree_param"]["num_nodes"]) == count, "tree numbers")
        values = int(tree["tree_param"]["size_leaf_vector"]) or 1
        _expect(values in (1, targets) and int(tree["tree_param"]["num_feature"]) == features, "tree_param")
        _expect(len(tree["base_weights"]) == count * values, "base_weights")
        if values > 1:
            leaves = np.asarray(tree["right_children"])[np.asarray(tree["left_children"]) == -1]
            _expect(leaves.min() >= 0 and (leaves.max() + 1) * values <= len(tree["leaf_weights"]), "leaf_weights")
        by_category = np.flatnonzero(tree["split_type"])
        if len(by_category) or len(tree["categories"]):
            nodes, categories = np.asarray(tree["categories_nodes"]), np.asarray(tree["categories"])
            _expect(by_category.tolist() == sorted(nodes.tolist()), "categories_nodes")
            _expect(categories.min(initial=0) >= 0 and categories.max(initial=0) < _MAX_CATEGORY, "categories")
            begins, lengths = (np.asarray(tree[f"categories_{name}"], np.int64) for name in ("segments", "sizes"))
            _expect(len(begins) == len(lengths) == len(nodes), "categories_sizes")
            fits = (begins >= 0) & (lengths >= 0) & (begins + lengths <= len(categories))
            _expect(bool(fits.all()), "categories_segments")


def _check_children(
    counts: Numbers, left: Numbers, right: Numbers, parents: Numbers | None, splits: npt.NDArray[np.bool_]
) -> None:
    """Nodes of all trees in one row, `counts` of each tree: each is the child of one at most, and a root of none."""
    roots = np.cumsum(counts) - counts
    first, count = np.repeat(roots, counts)[splits], np.repeat(counts, counts)[splits]
    for children in (left[splits], right[splits]):
        _expect(bool(((children > 0) & (children < count)).all()), "children")
    below = np.concatenate([first + left[splits], first + right[splits]])
    _expect(int(np.bincount(below, minlength=1).max()) <= 1, "children")
    if parents is not None:
        own = np.flatnonzero(splits) - first
        _expect(bool((parents[below] == np.concatenate([own, own])).all()), "parents")


def _expect(right: bool, part: str) -> None:
    if not right:
        raise ValueError(f"its {part} cannot be right")
