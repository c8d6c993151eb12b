"""Where each tensor of a model lies in one flat run of bytes: on disk, in host memory and on a device alike.

Tensors stand in the order in which they are run. One of 64 KiB or more begins at a multiple of 4096 bytes (a page: it
can be mapped, or read around the page cache), a smaller one at a multiple of 64 (a cache line), the first of several
small ones at a multiple of 512 (what a CUDA allocation is aligned to). So where they lie follows from names,
datatypes and shapes alone, never from contents: all models of one architecture have the same layout, and what was
prepared for one of them at some address (views, a CUDA graph) is right for any other that is copied there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

LARGE_BYTES: Final = 64 << 10
LARGE_ALIGNMENT: Final = 4096
RUN_ALIGNMENT: Final = 512
SMALL_ALIGNMENT: Final = 64

MAX_TENSORS: Final = 100_000
MAX_NAME_CHARS: Final = 1024
MAX_RANK: Final = 32
MAX_BYTES: Final = 1 << 44

ITEM_BYTES: Final = {
    **dict.fromkeys(("BOOL", "UINT8", "INT8", "FP8_E4M3FN", "FP8_E4M3FNUZ", "FP8_E5M2", "FP8_E5M2FNUZ"), 1),
    **dict.fromkeys(("UINT16", "INT16", "FP16", "BF16"), 2),
    **dict.fromkeys(("UINT32", "INT32", "FP32"), 4),
    **dict.fromkeys(("UINT64", "INT64", "FP64"), 8),
}
"""What weights can be: V2's datatypes but BYTES, and the four of 8 bits that ONNX has; bytes of one element."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor and its bytes, from the start of the run."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes

    @property
    def is_large(self) -> bool:
        return self.size_bytes >= LARGE_BYTES


@dataclass(frozen=True)
class Layout:
    """All places of a model, in the order of execution."""

    places: tuple[Place, ...]

    @cached_property
    def size_bytes(self) -> int:
        """Of the whole run, a multiple of 512."""
        return aligned(max((place.end for place in self.places), default=0), RUN_ALIGNMENT)

    @cached_property
    def key(self) -> str:
        """The same for two models if, and only if, their layouts are."""
        told = [[place.name, place.datatype, place.shape] for place in self.places]
        return hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()


class Placing:
    """Lays tensors out one after another."""

    def __init__(self) -> None:
        self._end = 0
        self._after_large = True

    def next(self, name: str, datatype: str, shape: Sequence[int]) -> Place:
        """
        Raises:
            ValueError: naming the field and what was expected.
        """
        if not 0 < len(name) <= MAX_NAME_CHARS:
            raise ValueError(f"name: expected 1 to {MAX_NAME_CHARS} characters, not {len(name)}")
        if datatype not in ITEM_BYTES:
            raise ValueError(f"datatype of {name!r}: expected one of {', '.join(ITEM_BYTES)}, not {datatype!r}")
        if len(shape) > MAX_RANK or any(size < 0 for size in shape):
            raise ValueError(f"shape of {name!r}: expected at most {MAX_RANK} sizes of at least 0, not {list(shape)}")
        size_bytes = math.prod(shape) * ITEM_BYTES[datatype]
        if size_bytes > MAX_BYTES:
            raise ValueError(f"shape of {name!r}: expected at most {MAX_BYTES} bytes, not {size_bytes}")
        is_large = size_bytes >= LARGE_BYTES
        alignment = LARGE_ALIGNMENT if is_large else RUN_ALIGNMENT if self._after_large else SMALL_ALIGNMENT
        offset = aligned(self._end, alignment)
        self._end, self._after_large = offset + size_bytes, is_large
        return Place(name, datatype, tuple(shape), offset, size_bytes)


def laid_out(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Layout:
    """The layout of tensors told as name, datatype and shape.

    Raises:
        ValueError: naming the field and what was expected; two tensors of one name among them.
    """
    placing = Placing()
    places = tuple(placing.next(*tensor) for tensor in tensors)
    if len({place.name for place in places}) < len(places):
        raise ValueError("name: expected to be unique in a model")
    return Layout(places)


def aligned(offset: int, to: int) -> int:
    """The next multiple of `to`, a power of two."""
    return (offset + to - 1) & -to
