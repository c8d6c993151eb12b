"""Models that cost what they are told to cost: for tests, benches and capacity rehearsals.

The settings come from a `*.synthetic.json` file, from the artifact's parameters, or both (parameters win):
`{"size_bytes": 1048576, "load_ms": 40, "infer_ms": 1.5, "unload_ms": 0, "estimate_bytes": 900000, "fail": "", ...}`.
Bytes are only claimed, never taken. The model is the identity: its one input, whatever its name, datatype and shape,
comes back as `OUTPUT0`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from loaders.artifacts import agreed, parameters
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec

_IDENTITY = Signature(
    inputs=(TensorSpec("INPUT0", "FP32", (-1, -1)),),
    outputs=(TensorSpec("OUTPUT0", "FP32", (-1, -1)),),
    platform="synthetic",
    lenient=True,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a synthetic model pretends; names are those of the JSON."""

    size_bytes: int = 1 << 20
    load_ms: float = 0
    infer_ms: float = 0
    unload_ms: float = 0
    estimate_bytes: int = 0
    """0: the same as `size_bytes`."""
    fail: str = ""
    """Not empty: every load fails with this message, after `load_ms`."""
    retryable: bool = False
    """Whether `fail` is worth another try."""

    @classmethod
    def of(cls, artifact: Artifact) -> Settings:
        """Settings of an artifact.

        Raises:
            LoaderError: the file is missing or no JSON object, a name is unknown, a value of the wrong kind.
        """
        names = [each.name for each in fields(cls)]
        said = _from_file(artifact) if artifact.path.suffix == ".json" else {}
        said |= artifact.parameters
        said = parameters(Artifact(artifact.path, said), "synthetic", *names)
        for name, value in said.items():
            expected = _KINDS.get(name, int | float)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not isinstance(value, expected) or (expected == int | float and (not is_number or value < 0)):
                raise LoaderError(f"parameter {name!r} of {artifact.path.name} cannot be {value!r}")
        return cls(**said)


_KINDS: Final[dict[str, Any]] = {"fail": str, "retryable": bool}
"""The rest are numbers, not negative."""


class SyntheticLoader:
    """Reads `*.synthetic.json`, or parameters alone."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        settings = Settings.of(artifact)
        return max(int(settings.estimate_bytes or settings.size_bytes), 1)

    def load(self, artifact: Artifact) -> SyntheticModel:
        settings = Settings.of(artifact)
        signature = agreed(_IDENTITY, artifact)
        _pass(settings.load_ms)
        if settings.fail:
            raise LoaderError(settings.fail, retryable=settings.retryable)
        return SyntheticModel(signature, settings)


class SyntheticModel:
    """The identity, after `infer_ms`."""

    waits: Final = 0

    def __init__(self, signature: Signature, settings: Settings) -> None:
        self.signature = signature
        self.size_bytes = max(int(settings.size_bytes), 1)
        self._settings = settings

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Return the input unchanged, not copied.

        Raises:
            InferError: not exactly one input.
        """
        if len(inputs) != 1:
            raise InferError(f"a synthetic model takes one input, got {len(inputs)}", bad_input=True)
        _pass(self._settings.infer_ms)
        (tensor,) = inputs.values()
        return dict.fromkeys(outputs, tensor)

    def unload(self) -> None:
        _pass(self._settings.unload_ms)


def _pass(duration_ms: float) -> None:
    if duration_ms > 0:
        time.sleep(duration_ms / 1000)


def _from_file(artifact: Artifact) -> dict[str, Any]:
    try:
        said = json.loads(artifact.path.read_bytes())
    except FileNotFoundError as error:
        raise LoaderError(f"{artifact.path} does not exist", retryable=True) from error
    except ValueError as error:
        raise LoaderError(f"{artifact.path.name} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise LoaderError(f"{artifact.path.name} is not a JSON object")
    return said
