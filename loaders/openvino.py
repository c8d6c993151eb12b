"""OpenVINO IR: `.xml` with its `.bin` beside it. The files are data, not code. CPU only.

Names, datatypes and shapes are the model's own; of a tensor with several names, the first in the order of the alphabet.

A model runs in the thread that asks, which has an infer request of its own: with no streams it starts no threads, where
one stream takes two for each model. Weights are read and not mapped, so that their file may go; nothing is cached on
disk. The package openvino-telemetry, which reports an import of OpenVINO to a server, is kept from being imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.memory.process import Change

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it has a stub for where that is missing
try:
    import openvino
except ImportError as missing:
    raise LoaderError("openvino is not installed: pip install 'densemesh[openvino]'") from missing

_DATATYPES: Final = {
    "boolean": "BOOL",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("u", "UINT"), ("i", "INT")) for bits in (8, 16, 32, 64)},
    **{"f16": "FP16", "f32": "FP32", "f64": "FP64", "string": "BYTES"},
}
_NO_THREADS: Final = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 0, "INFERENCE_PRECISION_HINT": "f32"}
"""FP32 as it is: on processors that have it, OpenVINO would compute in BF16, three digits."""
_STORED, _MODEL_BYTES, _LAYER_BYTES = 2, 70_000, 11_000
"""Bytes in memory over bytes of weights, which the first request packs anew, and what a model and each of its layers
take beside: within 20 % of what malloc handed out for four perceptrons of 7 to 157 layers, 3 KB to 21 MB."""


class OpenvinoLoader:
    """Reads `.xml` and the `.bin` beside it."""

    def __init__(self) -> None:
        self._core = openvino.Core()
        self._core.set_property({"ENABLE_MMAP": False})

    def estimate_bytes(self, artifact: Artifact) -> int:
        path = artifact.path
        parameters(artifact, "openvino")
        with reading(path):
            layers = path.read_bytes().count(b"<layer ")
            weights = path.with_suffix(".bin")
            stored = weights.stat().st_size if weights.exists() else 0
            return stored * _STORED + layers * _LAYER_BYTES + _MODEL_BYTES

    def load(self, artifact: Artifact) -> OpenvinoModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        with Change():
            try:
                compiled = self._core.compile_model(path, "CPU", _NO_THREADS)
                return OpenvinoModel(compiled, artifact, estimate)
            except LoaderError:
                raise
            except Exception as error:
                here = f"OpenVINO {openvino.__version__.partition('-')[0]}"
                reason = f"{path.name} does not load with {here}: {_reason(error)}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error


class OpenvinoModel:
    """One compiled model."""

    waits: Final = 0

    def __init__(self, compiled: Any, artifact: Artifact, size_bytes: int) -> None:
        inputs, outputs = ([_spec(port) for port in ports] for ports in (compiled.inputs, compiled.outputs))
        self.size_bytes = size_bytes
        own = Signature(tuple(inputs), tuple(outputs), platform="openvino")
        self.signature = agreed(own, artifact)
        self._compiled = compiled
        self._places = {spec.name: place for place, spec in enumerate(outputs)}
        self._takes = {spec.name: place for place, spec in enumerate(inputs)}
        self._requests = threading.local()

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: OpenVINO's reason; `bad_input` if shapes do not go together.
        """
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        try:
            for name, tensor in inputs.items():
                request.set_input_tensor(self._takes[name], _given(tensor))
            request.start_async()  # in this thread all the same; `infer` would convert every output
            request.wait()
            return {name: _answer(request.get_output_tensor(self._places[name])) for name in outputs}
        except Exception as error:
            raise InferError(_reason(error), bad_input="shape" in str(error).lower()) from error

    def unload(self) -> None:
        with Change():
            del self._compiled, self._requests


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    name = names[0] if names else port.get_node().get_friendly_name()
    element, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
    if element not in _DATATYPES:
        raise LoaderError(f"{name!r} is of type {element}, which V2 does not have")
    if shape.rank.is_dynamic:
        raise LoaderError(f"{name!r} has an unknown number of dimensions")
    return TensorSpec(name, _DATATYPES[element], tuple(size.get_length() if size.is_static else -1 for size in shape))


def _given(tensor: Tensor) -> Any:
    if tensor.dtype == object:
        strings = openvino.Tensor(openvino.Type.string, tensor.shape)
        strings.bytes_data = np.array(tensor.tolist(), np.bytes_)
        return strings
    return openvino.Tensor(tensor if tensor.flags.writeable else tensor.copy(), shared_memory=True)


def _answer(tensor: Any) -> Tensor:
    """A copy: the next request writes over it."""
    if tensor.get_element_type().get_type_name() == "string":
        return np.array(tensor.bytes_data, dtype=object)
    return np.array(tensor.data)


def _reason(error: Exception) -> str:
    """OpenVINO's last line, which follows the places in its source; the type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]
