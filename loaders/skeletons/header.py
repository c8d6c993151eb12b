"""The header of a `.safetensors` file: which tensors it holds and where; checked before anything is made of it.

Source: safetensors, "Format": 8 bytes with the length of the header, little-endian; JSON of
`{name: {"dtype", "shape", "data_offsets"}}`, offsets from its end; `__metadata__` is a map of texts; no holes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeGuard

from loaders.artifacts import reading
from loaders.base import LoaderError
from loaders.memory.layout import ITEM_BYTES, MAX_NAME_CHARS, MAX_RANK, MAX_TENSORS, Layout, Place

MAX_HEADER_BYTES: Final = 32 << 20

_DTYPES: Final = {
    "BOOL": "BOOL",
    **{f"U{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{"F16": "FP16", "BF16": "BF16", "F32": "FP32", "F64": "FP64", "F8_E4M3": "FP8_E4M3FN", "F8_E5M2": "FP8_E5M2"},
}
"""Their names of datatypes, and ours (`layout.ITEM_BYTES`)."""


@dataclass(frozen=True)
class Header:
    """What a file holds. Files whose tensors agree in names, datatypes, shapes and order have the same layout."""

    layout: Layout
    """Offsets from `data_start`."""
    data_start: int
    data_bytes: int


def read_header(path: Path) -> Header:
    """
    Raises:
        LoaderError: it cannot be read, or is not what the format allows: the message names the file, the field and what
            was expected.
    """
    with reading(path), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
            most = f"at most {MAX_HEADER_BYTES} bytes of header" if length > MAX_HEADER_BYTES else "its header"
            raise LoaderError(f"{path.name} is no safetensors file, or truncated: expected {most}, told are {length}")
        head = file.read(length)
    try:
        layout = _layout(head)
    except (ValueError, RecursionError) as error:
        raise LoaderError(f"{path.name}: its header is damaged: {str(error)[:500]}") from None
    data_bytes = layout.places[-1].end if layout.places else 0
    if 8 + length + data_bytes != size_bytes:
        raise LoaderError(
            f"{path.name} has {size_bytes - 8 - length} bytes of tensors: expected {data_bytes} by its header"
        )
    return Header(layout, 8 + length, data_bytes)


@lru_cache(maxsize=256)
def _layout(head: bytes) -> Layout:
    """Fine-tunes of one network have the same header: it is parsed once for all of them."""
    told = json.loads(head, object_pairs_hook=_once)
    if not isinstance(told, dict):
        raise ValueError("expected a JSON object")
    told.pop("__metadata__", None)
    if len(told) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS} tensors, not {len(told)}")
    places = sorted((_place(name, entry) for name, entry in told.items()), key=lambda place: (place.offset, place.end))
    end = 0
    for place in places:
        if place.offset != end:
            raise ValueError(f"data_offsets of {place.name!r}: expected to begin at {end}, not {place.offset}")
        end = place.end
    return Layout(tuple(places))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        raise ValueError("a name comes twice")
    return told


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise ValueError(f"{name[:64]!r}: expected a tensor with a name of at most {MAX_NAME_CHARS} characters")
    datatype, shape, offsets = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    if datatype is None:
        raise ValueError(
            f"dtype of {name!r}: expected one of {', '.join(_DTYPES)}, not {str(entry.get('dtype'))[:64]!r}"
        )
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"shape of {name!r}: expected at most {MAX_RANK} sizes of at least 0")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets of {name!r}: expected begin and end")
    size_bytes = math.prod(shape) * ITEM_BYTES[datatype]
    if offsets[1] - offsets[0] != size_bytes:
        raise ValueError(f"data_offsets of {name!r}: expected {size_bytes} bytes, not {offsets[1] - offsets[0]}")
    return Place(name, datatype, tuple(shape), offsets[0], size_bytes)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
