"""What an ONNX model will weigh in memory, and its architecture, told from its file without parsing the tensors (or
needing `onnx`).

The protobuf is walked by field lengths: a 100 MB model takes 0.3 ms, 5000 nodes 2.4 ms.
An ONNX Runtime 1.31 session as `loaders.onnx` configures it takes 85 kB, 3 kB a node, 1.2 kB and its bytes as stored
for a weight (prepacked ones replace the stored ones), weights of 16 bits twice (widened to FP32 on a CPU) and 4.5 times
the attributes of tree ensembles: within 20 % of trimmed RSS (`bench.formats --sizes`).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loaders.artifacts import reading
from loaders.base import LoaderError

SESSION_BYTES: Final = 85_000
NODE_BYTES: Final = 3_000
_WEIGHT_BYTES: Final = 1_200
_TREE_FACTOR: Final = 4.5
_SMALL_NODE: Final = 1024

# Field numbers of onnx.proto: ModelProto, GraphProto, NodeProto, TensorProto, StringStringEntryProto.
GRAPH: Final = 7
NODE, INITIALIZER = 1, 5
OP_TYPE: Final = 4
DIMS, DATA_TYPE, NAME, EXTERNAL_DATA = 1, 2, 8, 13
_KEY, _VALUE = 1, 2
_SIXTEEN_BITS: Final = (10, 16)


@dataclass(slots=True)
class _Weight:
    stored: float = 0
    nodes: int = 0
    initializers: int = 0


def weigh(path: Path, *, widened: bool = True) -> int:
    """Bytes of the loaded model; `widened` if weights of 16 bits will be FP32 in memory.

    Raises:
        LoaderError: the file or one of its external data files is missing, or this is no ONNX model.
    """
    weight = _Weight()
    with _graphs(path) as (data, graphs):
        for start, end in graphs:
            _weigh_graph(data, start, end, path, 2 if widened else 1, weight)
    objects = SESSION_BYTES + NODE_BYTES * weight.nodes + _WEIGHT_BYTES * weight.initializers
    return objects + round(weight.stored)


def architecture(path: Path) -> str:
    """A digest of everything but the values of weights and trees: equal for models that differ in those alone.

    Raises:
        LoaderError: see `weigh`.
    """
    digest = hashlib.sha256()
    with _graphs(path) as (data, graphs):
        for start, end in graphs:
            for number, begin, stop in fields(data, start, end):
                if number == NODE:
                    large = stop - begin > _SMALL_NODE
                    digest.update(_op_type(data, begin, stop) if large else data[begin:stop])
                elif number == INITIALIZER:
                    for part, *span in fields(data, begin, stop):
                        if part in (DIMS, DATA_TYPE, NAME):
                            digest.update(data[slice(*span)])
    return f"onnx {digest.hexdigest()}"


@contextmanager
def _graphs(path: Path) -> Iterator[tuple[mmap.mmap, list[list[int]]]]:
    """The file, and where its graph is (one, but a protobuf may have it in parts).

    Raises:
        LoaderError: the file, or one that is read inside, is missing or no ONNX model.
    """
    try:
        with (
            reading(path),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            graphs = [span for number, *span in fields(data, 0, len(data)) if number == GRAPH]
            if not graphs:
                raise ValueError("it has no graph")
            yield data, graphs
    except (ValueError, IndexError) as error:  # mmap refuses an empty file with ValueError
        raise LoaderError(f"{path.name} is not an ONNX model: {error}") from error


def _weigh_graph(data: mmap.mmap, start: int, end: int, path: Path, widening: int, weight: _Weight) -> None:
    for number, begin, stop in fields(data, start, end):
        if number == NODE:
            weight.nodes += 1
            is_tree = stop - begin > _SMALL_NODE and _op_type(data, begin, stop).startswith(b"TreeEnsemble")
            weight.stored += (stop - begin) * (_TREE_FACTOR if is_tree else 1)
        elif number == INITIALIZER:
            weight.initializers += 1
            bytes_, factor = stop - begin, 1
            external: dict[bytes, bytes] = {}
            for part, *span in fields(data, begin, stop):
                if part == DATA_TYPE and varint(data, span[0])[0] in _SIXTEEN_BITS:
                    factor = widening
                elif part == EXTERNAL_DATA:
                    entry = {name: data[a:b] for name, a, b in fields(data, *span)}
                    external[entry.get(_KEY, b"")] = entry.get(_VALUE, b"")
            if external:
                bytes_ += _external_bytes(path.parent, external)
            weight.stored += bytes_ * factor


def _op_type(data: mmap.mmap, start: int, end: int) -> bytes:
    return next((data[begin:stop] for number, begin, stop in fields(data, start, end) if number == OP_TYPE), b"")


def _external_bytes(folder: Path, external: dict[bytes, bytes]) -> int:
    """Length of a tensor kept in another file; that the file lies inside `folder` is ONNX Runtime's check."""
    size = (folder / external.get(b"location", b"").decode()).stat().st_size
    return min(int(external.get(b"length") or size), size)


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number and span of the value, for each field of the message at [start, end)."""
    while start < end:
        tag, start = varint(data, start)
        match tag & 7:
            case 0:
                stop = varint(data, start)[1]
            case 1:
                stop = start + 8
            case 2:
                size, start = varint(data, start)
                stop = start + size
            case 5:
                stop = start + 4
            case kind:
                raise ValueError(f"field of unknown kind {kind}")
        if stop > end:
            raise ValueError("it is cut short")
        yield tag >> 3, start, stop
        start = stop


def varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
