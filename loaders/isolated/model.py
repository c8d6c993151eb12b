"""What formats that run in a process of their own have in common: settings, signature, size."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loaders.artifacts import agreed, reading
from loaders.base import Artifact, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.isolated.process import Process, Settings

_MEMORY_BYTES: Final = 2 << 30
_MOST_BYTES: Final = 1 << 50
_MOST_MS: Final = 3_600_000
_MOST_FILES: Final = 10_000
_NUMBERS: Final[Mapping[str, int]] = {
    "threads": 1024,
    "memory_bytes": _MOST_BYTES,
    "timeout_ms": _MOST_MS,
    "load_timeout_ms": _MOST_MS,
}
"""Parameters that are numbers from 1, and the most each may be."""
OURS: Final = ("implementation", "python", "env", *_NUMBERS)
"""Parameters of this server; all others are the model's own."""


class IsolatedModel:
    """A process with a model in it."""

    waits: Final = 1

    def __init__(self, process: Process, signature: Signature, size_bytes: int) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self._process = process

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError, ModelLost: see `Process.infer`.
        """
        return self._process.infer(inputs, tuple(outputs))

    def unload(self) -> None:
        self._process.end()


def load(settings: Settings, artifact: Artifact, own: Signature, estimate: int) -> IsolatedModel:
    """Start a process that loads the model; `own`: the signature of one that does not tell its own.

    Raises:
        LoaderError: with the model's own reason.
    """
    process = Process(settings)
    try:
        signature = agreed(_told_by(process.told, artifact, own), artifact)
        return IsolatedModel(process, signature, process.resident_bytes or estimate)
    except BaseException:
        process.end()
        raise


def settings_of(artifact: Artifact, implementation: str = "") -> Settings:
    """How its owner wants the process run.

    Raises:
        LoaderError: a parameter of ours is not what it should be.
    """
    own = {name: value for name, value in artifact.parameters.items() if name not in OURS}
    told = {name: artifact.parameters[name] for name in OURS if name in artifact.parameters}
    for name, most in _NUMBERS.items():
        value = told.get(name, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise LoaderError(f"parameter {name!r} is {value!r:.64}: expected a number from 1 to {most}")
    python, env = told.pop("python", sys.executable), told.get("env", {})
    if not isinstance(python, str) or not os.path.isabs(python) or not os.access(python, os.X_OK):
        raise LoaderError(f"parameter 'python' is {python!r:.200}: expected the absolute path of an interpreter")
    if not isinstance(env, dict) or not all(_is_text(name) and _is_text(value) for name, value in env.items()):
        raise LoaderError("parameter 'env' is not an object of texts: expected names of variables and their values")
    if not isinstance(told.setdefault("implementation", implementation), str):
        raise LoaderError(f"parameter 'implementation' is {told['implementation']!r:.64}: expected module.Class")
    told.setdefault("memory_bytes", _MEMORY_BYTES + 4 * files_bytes(artifact.path))
    return Settings(
        directory=artifact.path,
        model_id=artifact.model_id or artifact.path.name,
        parameters=own,
        outputs=artifact.outputs,
        python=python,
        **told,
    )


def files_bytes(directory: Path) -> int:
    """Of a directory's files, without what is hidden or made by Python.

    Raises:
        LoaderError: it cannot be read.
    """
    total, count = 0, 0
    with reading(directory):
        for folder, folders, names in os.walk(directory, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
            total += sum(os.stat(os.path.join(folder, name)).st_size for name in names if not name.startswith("."))
            count += len(names)
            if count > _MOST_FILES:
                raise LoaderError(f"{directory.name} has more than {_MOST_FILES} files")
    return total


def _raise(error: OSError) -> None:
    raise error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and value.isprintable()


def _told_by(told: Mapping[str, Any], artifact: Artifact, own: Signature) -> Signature:
    """What the model's process says of it; what nobody tells is what was declared beside it."""
    inputs = _specs("inputs", told.get("inputs")) or (() if own.inputs else artifact.inputs)
    outputs = _specs("outputs", told.get("outputs")) or own.outputs or artifact.outputs
    return replace(own, inputs=inputs or own.inputs, outputs=outputs, lenient=not inputs)


def _specs(field: str, told: Any) -> tuple[TensorSpec, ...]:
    """The model's own `inputs` or `outputs`, which are its author's and may be anything."""
    specs: list[TensorSpec] = []
    for each in told if isinstance(told, list) else ():
        match each:
            case {"name": str(name), "datatype": str(datatype), "shape": [*sizes]} if (
                name and datatype in DTYPES and all(type(size) is int and size >= -1 for size in sizes)
            ):
                specs.append(TensorSpec(name, datatype, tuple(sizes)))
            case _:
                expected = '{"name": "x", "datatype": "FP32", "shape": [-1, 4]}'
                raise LoaderError(f"the model's own {field} have {each!r:.200}: expected {expected}")
    return tuple(specs)
