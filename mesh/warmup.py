"""Requests that a model answers before its copy counts as loaded: `warmup` in its settings, Triton's `model_warmup`.

    "warmup": 3                                              three runs, on zeros
    "warmup": [{"count": 2, "batch_size": 8, "inputs": [{"name": "X", "datatype": "FP32", "shape": [8, 4], "data": 0}]}]

`data` is "random", one value for all elements, or a flat list of them. Inputs that are not told are zeros (BYTES:
empty) of the signature's shape, with `batch_size` (1) for a free first size and 1 for other free ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from loaders.base import InferError, LoadedModel, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES, bytes_of
from mesh.errors import InvalidRequest
from mesh.tensors import DecodedRequest, check

MAX_RUNS: Final = 1000
MAX_BATCH: Final = 1 << 16
MAX_BYTES: Final = 64 << 20
"""Of one input."""
PATIENCE_S: Final = 60.0
"""No further run begins after so long; a run that does not end is the load's deadline's matter."""


def samples_in(where: str, told: Any) -> tuple[Mapping[str, Any], ...]:
    """`warmup` as it was told, as a list of samples.

    Raises:
        ValueError: it is of another form; one sentence that begins with `where`.
    """
    where = f"{where}: warmup"
    samples = [{"count": told}] if type(told) is int else told or []
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError(f"{where} is neither a number of runs nor a list of objects")
    for sample in samples:
        if unknown := sample.keys() - {"count", "batch_size", "inputs"}:
            raise ValueError(f"{where}: unknown {min(unknown)[:64]!r}, expected count, batch_size or inputs")
        for name, most in (("count", MAX_RUNS), ("batch_size", MAX_BATCH)):
            if type(sample.get(name, 1)) is not int or not 0 <= sample.get(name, 1) <= most:
                raise ValueError(f"{where}: {name} is not a number from 0 to {most}")
        inputs = sample.get("inputs", [])
        if not isinstance(inputs, list) or not all(isinstance(each, dict) for each in inputs):
            raise ValueError(f"{where}: inputs is not a list of objects")
        for each in inputs:
            _given(where, each)
    if sum(sample.get("count", 1) for sample in samples) > MAX_RUNS:
        raise ValueError(f"{where}: more than {MAX_RUNS} runs")
    return tuple(samples)


def warm_up(model: LoadedModel, samples: Sequence[Mapping[str, Any]]) -> None:
    """Run them. Blocks.

    Raises:
        LoaderError: the model refused a sample, failed, or was too slow; begins with `warm-up`.
    """
    end = time.monotonic() + PATIENCE_S
    for sample in samples:
        try:
            inputs, outputs = _request(model, sample)
            for done in range(sample.get("count", 1)):
                if time.monotonic() > end:
                    raise LoaderError(f"warm-up: not done after {PATIENCE_S:.0f} s ({done} runs of this sample)")
                model.infer(inputs, outputs)
        except (InferError, InvalidRequest, ValueError) as error:
            raise LoaderError(f"warm-up: {error}") from error


def _request(model: LoadedModel, sample: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    batch = sample.get("batch_size", 1)
    given = dict(_given("warm-up", each) for each in sample.get("inputs", []))
    missing = [] if model.signature.lenient and given else [s for s in model.signature.inputs if s.name not in given]
    given |= {spec.name: (spec.datatype, _filled(spec, _sizes(spec, batch), "")) for spec in missing}
    inputs = {name: array for name, (_, array) in given.items()}
    datatypes = {name: datatype for name, (datatype, _) in given.items()}
    return check(DecodedRequest("", "", "", inputs, datatypes, (), raw=True), model.signature)


def _sizes(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    first, *rest = spec.shape or (1,)
    sizes = (batch if first == -1 else first, *(1 if size == -1 else size for size in rest))
    return sizes if spec.shape else ()


def _given(where: str, told: Mapping[str, Any]) -> tuple[str, tuple[str, Tensor]]:
    """One of a sample's inputs: its name, datatype and values."""
    name, datatype, shape = told.get("name"), told.get("datatype"), told.get("shape")
    if not isinstance(name, str) or not name or datatype not in DTYPES:
        raise ValueError(f"{where}: an input without a name or of unknown datatype {datatype!r:.64}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{where}: {name[:64]!r}: shape is not a list of numbers from 0")
    if len(shape) > 32 or math.prod(shape) * DTYPES[datatype].itemsize > MAX_BYTES:
        raise ValueError(f"{where}: {name[:64]!r}: shape {shape} is larger than {MAX_BYTES} bytes")
    spec = TensorSpec(name, datatype, tuple(shape))
    try:
        return name, (datatype, _filled(spec, spec.shape, told.get("data", "")))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {name[:64]!r}: data does not fit {datatype} {shape}: {error}") from None


def _filled(spec: TensorSpec, shape: tuple[int, ...], data: Any) -> Tensor:
    dtype = DTYPES[spec.datatype]
    if data == "random" and not dtype.hasobject:
        rng = np.random.default_rng(0)
        drawn = rng.standard_normal(shape) if dtype.kind in "fV" else rng.integers(0, 2, shape)
        return np.asarray(drawn).astype(dtype)
    if dtype.hasobject:
        texts = data if isinstance(data, list) else [data] * math.prod(shape)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("not strings")
        return bytes_of(np.array(texts, object).reshape(shape))
    if isinstance(data, list):
        return np.array(data).astype(dtype).reshape(shape)
    return np.full(shape, data or 0, dtype)
