"""Skeletons from a declaration: data, no code, for networks that are a row of layers.

    {"input": {"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}, "output": "logits",
     "layers": [{"conv2d": "features.0", "padding": 1}, "relu", "flatten", {"linear": "head"}]}

A layer with weights names what theirs begin with, as `torch.nn` names them (`head.weight`, and `head.bias` if the file
has it); how wide it is, the file tells. `shape` is V2's, its first dimension the batch. `name` and `output` are `input`
and `output` if they are not told, `datatype` FP32. All weights have one floating-point type, in which the network is
computed; what it takes and gives stays `datatype`, or FP32 where it takes integers.

    linear, embedding, layernorm (eps), conv1d, conv2d (stride, padding, groups)       with weights
    relu, gelu (approximate: "tanh"), silu, tanh, sigmoid, softmax (over the last dimension)
    flatten (all but the batch), mean (over the second dimension), residual: [layers]   (their answer is added)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional as nn

from loaders.base import LoaderError, Signature, TensorSpec
from loaders.memory.layout import Layout
from loaders.skeletons.base import Views
from loaders.torch_tensors import TORCH_DTYPES, reason

MAX_LAYERS: Final = 1024
MAX_DECLARED_BYTES: Final = 256 << 10
_MAX_DEPTH: Final = 8
_LAYER_BYTES: Final = 2_000
_SMALL: Final = 9_000
"""Elements of a matrix, below which OpenBLAS starts no threads for a product with few rows."""
_FLOATS: Final = ("FP32", "FP16", "BF16", "FP64")

Function = Callable[..., torch.Tensor]
"""Of the tensor that comes and the layer's weights."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One line of the table of layers."""

    run: Function
    """Takes the layer's settings by name."""
    many: Function | None
    """With one more dimension, the models; None: only `torch.vmap` knows."""
    weights: tuple[str, ...] = ()
    """What follows the name; a bias may be missing."""
    settings: Mapping[str, tuple[type, ...]] = field(default_factory=dict)


