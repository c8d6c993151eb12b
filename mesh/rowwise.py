"""Whether a model may be given several requests at once: it must answer each row as if it were alone.

That cannot be proven from outside, so it is tried, once for each kind of request (datatypes, shapes without the first
dimension, outputs): three requests, one of them a client's and the others with values drawn around it, are run one by
one and together. Rows, datatypes and shapes must agree; integers, booleans and strings must be equal, floating-point
numbers within the rounding of their type, for a framework may add in another order. A model that mixes rows (a mean or
softmax over the batch), depends on their place, draws at random, or refuses one of the requests is never batched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loaders.base import Family, LoadedModel, Signature, Tensor
from mesh.errors import MODEL_FAILURES

Kind = tuple[tuple[str, ...], tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]]
"""Outputs; name, dtype and shape of one row of each input."""

_ROUNDING: Final = {"float16": 1e-2, "bfloat16": 4e-2, "float32": 1e-4, "float64": 1e-8}
"""By dtype: relative to the largest magnitude of the row, or of the median row if that is larger."""
_ROWS: Final = (2, 1)
"""Of the requests that are made up."""
_LARGE: Final = 1e4
"""Numbers beyond it are not built on: FP16 ends at 65504."""


def has_batch_dimension(signature: Signature) -> bool:
    """Whether the first dimension of everything the model takes and gives is free."""
    if not signature.outputs:  # nothing is known that could be compared
        return False
    if signature.lenient:  # its shapes are a hint
        return True
    return all(spec.shape[:1] == (-1,) for spec in (*signature.inputs, *signature.outputs))


def rows_of(inputs: Mapping[str, Tensor]) -> int:
    """The first dimension of all inputs; 0: they have none in common."""
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in inputs.values()}
    return sizes.pop() if len(sizes) == 1 else 0


def kind_of(inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Kind:
    """What requests must have in common to be run together."""
    return tuple(outputs), tuple([(name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(inputs.items())])


def is_rowwise(model: LoadedModel, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> bool:
    """Try it, with requests around one that has at least one row. Runs the model four times; blocks."""
    rng = np.random.default_rng(0)
    requests = [inputs, *({name: _like(tensor, rows, rng) for name, tensor in inputs.items()} for rows in _ROWS)]
    try:
        alone = [model.infer(request, outputs) for request in requests]
        together = model.infer(stack(requests), outputs)
        return all(
            result[name].shape[:1] == (rows_of(request),)
            for request, result in zip(requests, alone, strict=True)
            for name in outputs
        ) and all(_agree(np.concatenate([result[name] for result in alone]), together[name]) for name in outputs)
    except MODEL_FAILURES:  # whatever it is, such requests are run one by one, and then it is theirs
        return False


def are_alike(
    family: Family, models: Sequence[LoadedModel], requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
) -> bool:
    """Whether several models in one call answer as each does alone. Blocks."""
    try:
        alone = [model.infer(request, outputs) for model, request in zip(models, requests, strict=True)]
        together = family.infer_many(models, requests, outputs)
        return all(
            _agree(one[name], other[name]) for one, other in zip(alone, together, strict=True) for name in outputs
        )
    except MODEL_FAILURES:
        return False


def stack(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One request with the rows of all, which are of one kind."""
    return {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}


def _like(tensor: Tensor, rows: int, rng: np.random.Generator) -> Tensor:
    """Other values of the same nature: a network may have no embedding for any integer, an encoder for any string."""
    shape, dtype = (rows, *tensor.shape[1:]), tensor.dtype
    values: npt.NDArray[Any] = tensor.ravel()
    if not values.size:
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.choice(np.concatenate([np.unique(values), np.array([0, 1], dtype)]), shape)
    if dtype.hasobject:
        return rng.choice(values, shape)
    wide = values.astype(np.float64)
    wide = wide[np.abs(wide) < _LARGE]
    wide = wide if wide.size else np.zeros(1)
    return (rng.choice(wide, shape) + rng.standard_normal(shape) * (wide.std() or 1.0) / 2).astype(dtype)


def _agree(alone: Tensor, together: Tensor) -> bool:
    if alone.dtype != together.dtype or alone.shape != together.shape:
        return False
    rounding = _ROUNDING.get(alone.dtype.name)
    if rounding is None:
        return bool(np.array_equal(alone, together))
    with np.errstate(all="ignore"):
        return _near(alone.astype(np.float64), together.astype(np.float64), rounding)


def _near(expected: Tensor, found: Tensor, rounding: float) -> bool:
    sizes = np.abs(np.where(np.isfinite(expected), expected, 0)).reshape(len(expected), -1).max(axis=1, initial=0)
    allowed = rounding * np.maximum(sizes, np.median(sizes)).reshape(-1, *(1,) * (expected.ndim - 1))
    near = (np.abs(found - expected) <= allowed) | (found == expected)
    return bool(np.all(near | (np.isnan(found) & np.isnan(expected))))
