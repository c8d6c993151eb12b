"""Rows that tell whether a scikit-learn estimator was converted well, without its training data: values around every
threshold, rows of fitted arrays and around them, categories and words it knows and does not know, random draws of
several magnitudes, zeros, large numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline

from loaders.base import Tensor

_ROWS: Final = 64
"""Of each kind."""
_MOST_PARTS: Final = 64
"""Of an ensemble that are looked into."""
_MOST_TOLD: Final = 2_048
_MOST_POOL: Final = 4_096

Rng = np.random.Generator
Numbers = npt.NDArray[np.float64]


def numeric(estimator: Any, width: int, rng: Rng) -> list[Numbers]:
    """Groups of rows of numbers."""
    told = [rows for rows in _told(estimator, width, rng) if len(rows) and np.isfinite(rows).all()]
    normal = rng.standard_normal((_ROWS, width))
    groups = [normal, normal * 1e-3, normal * 1e3, normal * 1e6, normal * 1e9]
    groups += [rng.integers(0, 2, (_ROWS, width)).astype(float), rng.integers(0, 17, (_ROWS, width)).astype(float)]
    groups += [np.zeros((1, width)), np.ones((1, width)), np.abs(normal)]
    if told:
        known = np.concatenate(told)
        known = known if len(known) <= _MOST_TOLD else _some(known, _MOST_TOLD, rng)
        spread = known.std(0)
        some = _some(known, 4 * _ROWS, rng)
        mixed = np.stack([rng.choice(column, 4 * _ROWS) for column in known.T], 1)
        groups += [known, mixed, *(some + rng.standard_normal(some.shape) * spread * share for share in (1e-6, 0.1, 2))]
    return groups


def strings(part: Any, columns: Sequence[int], rng: Rng) -> dict[int, list[str]]:
    """By column, strings that an estimator knows."""
    if isinstance(part, Pipeline):
        steps = [step for _, step in part.steps if hasattr(step, "fit")]
        return {n: values for step in reversed(steps[:2]) for n, values in strings(step, columns, rng).items()}
    if isinstance(part, ColumnTransformer):
        indices = part._transformer_to_input_indices
        found: dict[int, list[str]] = {}
        for name, step, _ in part.transformers_:
            if hasattr(step, "fit"):
                found |= strings(step, [columns[n] for n in indices[name]], rng)
        return found
    if hasattr(part, "vocabulary_"):
        return dict.fromkeys(columns, texts(part, rng))
    kept = getattr(part, "categories_", None)
    if isinstance(kept, list) and len(kept) == len(columns):
        return {n: [*map(str, values)] for n, values in zip(columns, kept, strict=True)}
    return {}


def texts(estimator: Any, rng: Rng) -> list[str]:
    """Texts of words that an estimator's vectorizers know and do not know."""
    words = [*{word for vocabulary in _vocabularies(estimator) for word in vocabulary}]
    words = sorted(words, key=lambda word: (len(word), word))[:_MOST_POOL] or ["word"]
    odd = [
        "a",
        "I",
        "x1",
        "don't",
        "Größe",
        "naïve",
        "数据",
        "e-mail",
        "3.14",
        "#tag",
        "_id",
        "ÉTÉ",
        "new\nline",
        "a\x01b",
        "ﬁne",
    ]
    made = ["", " ", "?!", *odd]
    for _ in range(2 * _ROWS):
        some = [*rng.choice(words, rng.integers(1, 12)), *rng.choice(odd, rng.integers(0, 3))]
        made.append(rng.choice([" ", ", ", "  ", ". "]).join(rng.permutation(some)))
    return made + [text.upper() for text in made[:_ROWS]]


def _vocabularies(part: Any, depth: int = 0) -> Iterator[Any]:
    if depth > 4:
        return
    if isinstance(found := getattr(part, "vocabulary_", None), dict):
        yield found
    for name in ("steps", "transformers_", "transformer_list"):
        for entry in getattr(part, name, ()):
            yield from _vocabularies(entry[1], depth + 1)