def _linear_many(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows, turned = x.reshape(len(x), -1, x.shape[-1]), weight.transpose(1, 2)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and weight[0].numel() <= _SMALL:
        # numpy's product takes 60 to 80 % of the time of torch's for matrices so small.
        y = torch.from_numpy(np.matmul(rows.numpy(), turned.numpy()))
        y = y if bias is None else y.add_(bias.unsqueeze(1))
    else:
        y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _embedding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.embedding(x, weight)


def _embedding_many(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    models = torch.arange(len(x), device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    return weight[models, x]


def _layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float = 1e-5
) -> torch.Tensor:
    return nn.layer_norm(x, weight.shape, weight, bias, eps)


def _layernorm_many(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float = 1e-5
) -> torch.Tensor:
    wide = (len(x), *(1,) * (x.ndim - 2), x.shape[-1])
    y = nn.layer_norm(x, x.shape[-1:], None, None, eps) * weight.reshape(wide)
    return y if bias is None else y + bias.reshape(wide)


def _same(run: Function, **settings: tuple[type, ...]) -> _Kind:
    return _Kind(run, run, (), settings)


_CONV: Final = {"stride": (int,), "padding": (int,), "groups": (int,)}
_KINDS: Final[Mapping[str, _Kind]] = {
    "linear": _Kind(nn.linear, _linear_many, ("weight", "bias")),
    "embedding": _Kind(_embedding, _embedding_many, ("weight",)),
    "layernorm": _Kind(_layernorm, _layernorm_many, ("weight", "bias"), {"eps": (float, int)}),
    "conv1d": _Kind(nn.conv1d, None, ("weight", "bias"), _CONV),
    "conv2d": _Kind(nn.conv2d, None, ("weight", "bias"), _CONV),
    "relu": _same(torch.relu),
    "gelu": _same(nn.gelu, approximate=(str,)),
    "silu": _same(nn.silu),
    "tanh": _same(torch.tanh),
    "sigmoid": _same(torch.sigmoid),
    "softmax": _same(lambda x: torch.softmax(x, -1)),
    "flatten": _Kind(lambda x: x.flatten(1), lambda x: x.flatten(2)),
    "mean": _Kind(lambda x: x.mean(1), lambda x: x.mean(2)),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    kind: _Kind
    weights: tuple[str, ...]
    settings: Mapping[str, Any]
    inside: tuple[_Layer, ...] = ()
    """Of a residual."""


class Network:
    """See `loaders.skeletons.base.Skeleton`."""

    def __init__(self, declared: object, layout: Layout) -> None:
        """The declaration, and the weights that are there: it is run once, without data.

        Raises:
            LoaderError: the declaration is wrong, or the weights do not fit it.
        """
        given, output, layers = _read(declared)
        datatypes = {place.name: place.datatype for place in layout.places}
        self._layers = tuple(_layer(entry, datatypes, 0) for entry in layers)
        used = list(_weights(self._layers))
        if left := [name for name in datatypes if name not in used]:
            raise LoaderError(f"the file has {_listed(left)}, of which the architecture says nothing")
        if len(found := sorted({datatypes[name] for name in used})) > 1 or (found and found[0] not in _FLOATS):
            raise LoaderError(f"the weights are {' and '.join(found)}: expected all of one of {', '.join(_FLOATS)}")
        self._input, self._output = given.name, output
        self._dtype = TORCH_DTYPES[found[0] if found else "FP32"]
        answer = given.datatype if given.datatype in _FLOATS else "FP32"
        self._answer_dtype = TORCH_DTYPES[answer]
        self._has_many = all(layer.kind.many for layer in _flat(self._layers))
        self.size_bytes = _LAYER_BYTES * (len(self._layers) + 1)
        shape = self._shape(given, layout)
        self.signature = Signature((given,), (TensorSpec(output, answer, shape),), platform="safetensors_network")

    def run(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        x = _run(self._layers, weights, self._taken(inputs[self._input]))
        return {self._output: x.to(self._answer_dtype)}

    def run_many(self, weights: Views, inputs: Views) -> dict[str, torch.Tensor]:
        if not self._has_many:
            found: dict[str, torch.Tensor] = torch.vmap(self.run)(dict(weights), dict(inputs))
            return found
        x = _run_many(self._layers, weights, self._taken(inputs[self._input]))
        return {self._output: x.to(self._answer_dtype)}

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype) if x.is_floating_point() else x

    def _shape(self, given: TensorSpec, layout: Layout) -> tuple[int, ...]:
        """Of the output: what two runs without data, with other sizes where they are free, have in common."""
        weights = {
            place.name: torch.empty(place.shape, dtype=TORCH_DTYPES[place.datatype], device="meta")
            for place in layout.places
        }
        shapes = []
        for size in (40, 56):
            sizes = [size if known < 0 else known for known in given.shape]
            x = torch.empty(sizes, dtype=TORCH_DTYPES[given.datatype], device="meta")
            try:
                y = self.run(weights, {given.name: x})[self._output]
            except Exception as error:
                raise LoaderError(f"the weights do not fit the architecture: {reason(error)}") from error
            if y.shape[:1] != x.shape[:1]:
                raise LoaderError(f"output: expected one row per row of the input, not the shape {list(y.shape)}")
            shapes.append(y.shape)
        return tuple(a if a == b else -1 for a, b in zip(*shapes, strict=True))


def _read(declared: object) -> tuple[TensorSpec, str, Sequence[Any]]:
    """The parts of a declaration."""
    given, output, layers = _fields("architecture", declared, "input", "output", "layers")
    name, datatype, shape = _fields("architecture: input", given, "name", "datatype", "shape")
    name, datatype, output = name or "input", datatype or "FP32", output or "output"
    for what, value in (("input.name", name), ("output", output)):
        if not isinstance(value, str):
            raise LoaderError(f"architecture: {what}: expected a name")
    if datatype not in (*_FLOATS, "INT64", "INT32"):
        raise LoaderError("architecture: input.datatype: expected FP32, FP16, BF16, FP64, INT64 or INT32")
    if not isinstance(shape, list) or shape[:1] != [-1] or len(shape) > 8 or any(not _is_size(size) for size in shape):
        raise LoaderError("architecture: input.shape: expected at most 8 sizes, -1 where they are free, the first -1")
    if not isinstance(layers, list) or not layers:
        raise LoaderError("architecture: layers: expected a list of at least one layer")
    if len(layers) > MAX_LAYERS:
        raise LoaderError(f"architecture: layers: expected at most {MAX_LAYERS}, not {len(layers)}")
    return TensorSpec(name, datatype, tuple(shape)), output, layers


def _is_size(size: object) -> bool:
    return type(size) is int and (size == -1 or 0 < size < 1 << 31)


def _fields(what: str, value: object, *names: str) -> tuple[Any, ...]:
    if not isinstance(value, dict) or set(value) - set(names):
        raise LoaderError(f"{what}: expected an object with {', '.join(names)}")
    return tuple(value.get(name) for name in names)


def _layer(entry: Any, there: Mapping[str, str], depth: int) -> _Layer:
    """One entry of `layers`; `there`: names of weights."""
    told = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(told, dict) or not told:
        raise LoaderError("architecture: layers: expected names of layers, or objects that begin with one")
    (name, value), *settings = told.items()
    if name == "residual" and isinstance(value, list) and not settings and depth < _MAX_DEPTH:
        inside = tuple(_layer(each, there, depth + 1) for each in value)
        return _Layer(_same(torch.relu), (), {}, inside)
    kind = _KINDS.get(name)
    if kind is None:
        expected = f"{', '.join(_KINDS)} or residual (at most {_MAX_DEPTH} deep)"
        raise LoaderError(f"architecture: layer {str(name)[:64]!r}: expected {expected}")
    if kind.weights and not isinstance(value, str):
        raise LoaderError(f"architecture: {name}: expected what the names of its weights begin with")
    for setting, found in settings:
        if not isinstance(found, kind.settings.get(setting, ())) or isinstance(found, bool):
            expected = ", ".join(kind.settings) or "none"
            raise LoaderError(f"architecture: {name}: setting {setting!r} is not right: expected {expected}")
    weights = [f"{value}.{each}" if value else each for each in kind.weights]
    if weights and weights[0] not in there:
        raise LoaderError(f"the architecture needs {weights[0]}, the file has {_listed(list(there))}")
    return _Layer(kind, tuple(each for each in weights if each in there), dict(settings))


def _flat(layers: Sequence[_Layer]) -> Iterator[_Layer]:
    for layer in layers:
        yield layer
        yield from _flat(layer.inside)


def _weights(layers: Sequence[_Layer]) -> Iterator[str]:
    for layer in _flat(layers):
        yield from layer.weights


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _run(layers: Sequence[_Layer], weights: Views, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        if layer.inside:
            x = x + _run(layer.inside, weights, x)
        else:
            x = layer.kind.run(x, *[weights[name] for name in layer.weights], **layer.settings)
    return x


def _run_many(layers: Sequence[_Layer], weights: Views, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        if layer.inside:
            x = x + _run_many(layer.inside, weights, x)
        else:
            many = layer.kind.many
            assert many is not None
            x = many(x, *[weights[name] for name in layer.weights], **layer.settings)
    return x


def declared_in(text: str | bytes) -> object:
    """A declaration as JSON.

    Raises:
        LoaderError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoaderError(f"architecture: expected JSON: {error}") from None
