"""Rows by columns, as models take them that were fitted on data frames: one tensor with all columns in order, or a
tensor [rows] or [rows, 1] for each under its name, as MLServer's pandas codec and KServe's clients send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loaders.base import InferError, Tensor
from loaders.datatypes import text_of


def table(inputs: Mapping[str, Tensor], width: int | None, names: Sequence[str] = ()) -> Tensor | list[Tensor]:
    """What came: the only input as it is, or its named columns in order, each of one dimension. `width`: columns of the
    only input; None: it has none, being text.

    Raises:
        InferError: another shape, columns of different lengths, no rows, names that are not the model's.
    """
    if len(inputs) == 1:
        (tensor,) = inputs.values()
        if width is None:
            return tensor.reshape(-1)
        if tensor.ndim != 2:
            raise _wrong(f"expected 2D array, got {tensor.ndim}D array instead")
        if tensor.shape[1] != width:
            raise _wrong(f"X has {tensor.shape[1]} features, but the model is expecting {width} features as input")
        return tensor
    if inputs.keys() != set(names):
        expected = f"the columns {', '.join(names)[:300]}" if names else "one input"
        raise _wrong(f"the model takes {expected}, got {', '.join(inputs)[:300]}")
    columns = [inputs[name] for name in names]
    rows = len(columns[0]) if columns[0].ndim else 0
    for name, column in zip(names, columns, strict=True):
        if column.shape not in ((rows,), (rows, 1)):
            shape = list(column.shape)
            raise _wrong(f"column {name!r} has shape {shape}, expected as many rows as the others, [n] or [n, 1]")
    return [column.reshape(-1) for column in columns]


def numbers(values: Tensor, dtype: type[np.floating] = np.float64) -> Tensor:
    """Values of any datatype as numbers; BYTES are read as decimals.

    Raises:
        InferError: a string is no number.
    """
    try:
        with np.errstate(over="ignore"):
            return (text_of(values) if values.dtype == object else values).astype(dtype, copy=False)
    except ValueError as error:
        raise _wrong(str(error)) from None


def _wrong(message: str) -> InferError:
    return InferError(message, bad_input=True)
