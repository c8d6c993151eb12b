"""A `.safetensors` model without its weights, for a store that moves those between memory tiers.

The file says where tensors lie in it; a store wants them where `loaders.memory.layout` has them, aligned. So they are
read piece by piece into their places. The file has no checksums of its own: its tensors' digests, which tell the store
what tenants have in common, are computed once per file and process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from cachetools import LRUCache, cached

from loaders.artifacts import reading
from loaders.base import LoaderError, Signature, Tensor
from loaders.memory.layout import Layout, laid_out
from loaders.memory.slots import Slot
from loaders.memory.weights_index import Contents
from loaders.skeletons.base import Views
from loaders.skeletons.family import Family, families
from loaders.skeletons.header import Header
from loaders.torch_tensors import TORCH_DTYPES

_VIEWS: Final = "torch views"
_PIECE_BYTES: Final = 8 << 20

Run = Callable[[Family, Views, Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]


class Apart:
    """What is left of a model; see `loaders.memory.tiered.Weightless`."""

    def __init__(self, path: Path, header: Header, family: Family, signature: Signature, run: Run) -> None:
        """
        Raises:
            LoaderError: the file cannot be opened.
        """
        self.signature = signature
        self.layout = placed(header)
        self._path = path
        self._header = header
        self._family = family
        self._run = run
        with reading(path):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @cached_property
    def contents(self) -> Contents:
        """
        Raises:
            LoaderError: the file cannot be read.
        """
        status = os.fstat(self._file)
        identity = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
        return Contents("", self.layout, _digests(identity, self._digest_all))

    def verify(self) -> None:
        """There is nothing to compare with; the header was checked when the file was opened."""

    def read_into(self, target: memoryview, offset: int) -> None:
        places, end = self.layout.places, offset + len(target)
        first = max(bisect_right(places, offset, key=lambda place: place.offset) - 1, 0)
        for place, there in zip(places[first:], self._header.layout.places[first:], strict=True):
            if place.offset >= end:
                break
            start, until = max(offset, place.offset), min(end, place.end)
            if start < until:
                self._read(target[start - offset : until - offset], there.offset + start - place.offset)

    def run(self, slot: Slot, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """
        Raises:
            InferError: see `SafetensorsModel.infer`.
        """
        views = slot.prepared.get(_VIEWS)
        if views is None:
            views = slot.prepared[_VIEWS] = as_torch(slot.layout, slot.views)
        return self._run(self._family, views, inputs, outputs)

    def let_go(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        self.let_go()
        families.drop(self._family)

    def _digest_all(self) -> tuple[str, ...]:
        piece = bytearray(min(_PIECE_BYTES, max((place.size_bytes for place in self.layout.places), default=0)))
        return tuple(self._digest(place.offset, place.size_bytes, piece) for place in self._header.layout.places)

    def _digest(self, offset: int, size_bytes: int, piece: bytearray) -> str:
        digest = hashlib.sha256()
        for done in range(0, size_bytes, _PIECE_BYTES):
            part = memoryview(piece)[: min(_PIECE_BYTES, size_bytes - done)]
            self._read(part, offset + done)
            digest.update(part)
        return digest.hexdigest()

    def _read(self, target: memoryview, offset: int) -> None:
        """From an offset in the file's data."""
        with reading(self._path):
            while target:
                read = os.preadv(self._file, [target], self._header.data_start + offset)
                if not read:
                    raise LoaderError(f"{self._path.name} has become shorter while it was read", retryable=True)
                target, offset = target[read:], offset + read


def placed(header: Header) -> Layout:
    """Where a store has the tensors."""
    return laid_out((place.name, place.datatype, place.shape) for place in header.layout.places)


def as_torch(layout: Layout, views: Mapping[str, Any]) -> Views:
    """A slot's views as torch tensors over the same bytes. Those of host memory are numpy's, and read-only, which torch
    does not know; skeletons are functions, and write to no weight."""
    return {place.name: _as_torch(views[place.name], place.datatype) for place in layout.places}


def _as_torch(view: Any, datatype: str) -> torch.Tensor:
    if isinstance(view, torch.Tensor):
        return view
    if not view.nbytes:
        return torch.empty(view.shape, dtype=TORCH_DTYPES[datatype])
    raw = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
    raw.keeps = view
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[datatype]).reshape(view.shape)


@cached(LRUCache(1 << 16), key=lambda identity, compute: identity)
def _digests(identity: tuple[int, int, int, int], compute: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    return compute()
