"""What scikit-learn estimators take: arrays of numbers or strings, texts, or data frames if they were fitted on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer

from loaders.base import LoaderError, Tensor, TensorSpec
from loaders.columns import numbers, table
from loaders.datatypes import text_of

_MOST_COLUMNS: Final = 256
"""That a request may have a tensor for each of."""


class Rows:
    """Turns requests into what one estimator takes."""

    def __init__(self, estimator: Any) -> None:
        """
        Raises:
            LoaderError: it needs pandas, which is not installed.
        """
        self.width: int | None = getattr(estimator, "n_features_in_", None)
        """Columns of a row; None: it is one text."""
        self.names: tuple[str, ...] = tuple(map(str, getattr(estimator, "feature_names_in_", ())))
        """Of the data frame's columns, if it was fitted on one."""
        self.texts = frozenset(_texts(estimator, range(self.width))) if self.width is not None else frozenset[int]()
        """Columns of strings."""
        self._pandas = _pandas() if self.names else None
        if self.names and self._pandas is None and (self.texts or _selects_by_name(estimator)):
            raise LoaderError(
                "it was fitted on a data frame, and pandas is not installed: pip install 'densemesh[pandas]'"
            )

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """As ModelMetadata tells it."""
        if self.width is None:
            return (TensorSpec("input-0", "BYTES", (-1,)),)
        if not 0 < len(self.names) <= _MOST_COLUMNS:
            datatype = "BYTES" if self.texts else "FP64"
            return (TensorSpec("input-0", datatype, (-1, self.width)),)
        kinds = ["BYTES" if n in self.texts else "FP64" for n in range(len(self.names))]
        return tuple(TensorSpec(name, kind, (-1, 1)) for name, kind in zip(self.names, kinds, strict=True))

    def of(self, inputs: Mapping[str, Tensor]) -> Any:
        """
        Raises:
            InferError: `bad_input`, see `table`; or a string that is no number.
            UnicodeDecodeError: a string is not UTF-8.
        """
        rows = table(inputs, self.width, self.names)
        if isinstance(rows, np.ndarray):
            if self._pandas is None:
                return text_of(rows) if rows.dtype == object else rows.astype(np.float64, copy=False)
            if not self.texts:
                return self._pandas.DataFrame(numbers(rows), columns=self.names, copy=False)
            rows = list(rows.T)
        columns = {
            name: text_of(column) if n in self.texts else numbers(column)
            for n, (name, column) in enumerate(zip(self.names, rows, strict=True))
        }
        return np.stack(list(columns.values()), 1) if self._pandas is None else self._pandas.DataFrame(columns)


@cache
def _pandas() -> ModuleType | None:
    try:
        return import_module("pandas")
    except ImportError:
        return None


def _selects_by_name(estimator: Any) -> bool:
    first = estimator.steps[0][1] if isinstance(estimator, Pipeline) else estimator
    return isinstance(first, ColumnTransformer)


def _texts(part: Any, columns: Sequence[int]) -> Iterable[int]:
    """Which of its input's columns a part of an estimator takes for strings."""
    if isinstance(part, Pipeline):
        steps = [step for _, step in part.steps if not isinstance(step, FunctionTransformer) and hasattr(step, "fit")]
        return _texts(steps[0], columns) if steps else ()
    if isinstance(part, ColumnTransformer):
        indices = part._transformer_to_input_indices
        return {
            found
            for name, step, _ in part.transformers_
            if hasattr(step, "fit")
            for found in _texts(step, [columns[n] for n in indices[name]])
        }
    if isinstance(part, FeatureUnion):
        return {found for _, step in part.transformer_list for found in _texts(step, columns)}
    if isinstance(part, CountVectorizer | HashingVectorizer):
        return columns
    kept = getattr(part, "categories_", None)  # encoders
    if isinstance(kept, list) and len(kept) == len(columns):
        return {column for column, values in zip(columns, kept, strict=True) if values.dtype.kind in "OUS"}
    filled = getattr(part, "statistics_", None)  # SimpleImputer
    if isinstance(filled, np.ndarray) and filled.shape == (len(columns),):
        return {column for column, value in zip(columns, filled, strict=True) if isinstance(value, str)}
    return ()
