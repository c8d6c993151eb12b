"""The index of a weights file: what it holds, as JSON and back, with limits on everything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from loaders.base import LoaderError
from loaders.memory.layout import MAX_TENSORS, Layout, laid_out

MAX_INDEX_BYTES: Final = 32 << 20
MAX_ARCHITECTURE_CHARS: Final = 256

_KEYS: Final = {"name": str, "datatype": str, "shape": list, "offset": int, "length": int}


class CorruptWeights(LoaderError):
    """The file is not what was written; retryable, because it is to be dropped and made again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


@dataclass(frozen=True)
class Contents:
    """What the index says."""

    architecture: str
    """Of the maker's choice: models that share a skeleton have the same; may be empty."""
    layout: Layout
    digests: tuple[str, ...]
    """SHA-256 in hexadecimal, one per place."""


def told(contents: Contents) -> bytes:
    """The index as it stands in the file."""
    tensors = [
        {
            "name": place.name,
            "datatype": place.datatype,
            "shape": place.shape,
            "offset": place.offset,
            "length": place.size_bytes,
        }
        for place in contents.layout.places
    ]
    head = json.dumps({"architecture": contents.architecture, "tensors": tensors}, separators=(",", ":"))
    return "\n".join((head, *contents.digests)).encode()


def parsed(index: bytes) -> Contents:
    """What an index from outside says.

    Raises:
        ValueError: naming the field and what was expected.
    """
    head, _, digests = index.partition(b"\n")
    architecture, layout = _head(head)
    told = tuple(digests.decode("ascii", "replace").split("\n")) if digests else ()
    if len(told) != len(layout.places) or any(len(digest) != 64 for digest in told):
        raise ValueError(f"digests: expected {len(layout.places)} of 64 hexadecimal digits")
    return Contents(architecture, layout, told)


@lru_cache(maxsize=64)
def _head(head: bytes) -> tuple[str, Layout]:
    """The part that models of one architecture have in common: it is parsed and kept once for all of them."""
    try:
        found = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"index: expected JSON: {error}") from error
    if not isinstance(found, dict) or found.keys() != {"architecture", "tensors"}:
        raise ValueError("index: expected an object of architecture and tensors")
    architecture, tensors = found["architecture"], found["tensors"]
    if not isinstance(architecture, str) or len(architecture) > MAX_ARCHITECTURE_CHARS:
        raise ValueError(f"architecture: expected at most {MAX_ARCHITECTURE_CHARS} characters")
    if not isinstance(tensors, list) or len(tensors) > MAX_TENSORS:
        raise ValueError(f"tensors: expected a list of at most {MAX_TENSORS}")
    for n, tensor in enumerate(tensors):
        if not isinstance(tensor, dict) or {key: type(value) for key, value in tensor.items()} != _KEYS:
            raise ValueError(
                f"tensors[{n}]: expected {', '.join(f'{key} ({kind.__name__})' for key, kind in _KEYS.items())}"
            )
        if any(type(size) is not int for size in tensor["shape"]):
            raise ValueError(f"tensors[{n}].shape: expected integers")
    layout = laid_out((tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in tensors)
    for n, (tensor, place) in enumerate(zip(tensors, layout.places, strict=True)):
        if (tensor["offset"], tensor["length"]) != (place.offset, place.size_bytes):
            said, expected = f"{tensor['offset']}, {tensor['length']}", f"{place.offset}, {place.size_bytes}"
            raise ValueError(f"tensors[{n}].offset, length: expected {expected}, not {said}")
    return architecture, layout
