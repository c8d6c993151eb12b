"""The V2 datatypes and their numpy forms.

Source: Open Inference Protocol, "Tensor Data Types"; BF16 as Triton has it (raw only, 2 bytes).
BYTES tensors are numpy arrays of dtype object whose elements are `bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np

from loaders.base import Tensor

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}

_NAMES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The V2 name of a numpy dtype; strings (`U`, `S`, object) are BYTES.

    Raises:
        ValueError: V2 has no such datatype (complex, datetime, ...).
    """
    if dtype.kind in "USO":
        return "BYTES"
    try:
        return _NAMES[dtype.newbyteorder("<") if dtype.kind in "uif" else dtype]
    except KeyError:
        raise ValueError(f"V2 has no datatype for numpy {dtype}") from None


def text_of(array: Tensor) -> Tensor:
    """A BYTES tensor as an object array of `str`, same shape, for frameworks whose strings are text.

    Raises:
        UnicodeDecodeError: an element is not UTF-8.
    """
    return _mapped(array, lambda value: value.decode() if isinstance(value, bytes) else str(value))


def bytes_of(array: Tensor) -> Tensor:
    """Strings of any numpy kind (`U`, `S`, object) as a BYTES tensor: an object array of `bytes`, same shape."""
    return _mapped(array, lambda value: value if isinstance(value, bytes) else str(value).encode())


def _mapped(array: Tensor, convert: Callable[[Any], object]) -> Tensor:
    mapped = np.empty(array.shape, dtype=object)
    mapped.reshape(-1)[:] = [convert(value) for value in array.flat]
    return mapped
