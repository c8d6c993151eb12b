"""TensorFlow SavedModels: a directory with `saved_model.pb`. CPU only.

Its graph is a program that can read and write files, so it is refused unless the operator allows it
(`Format.runs_code`; TensorFlow, "Using TensorFlow Securely": "models are programs").

Names, datatypes and shapes are those of the signature `serving_default`, or of the one that the parameter `signature`
names. One intra-op and one inter-op thread for the whole process, set before its first use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import datatype_of
from loaders.memory.process import Change
from loaders.taking_turns import framework_load

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it would log at every start which instructions the processor has
try:
    import tensorflow
except ImportError as missing:
    raise LoaderError("tensorflow is not installed: pip install 'densemesh[tensorflow]'") from missing

_STORED, _GRAPH, _MODEL_BYTES = 2, 10, 500_000
"""Bytes in memory over those of variables and of `saved_model.pb`, and what any model takes beside."""


class TensorflowLoader:
    """Reads SavedModels; loads one at a time."""

    def __init__(self) -> None:
        tensorflow.config.set_visible_devices([], "GPU")
        tensorflow.config.threading.set_intra_op_parallelism_threads(1)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)

    def estimate_bytes(self, artifact: Artifact) -> int:
        parameters(artifact, "tensorflow", "signature")
        with reading(artifact.path):
            graph = (artifact.path / "saved_model.pb").stat().st_size
            variables = sum(each.stat().st_size for each in (artifact.path / "variables").glob("*.data-*"))
        return variables * _STORED + graph * _GRAPH + _MODEL_BYTES

    def load(self, artifact: Artifact) -> TensorflowModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        wanted = parameters(artifact, "tensorflow", "signature").get("signature", "serving_default")
        with Change() as change, framework_load(path):
            try:
                module = tensorflow.saved_model.load(str(path))
                if wanted not in module.signatures:
                    there = ", ".join(map(str, module.signatures)) or "none"
                    raise LoaderError(f"{path.name} has no signature {wanted!r}: it has {there}")
                function = module.signatures[wanted]
                signature = agreed(_signature(function), artifact)
            except LoaderError:
                raise
            except Exception as error:
                reason = f"{path.name} does not load with TensorFlow {tensorflow.__version__}: {_reason(error)}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error
            return TensorflowModel(module, function, signature, change.measured(estimate, "tensorflow"))


class TensorflowModel:
    """One SavedModel and the signature that is served."""

    waits: Final = 0

    def __init__(self, module: Any, function: Any, signature: Signature, size_bytes: int) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self._module = module
        self._function = function

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: TensorFlow's reason; `bad_input` if an operation refused its arguments.
        """
        try:
            found = self._function(**{name: tensorflow.constant(tensor) for name, tensor in inputs.items()})
            return {name: np.asarray(found[name].numpy()) for name in outputs}
        except Exception as error:
            refused = tensorflow.errors.InvalidArgumentError, tensorflow.errors.OutOfRangeError
            raise InferError(_reason(error), bad_input=isinstance(error, refused)) from error

    def unload(self) -> None:
        with Change():
            del self._module, self._function


def _signature(function: Any) -> Signature:
    _, takes = function.structured_input_signature
    inputs, outputs = (
        tuple(_spec(name, spec) for name, spec in sorted(specs.items()))
        for specs in (takes, function.structured_outputs)
    )
    return Signature(inputs, outputs, platform="tensorflow_savedmodel")


def _spec(name: str, spec: Any) -> TensorSpec:
    if spec.shape.rank is None:
        raise LoaderError(f"{name!r} has an unknown number of dimensions")
    shape = tuple(-1 if size is None else size for size in spec.shape)
    try:
        datatype = "BYTES" if spec.dtype == tensorflow.string else datatype_of(np.dtype(spec.dtype.as_numpy_dtype))
    except (TypeError, ValueError) as error:
        raise LoaderError(f"{name!r} is of type {spec.dtype.name}, which V2 does not have") from error
    return TensorSpec(name, datatype, shape)


def _reason(error: Exception) -> str:
    """The sentence that is not a heading or about traces."""
    noise = ("Graph execution error", "Detected at node", "<stack traces", "[[{{node", "[Op:")
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(noise)]
    return (lines[0] if lines else type(error).__name__)[:500]
