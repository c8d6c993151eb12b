"""Keras 3 models: `.keras` archives, on the backend that Keras is told to use, by default torch. CPU only.

Keras' safe mode refuses to construct lambdas and what is not Keras' own, but it has been got around several times
(CVE-2025-1550, -8747, -9905, -9906), so a `.keras` file counts as code and is refused unless the operator allows it.

Names and shapes are the model's own, a `-1` for what it leaves open; one thread as with torch (see `loaders.torch`).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import datatype_of
from loaders.memory.process import Change
from loaders.taking_turns import framework_load

os.environ.setdefault("KERAS_BACKEND", "torch")
try:
    import keras
except ImportError as missing:
    raise LoaderError("keras is not installed: pip install 'densemesh[keras]'") from missing

_MODEL_BYTES: Final = 300_000
"""Of objects, beside the weights."""


class KerasLoader:
    """Reads `.keras`; loads one model at a time."""

    def __init__(self) -> None:
        """
        Raises:
            LoaderError: torch, the backend, is not installed.
        """
        if keras.backend.backend() == "torch":
            from loaders.torch import TorchLoader

            TorchLoader()  # sets its threads

    def estimate_bytes(self, artifact: Artifact) -> int:
        parameters(artifact, "keras")
        with reading(artifact.path, "a Keras archive"), zipfile.ZipFile(artifact.path) as archive:
            return sum(each.file_size for each in archive.infolist()) + _MODEL_BYTES

    def load(self, artifact: Artifact) -> KerasModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        with Change() as change, framework_load(path):
            try:
                model = keras.saving.load_model(path, compile=False, safe_mode=True)
                own = Signature(_specs(model.inputs), _specs(model.outputs, model.output_names), platform="keras")
                signature = agreed(own, artifact)
            except LoaderError:
                raise
            except Exception as error:
                reason = f"{path.name} does not load with Keras {keras.__version__}: {_reason(error)}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error
            return KerasModel(model, signature, change.measured(estimate, "keras"))


class KerasModel:
    """One functional or sequential model."""

    waits: Final = 0

    def __init__(self, model: Any, signature: Signature, size_bytes: int) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self._model = model
        self._takes = [tensor.name for tensor in model.inputs]
        self._gives = list(model.output_names)

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: Keras' reason; `bad_input` if it is one of values or shapes.
        """
        given = [inputs[name] for name in self._takes]
        try:
            answer = self._model(given[0] if len(given) == 1 else given, training=False)
            found = dict(zip(self._gives, keras.tree.flatten(answer), strict=True))
            return {name: np.ascontiguousarray(keras.ops.convert_to_numpy(found[name])) for name in outputs}
        except Exception as error:
            raise InferError(_reason(error), bad_input=isinstance(error, ValueError)) from error

    def unload(self) -> None:
        with Change():
            del self._model


def _specs(tensors: Sequence[Any], names: Sequence[str] = ()) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor, name in zip(tensors, names or [tensor.name for tensor in tensors], strict=True):
        try:
            datatype = "BYTES" if tensor.dtype == "string" else datatype_of(np.dtype(tensor.dtype))
        except (TypeError, ValueError) as error:
            raise LoaderError(f"{name!r} is of type {tensor.dtype}, which V2 does not have") from error
        specs.append(TensorSpec(name, datatype, tuple(-1 if size is None else size for size in tensor.shape)))
    return tuple(specs)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:500]
