"""Skeletons from `torch.export`: any network, but reading one can run its author's code (see `loaders.torch`).

The exported graph takes weights as arguments before the inputs, so it is a pure function already: calling it directly
takes 16 us for a small network, where `program.module()` takes 69 and `torch.func.functional_call` on that 111. What it
was exported with does not matter, not even whether there were weights: `torch.device("meta")` keeps the file small.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch.export.graph_signature import InputKind, OutputKind

from loaders.artifacts import reading
from loaders.base import LoaderError, Signature
from loaders.memory.layout import Layout
from loaders.skeletons.base import Views
from loaders.taking_turns import framework_load
from loaders.torch import interface
from loaders.torch_tensors import TORCH_DTYPES, reason

_SKELETON_BYTES, _NODE_BYTES = 30_000, 3_500
_NOT_THE_GRAPH: Final = ("data/weights/weight_", "data/sample_inputs/", ".data/serialization_id")
_WEIGHT: Final = "="
"""Before the name of a weight, which could be an input's too."""
_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_MAY_BE_VIEWS: Final = frozenset(f"aten::{name}" for name in ("reshape", "flatten", "contiguous", "to"))
"""Operators that do not say so in their schemas, which others do."""
_MOST_BYTES: Final = 64 << 20
"""Of graph and constants."""


class Exported:
    """See `loaders.skeletons.base.Skeleton`."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """
        Raises:
            LoaderError: it cannot be read, is no function of weights and inputs, or has other weights than the layout.
        """
        with framework_load(path):
            try:
                program = torch.export.load(path)
            except Exception as error:
                raise LoaderError(f"{path.name}: {reason(error)}") from error
        takes, gives, _ = interface(program)
        self.signature = Signature(tuple(takes), tuple(gives), platform="safetensors_export")
        self.size_bytes = _SKELETON_BYTES + _NODE_BYTES * len(program.graph.nodes)
        self._graph = program.graph_module.forward
        self._outputs = tuple(spec.name for spec in gives)
        names = iter([spec.name for spec in takes])
        weights: dict[str, torch.Tensor] = {}
        self._arguments: list[tuple[str, Any]] = []
        """The name of a weight or input, or "" and a constant."""
        for spec in program.graph_signature.input_specs:
            target = str(spec.target)
            if spec.kind is InputKind.USER_INPUT:
                self._arguments.append((next(names), None))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and target in program.state_dict:
                weights[target] = program.state_dict[target]
                self._arguments.append((_WEIGHT + target, None))
            elif target in program.constants:
                self._arguments.append(("", program.constants[target]))
            else:
                raise LoaderError(f"{path.name} takes {spec.arg.name!r}, which is neither input nor weight")
        if _writes(program):
            raise LoaderError(f"{path.name} changes its own weights or inputs when it is run")
        _check(path, weights, layout)

    def run(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        arguments = self._bound(weights, inputs)
        return dict(zip(self._outputs, self._graph(*arguments), strict=True))

    def run_many(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        arguments = self._bound(weights, inputs)
        dimensions = tuple(0 if name else None for name, _ in self._arguments)
        return dict(zip(self._outputs, torch.vmap(self._graph, dimensions)(*arguments), strict=True))

    def _bound(self, weights: Views, inputs: Views) -> list[Any]:
        return [
            weights[name[1:]] if name[:1] == _WEIGHT else inputs[name] if name else constant
            for name, constant in self._arguments
        ]


def _writes(program: torch.export.ExportedProgram) -> bool:
    """Whether a run changes what it is given: weights are shared, and read by other runs meanwhile."""
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        return True
    given = {node for node in program.graph.nodes if node.op == "placeholder"}  # and views of it
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if value in given and argument.alias_info is not None and argument.alias_info.is_write:
                return True
            if value in given and (argument.alias_info is not None or schema.name in _MAY_BE_VIEWS):
                given.add(node)
    return False


def _check(path: Path, weights: dict[str, torch.Tensor], layout: Layout) -> None:
    told = {place.name: (place.datatype, place.shape) for place in layout.places}
    for name, tensor in weights.items():
        found, datatype = told.pop(name, None), _NAMES.get(tensor.dtype, str(tensor.dtype))
        if found != (needed := (datatype, tuple(tensor.shape))):
            has = f"{found[0]} {list(found[1])}" if found else "nothing of that name"
            raise LoaderError(f"{path.name} needs {name} {needed[0]} {list(needed[1])}, the weights have {has}")
    if told:
        name, (datatype, shape) = next(iter(told.items()))
        raise LoaderError(f"the weights have {name} {datatype} {list(shape)}, {path.name} has nothing of that name")


def digest_of(path: Path) -> str:
    """Of what a skeleton computes: all of the archive but weights and sample inputs.

    Raises:
        LoaderError: it cannot be read.
    """
    with reading(path):
        found = os.stat(path)
    return _digest(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=4096)
def _digest(path: Path, _version: tuple[int, ...]) -> str:
    told = hashlib.sha256()
    with reading(path, "a torch.export archive"), zipfile.ZipFile(path) as archive:
        entries = [(each.filename.partition("/")[2], each) for each in archive.infolist()]
        entries = [(name, each) for name, each in entries if not name.startswith(_NOT_THE_GRAPH)]
        if not any(name.startswith("models/") for name, _ in entries):
            raise LoaderError(f"{path.name} is not a torch.export archive: it has no models/")
        if sum(each.file_size for _, each in entries) > _MOST_BYTES:
            raise LoaderError(f"{path.name} has more than {_MOST_BYTES >> 20} MiB beside its weights")
        for name, each in sorted(entries, key=lambda entry: entry[0]):
            told.update(f"{name} {each.file_size}\n".encode())
            told.update(archive.read(each))
    return told.hexdigest()