def _told(part: Any, width: int, rng: Rng, depth: int = 0) -> Iterator[Numbers]:
    """Rows that a fitted estimator tells of, in the space of its input."""
    if depth > 4:
        return
    if isinstance(part, Pipeline):
        steps = [step for _, step in part.steps if hasattr(step, "fit")]
        for number, step in enumerate(steps):
            for rows in _told(step, getattr(step, "n_features_in_", width), rng, depth + 1):
                with suppress(Exception):  # a step that has no way back
                    for before in reversed(steps[:number]):
                        rows = before.inverse_transform(rows)
                    if np.shape(rows)[1:] == (width,):
                        yield np.asarray(rows, np.float64)
        return
    if isinstance(part, ColumnTransformer):
        yield from _of_columns(part, width, rng, depth)
        return
    yield from _around_thresholds(part, width, rng)
    fitted = vars(part) if hasattr(part, "__dict__") else {}
    for array in fitted.values():
        if isinstance(array, np.ndarray) and array.dtype.kind in "fiu" and array.shape[-1:] == (width,) and array.size:
            yield _some(np.asarray(array, np.float64).reshape(-1, width), _ROWS, rng)
    for centre, scale in (("mean_", "scale_"), ("center_", "scale_"), ("data_min_", "data_range_")):
        if all(isinstance(fitted.get(name), np.ndarray) for name in (centre, scale)):
            yield fitted[centre] + fitted[scale] * rng.standard_normal((2 * _ROWS, width))
    for inner in _parts(fitted):
        if getattr(inner, "n_features_in_", None) == width:
            yield from _told(inner, width, rng, depth + 1)


def _of_columns(part: ColumnTransformer, width: int, rng: Rng, depth: int) -> Iterator[Numbers]:
    rows = rng.standard_normal((4 * _ROWS, width))
    for name, step, _ in part.transformers_:
        columns = part._transformer_to_input_indices[name]
        if hasattr(step, "fit") and len(columns):
            for found in _told(step, len(columns), rng, depth + 1):
                rows[:, columns] = _some(found, len(rows), rng)
            if isinstance(kept := getattr(step, "categories_", None), list) and len(kept) == len(columns):
                for column, values in zip(columns, kept, strict=True):
                    if values.dtype.kind in "fiub":
                        rows[:, column] = rng.choice(values.astype(np.float64), len(rows))
    yield rows


def _around_thresholds(part: Any, width: int, rng: Rng) -> Iterator[Numbers]:
    """Of one tree, or of the trees of histogram boosting; a forest's trees come one by one."""
    pools: list[list[Numbers]] = [[] for _ in range(width)]
    if hasattr(part, "tree_"):
        tree = part.tree_
        for column in range(width):
            pools[column].append(tree.threshold[tree.feature == column])
    for predictor in np.ravel(np.array(getattr(part, "_predictors", []), object))[:_MOST_PARTS]:
        nodes = predictor.nodes[predictor.nodes["is_leaf"] == 0]
        for column in range(width):
            pools[column].append(nodes["num_threshold"][nodes["feature_idx"] == column])
    if not any(len(values) for pool in pools for values in pool):
        return
    rows = rng.standard_normal((4 * _ROWS, width))
    for column, pool in enumerate(pools):
        values = np.concatenate(pool)
        values = values[np.isfinite(values)]
        if values.size:
            single = values.astype(np.float32)
            near = [values, np.nextafter(values, -np.inf), np.nextafter(values, np.inf), single.astype(np.float64)]
            near += [np.nextafter(single, np.float32(way)).astype(np.float64) for way in (-np.inf, np.inf)]
            rows[:, column] = rng.choice(np.concatenate(near), len(rows))
    yield rows


def _parts(fitted: dict[str, Any]) -> list[Any]:
    """Estimators within an estimator."""
    found: list[Any] = []
    for name, value in fitted.items():
        if not name.endswith("_"):
            continue
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = value.ravel().tolist()
        if isinstance(value, list | tuple):
            found += [each for each in value if hasattr(each, "predict")][:_MOST_PARTS]
        elif hasattr(value, "predict") or hasattr(value, "transform"):
            found.append(value)
    return found


def _some(rows: Numbers, count: int, rng: Rng) -> Tensor:
    return rows[rng.integers(0, len(rows), count)] if len(rows) != count else rows
