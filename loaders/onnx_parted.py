"""Large ONNX models opened without parsing their weights, for a first answer that does not wait for that.

ONNX Runtime takes 2.6 ms a megabyte to open a model: it copies each weight twice on the way, and then packs matrices
for its kernels. Here the protobuf is walked by field lengths, and the graph that is parsed says only where its large
weights are in the file, as if that were external data. If nobody writes the file, ONNX Runtime maps them (100 MB:
2 ms); else they are read into memory that is shared with the session (30 ms, or 200 if a virtual machine touches that
memory for the first time). Runs of a batch take up to twice as long; `Parted.packed` brings the packing back.

Floats in a protobuf begin at any byte. The matrices of products are read by kernels that are made for that; of other
weights only those are mapped that begin at a multiple of their size, because compilers may rely on it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.base import Tensor
from loaders.onnx_file import DATA_TYPE, DIMS, EXTERNAL_DATA, GRAPH, INITIALIZER, NAME, NODE, OP_TYPE, fields, varint
from loaders.onnx_session import ort, session_options

LARGE_BYTES: Final = 8 << 20
"""Files from this size on are opened so."""
_LEAST_BYTES: Final = 64 << 10
"""Smaller weights are parsed with the graph."""
_RAW_DATA, _DATA_LOCATION = 9, 14
_INPUT: Final = 11
_KEY, _VALUE, _INPUT_NAME, _INPUTS = 1, 2, 1, 1
_PRODUCTS: Final = (b"MatMul", b"Gemm")
_EXTERNAL: Final = 1
_DTYPES: Final = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 11: "<f8"}
"""By onnx.TensorProto.DataType. Not 16 bits: a CPU gets them widened, and would hold both."""


@dataclass(frozen=True, slots=True)
class Parted:
    """A model as its graph without large weights, and those of them that are not mapped."""

    folder: Path
    graph: bytes
    weights: dict[str, Any]
    """`OrtValue`s of memory that is theirs."""

    def open(self) -> Any:
        """A session that reads the weights where they are, by their addresses: this must stay as long as it does."""
        options = self._options()
        options.add_session_config_entry("session.disable_prepacking", "1")
        for name, value in self.weights.items():
            options.add_initializer(name, value)
        return self._session(options)

    def packed(self) -> Any:
        """A session with copies of the weights, packed as ONNX Runtime likes them."""
        options = self._options()
        options.add_external_initializers(list(self.weights), list(self.weights.values()))
        return self._session(options)

    def _options(self) -> Any:
        options = session_options()
        # Where optimisations that compute with weights read them.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        return options

    def _session(self, options: Any) -> Any:
        return ort.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def part(path: Path, *, is_fixed: bool) -> Parted | None:
    """None: the file is small, or has no large weights that can be parted from it. `is_fixed`: it is never written.

    Raises:
        OSError: it cannot be read.
        ValueError, IndexError: it is no ONNX model.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < LARGE_BYTES:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            spans, matrices = _large(data)
            if not spans:
                return None
            graph = _without(data, path.name, set(spans))
        weights = {
            name: ort.OrtValue.ortvalue_from_numpy(_read(file.fileno(), start, dtype, shape))
            for name, (start, dtype, shape) in spans.items()
            if not is_fixed or (start % dtype.itemsize and name not in matrices)
        }
    return Parted(path.parent, graph, weights)


_Span = tuple[int, np.dtype[Any], tuple[int, ...]]
"""Where a weight's bytes begin, and what they are."""


def _large(data: mmap.mmap) -> tuple[dict[str, _Span], set[str]]:
    """The weights that can be parted, by name; the names of those that are second in products and nothing else."""
    found: dict[str, _Span] = {}
    matrices, others = set[str](), set[str]()
    names: Counter[str] = Counter()
    for number, start, end in fields(data, 0, len(data)):
        if number != GRAPH:
            continue
        for part_, begin, stop in fields(data, start, end):
            if part_ == _INPUT:  # a weight that is an input too may be given by the client
                names.update(data[a:b].decode() for number, a, b in fields(data, begin, stop) if number == _INPUT_NAME)
            elif part_ == NODE:
                own = list(fields(data, begin, stop))
                used = [data[a:b].decode() for number, a, b in own if number == _INPUTS]
                is_product = any(number == OP_TYPE and data[a:b] in _PRODUCTS for number, a, b in own)
                matrices.update(used[1:2] if is_product else ())
                others.update(used[:1] + used[2:] if is_product else used)
            elif part_ == INITIALIZER:
                name, span = _weight(data, begin, stop)
                names[name] += 1
                if span is not None:
                    found[name] = span
    return {name: span for name, span in found.items() if names[name] == 1}, matrices - others


def _weight(data: mmap.mmap, start: int, end: int) -> tuple[str, _Span | None]:
    name, kind, begin, size_bytes, dims = "", 0, 0, 0, list[int]()
    is_external = False
    for number, a, b in fields(data, start, end):
        if number == NAME:
            name = data[a:b].decode()
        elif number == _RAW_DATA:
            begin, size_bytes = a, b - a
        elif number == DATA_TYPE:
            kind = varint(data, a)[0]
        elif number == DIMS:  # packed, or one at a time: either way numbers on end
            while a < b:
                size, a = varint(data, a)
                dims.append(size)
        is_external = is_external or number == EXTERNAL_DATA
    if is_external or size_bytes < _LEAST_BYTES or kind not in _DTYPES:
        return name, None
    dtype = np.dtype(_DTYPES[kind])
    fits = size_bytes == math.prod(dims) * dtype.itemsize
    return name, (begin, dtype, tuple(dims)) if fits else None


def _read(file: int, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
    array: Tensor = np.empty(shape, dtype)
    rest = memoryview(array.data).cast("B")
    while rest:
        count = os.preadv(file, [rest], start)
        if not count:
            raise ValueError("it is cut short")
        rest, start = rest[count:], start + count
    return array


def _without(data: mmap.mmap, location: str, names: set[str]) -> bytes:
    """The model, with the place of the named weights instead of their bytes."""

    def model(number: int, start: int, end: int) -> bytes | None:
        return _field(GRAPH, _rewritten(data, start, end, graph)) if number == GRAPH else None

    def graph(number: int, start: int, end: int) -> bytes | None:
        is_one = number == INITIALIZER and end - start > _LEAST_BYTES and _weight(data, start, end)[0] in names
        return _field(INITIALIZER, _rewritten(data, start, end, tensor)) if is_one else None

    def tensor(number: int, start: int, end: int) -> bytes | None:
        if number == _DATA_LOCATION:
            return b""
        if number != _RAW_DATA:
            return None
        told = {"location": location, "offset": str(start), "length": str(end - start)}
        entries = [_field(_KEY, key.encode()) + _field(_VALUE, value.encode()) for key, value in told.items()]
        external = b"".join(_field(EXTERNAL_DATA, entry) for entry in entries)
        return external + _varint(_DATA_LOCATION << 3) + _varint(_EXTERNAL)

    return _rewritten(data, 0, len(data), model)


def _rewritten(data: mmap.mmap, start: int, end: int, change: Callable[[int, int, int], bytes | None]) -> bytes:
    """A message with what `change` gives for its fields; None: as it is."""
    made: list[bytes] = []
    for number, begin, stop in fields(data, start, end):
        changed = change(number, begin, stop)
        made.append(data[start:stop] if changed is None else changed)
        start = stop
    return b"".join(made)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
