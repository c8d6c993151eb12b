"""Running a skeleton with one model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.artifacts import reading
from loaders.base import Tensor
from loaders.fleet.architectures import SKELETON_FILE, Architecture, read_facts
from loaders.onnx_session import ort, reason_of, session_options, signature_of
from loaders.prepare import Damaged

_NOTHING: Final = np.empty(0, np.float32)


def open_session(path: Path) -> Any:
    """A session of a graph that was optimised when it was written."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def open_architecture(digest: str, folder: Path, weights: Mapping[str, object]) -> Architecture:
    """The skeleton in a folder; `weights`: names of the inputs that are not the client's.

    Raises:
        LoaderError: it cannot be read.
        Damaged: it is not the one of that digest, or does not load.
    """
    facts, path = read_facts(folder), folder / SKELETON_FILE
    with reading(path):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise Damaged(f"{path.name}: its checksum differs from the one written", retryable=True)
    try:
        session = open_session(path)
    except Exception as error:
        raise Damaged(f"{path.name}: {reason_of(error)}", retryable=True) from error
    whole = signature_of(session)
    inputs = tuple(spec for spec in whole.inputs if spec.name not in weights)
    return Architecture(digest, session, replace(whole, inputs=inputs), facts)


class Fed:
    """A session and the weights that it is to be run with; any number of threads may run it at once.

    A binding holds the weights by address, so a run hands over its inputs alone: 2 us more than a session with weights
    of its own, where `InferenceSession.run` with all of 200 weights takes 270. A binding serves one run at a time.
    """

    def __init__(self, session: Any, weights: Mapping[str, Tensor]) -> None:
        """`weights` stay referred to as long as this or a run of it lives."""
        self._session = session
        self._weights = weights
        self._bindings = [self._binding()]

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The named outputs; whatever ONNX Runtime raises is raised."""
        try:
            binding = self._bindings.pop()
        except IndexError:
            binding = self._binding()
        try:
            for name, tensor in inputs.items():
                binding.bind_cpu_input(name, tensor)
            for name in outputs:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            results: list[Tensor] = binding.copy_outputs_to_cpu()
            return results
        except RuntimeError:  # which says no more; the other way of running tells whose fault it is
            results = self._session.run(list(outputs), {**self._weights, **inputs})
            return results
        finally:
            binding.clear_binding_outputs()
            for name in inputs:
                binding.bind_cpu_input(name, _NOTHING)  # or it would hold the request's until the next
            self._bindings.append(binding)

    def _binding(self) -> Any:
        binding = self._session.io_binding()
        for name, array in self._weights.items():
            binding.bind_cpu_input(name, array)
        return binding
