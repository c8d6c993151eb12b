"""Weights as numpy arrays: over bytes that lie somewhere, and as bytes to be written."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from loaders.base import Tensor
from loaders.datatypes import DTYPES
from loaders.memory.layout import Layout

Run = npt.NDArray[np.uint8]
"""Bytes in a row, one-dimensional."""

WEIGHT_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{name: dtype for name, dtype in DTYPES.items() if name != "BYTES"},
    "FP8_E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "FP8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "FP8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "FP8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""The names in `layout.ITEM_BYTES` as numpy dtypes."""

_NAMES: Final = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}


def weight_datatype(dtype: np.dtype[Any]) -> str:
    """The name of a numpy dtype, in either byte order.

    Raises:
        ValueError: weights cannot have it (strings, objects, complex numbers, integers of 4 bits).
    """
    try:
        return _NAMES[dtype.newbyteorder("<") if dtype.kind in "uif" else dtype]
    except KeyError:
        raise ValueError(f"weights cannot be numpy {dtype}: expected one of {', '.join(WEIGHT_DTYPES)}") from None


def raw_bytes(tensor: Tensor) -> Run:
    """A tensor's bytes as they are stored: little-endian, in C order; a view if it is so already.

    Raises:
        ValueError: weights cannot have its dtype.
    """
    return np.ascontiguousarray(tensor, WEIGHT_DTYPES[weight_datatype(tensor.dtype)]).reshape(-1).view(np.uint8)


def views(layout: Layout, run: Run) -> dict[str, Tensor]:
    """The tensors by name over the bytes of a run, in order; nothing is copied.

    Raises:
        ValueError: the run is shorter than the layout.
    """
    if len(run) < layout.size_bytes:
        raise ValueError(f"the layout takes {layout.size_bytes} bytes, the run has {len(run)}")
    return {
        place.name: run[place.offset : place.end].view(WEIGHT_DTYPES[place.datatype]).reshape(place.shape)
        for place in layout.places
    }
