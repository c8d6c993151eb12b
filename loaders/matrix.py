"""Models of numbers in rows: one 2-D numeric input under any name (KServe's clients say `input-0`, MLServer's
`predict`), as XGBoost and LightGBM take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.base import InferError, Tensor


def matrix(inputs: Mapping[str, Tensor], width: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The only input, [rows, `width`] in `dtype`. NaN stays: it means a missing value.

    Raises:
        InferError: several inputs, strings, or another shape.
    """
    if len(inputs) != 1:
        raise InferError(f"the model takes one input, got {len(inputs)}", bad_input=True)
    (tensor,) = inputs.values()
    if tensor.dtype == object:
        raise InferError("the model takes numbers, got BYTES", bad_input=True)
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise InferError(f"the model takes rows of {width} features, got shape {list(tensor.shape)}", bad_input=True)
    if not len(tensor):
        raise InferError("found array with 0 samples while a minimum of 1 is required", bad_input=True)
    return np.ascontiguousarray(tensor, dtype)
