"""Weights as torch tensors over bytes that lie somewhere: a mapped file, or rows of memory."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Final

import torch

from loaders.memory.layout import ITEM_BYTES, Layout, Place
from loaders.torch_tensors import TORCH_DTYPES

ALIGNMENT: Final = 8
"""Bytes; where runs must begin, and what they must be a multiple of."""


def views(layout: Layout, run: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors by name over the bytes of a run; only those at odd offsets, which files of other writers than
    safetensors' own may have, are copied."""
    typed = _typed(layout, run)
    return {
        place.name: _strided(place, typed[place.datatype], place.shape, _strides(place))
        if place.offset % ITEM_BYTES[place.datatype] == 0
        else run[place.offset : place.end].clone().view(TORCH_DTYPES[place.datatype]).reshape(place.shape)
        for place in layout.places
    }


def stacked(layout: Layout, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of several models, whose bytes are rows [models, bytes]: each with one more dimension, the first.
    Offsets must be multiples of their items."""
    typed, count = _typed(layout, rows), len(rows)
    return {
        place.name: _strided(
            place, run := typed[place.datatype], (count, *place.shape), (run.stride(0), *_strides(place))
        )
        for place in layout.places
    }


def _typed(layout: Layout, run: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bytes as each of the layout's datatypes."""
    return {datatype: run.view(TORCH_DTYPES[datatype]) for datatype in {place.datatype for place in layout.places}}


def _strided(place: Place, run: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return run.as_strided(shape, strides, run.storage_offset() + place.offset // ITEM_BYTES[place.datatype])


def is_even(layout: Layout) -> bool:
    """Whether all tensors begin at multiples of their items."""
    return all(place.offset % ITEM_BYTES[place.datatype] == 0 for place in layout.places)


@lru_cache(maxsize=100_000)
def _strides(place: Place) -> tuple[int, ...]:
    return tuple(accumulate(place.shape[:0:-1], int.__mul__, initial=1))[::-1] if place.shape else ()
