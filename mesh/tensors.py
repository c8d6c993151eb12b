"""V2 inference messages to numpy arrays and back.

Source: Open Inference Protocol, gRPC: "Raw Tensor Contents", "Tensor Contents", "Tensor Data Types"; FP16 and BF16 have
no typed field and travel raw. Shapes are row-major, numbers little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from loaders.base import Signature, Tensor
from loaders.datatypes import DTYPES, datatype_of
from mesh.errors import InvalidRequest, ModelFailed, Unimplemented
from protos.inference_pb2 import InferTensorContents, ModelInferRequest, ModelInferResponse

MAX_TENSORS: Final = 256
"""Inputs, and requested outputs, of one request."""
MAX_DIMS: Final = 32
"""numpy before 2.0 has no more, and no model does."""
_MAX_ELEMENTS: Final = 1 << 60
"""numpy refuses more bytes than an address can tell, even in the non-zero dimensions of an array without elements."""

TYPED: Final[dict[str, str]] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of `InferTensorContents` for each datatype that has one."""
_NARROW: Final = frozenset(("UINT8", "UINT16", "INT8", "INT16"))
"""Datatypes whose typed field is wider than they are, so that values can be out of range."""
_REFUSED: Final[dict[str, str]] = {
    "shared_memory_region": "shared memory does not reach across hosts: tensors travel in the messages",
    "classification": "classification is not supported: request the tensor and sort its values",
}
"""Parameters of Triton's extensions that would change the result if they were ignored as V2 says."""


@dataclass(frozen=True, slots=True)
class DecodedRequest:
    """A ModelInferRequest that agrees with itself. Arrays are C-contiguous and aligned, and read-only if raw."""

    model_name: str
    model_version: str
    id: str
    inputs: Mapping[str, Tensor]
    """In the request's order; BYTES tensors are dtype object and hold `bytes`."""
    datatypes: Mapping[str, str]
    """V2 datatype of each input."""
    outputs: tuple[str, ...]
    """The requested outputs; empty: those the model gives by default."""
    raw: bool
    """Inputs came in `raw_input_contents`, so outputs go back that way."""


def decode(message: bytes) -> DecodedRequest:
    """Parse a ModelInferRequest and view its tensors as numpy arrays. Parameters are ignored, as V2 says.

    Raises:
        InvalidRequest: the message is malformed or disagrees with itself; names the field.
        Unimplemented: it asks for shared memory or classification.
    """
    try:
        request = ModelInferRequest.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"not a ModelInferRequest: {error}") from None
    tensors, raws = request.inputs[:], request.raw_input_contents[:]
    names, outputs = _admitted("inputs", tensors), _admitted("outputs", request.outputs[:])
    if raws and len(raws) != len(tensors):
        raise InvalidRequest(
            f"raw_input_contents: {len(raws)} entries for {len(tensors)} inputs, expected one for each"
        )
    inputs: dict[str, Tensor] = {}
    datatypes: dict[str, str] = {}
    for index, name in enumerate(names):
        tensor = tensors[index]
        try:
            inputs[name] = _array(tensor, raws[index] if raws else None)
        except InvalidRequest as error:
            raise InvalidRequest(f"{_field('inputs', index, name)}: {error}") from None
        datatypes[name] = tensor.datatype
    return DecodedRequest(request.model_name, request.model_version, request.id, inputs, datatypes, outputs, bool(raws))


def check(request: DecodedRequest, signature: Signature) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """What `LoadedModel.infer` takes: the inputs under the signature's names, and the outputs to compute.

    Raises:
        InvalidRequest: the request disagrees with the signature; names the field.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    inputs = request.inputs
    if signature.lenient and len(inputs) == 1:
        if len(specs) == 1:
            inputs = dict(zip(specs, inputs.values(), strict=True))
    elif specs or not signature.lenient:
        for index, (name, array) in enumerate(inputs.items()):
            spec = specs.get(name)
            if spec is None:
                raise InvalidRequest(f"{_field('inputs', index, name)}: not an input of the model: {_names(specs)}")
            if signature.lenient:
                continue
            datatype, shape = request.datatypes[name], array.shape
            if datatype != spec.datatype:
                raise InvalidRequest(
                    f"{_field('inputs', index, name)}: datatype is {datatype}, expected {spec.datatype}"
                )
            if len(shape) != len(spec.shape) or not all(map(_fits, shape, spec.shape)):
                raise InvalidRequest(
                    f"{_field('inputs', index, name)}: shape is {list(shape)}, expected {list(spec.shape)}"
                )
        if len(inputs) != len(specs):
            raise InvalidRequest(f"inputs: missing {_names(set(specs) - set(inputs))}")
    outputs = tuple([spec.name for spec in signature.outputs])
    for index, name in enumerate(request.outputs):
        if outputs and name not in outputs:
            raise InvalidRequest(f"{_field('outputs', index, name)}: not an output of the model: {_names(outputs)}")
    return inputs, request.outputs or signature.default_outputs or outputs


def encode(request: DecodedRequest, outputs: Mapping[str, Tensor], *, model_name: str, model_version: str) -> bytes:
    """A ModelInferResponse with the requested outputs in the requested order (none requested: all, as they come).

    Contents are typed when the request's were (KServe does so), raw otherwise and when any output has no typed form.
    Arrays may be of any layout and byte order; `U`, `S` and object arrays of str or bytes become BYTES.

    Raises:
        ModelFailed: the model did not return a requested output, or V2 cannot carry what it returned.
    """
    response = ModelInferResponse(model_name=model_name, model_version=model_version, id=request.id)
    names = request.outputs or tuple(outputs)
    datatypes = [_datatype(name, outputs) for name in names]
    raw = request.raw or not TYPED.keys() >= set(datatypes)
    for name, datatype in zip(names, datatypes, strict=True):
        array = outputs[name]
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            response.raw_output_contents.append(_raw(name, datatype, array))
        else:
            values = _strings(name, array) if datatype == "BYTES" else array.ravel().tolist()
            getattr(output.contents, TYPED[datatype]).extend(values)
    return response.SerializeToString()


def encode_request(inputs: Mapping[str, Tensor], outputs: Iterable[str]) -> bytes:
    """A ModelInferRequest to no model in particular, its tensors raw."""
    request = ModelInferRequest()
    for name, array in inputs.items():
        datatype = _datatype(name, inputs)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(_raw(name, datatype, array))
    for name in outputs:
        request.outputs.add(name=name)
    return request.SerializeToString()


def decode_response(message: bytes) -> dict[str, Tensor]:
    """The tensors of a ModelInferResponse.

    Raises:
        ModelFailed: it is none, or disagrees with itself.
    """
    try:
        response = ModelInferResponse.FromString(message)
        raws: Sequence[bytes | None] = response.raw_output_contents[:] or [None] * len(response.outputs)
        return {output.name: _array(output, raw) for output, raw in zip(response.outputs, raws, strict=True)}
    except (DecodeError, InvalidRequest, ValueError) as error:
        raise ModelFailed(f"the model's answer cannot be read: {error}") from None


def _admitted(
    kind: str, tensors: Sequence[ModelInferRequest.InferInputTensor | ModelInferRequest.InferRequestedOutputTensor]
) -> tuple[str, ...]:
    """The names of tensors that are not too many, differ, and ask for no extension that would change the result."""
    if len(tensors) > MAX_TENSORS:
        raise InvalidRequest(f"{kind}: {len(tensors)} tensors, at most {MAX_TENSORS} are allowed")
    names: dict[str, None] = {}
    for index, tensor in enumerate(tensors):
        name, parameters = tensor.name, tensor.parameters
        if name in names:
            raise InvalidRequest(f"{_field(kind, index, name)}: occurs twice")
        if parameters:
            for refused, why in _REFUSED.items():
                if refused in parameters:
                    raise Unimplemented(f"{_field(kind, index, name)}: {why}")
        names[name] = None
    return tuple(names)


def _array(
    tensor: ModelInferRequest.InferInputTensor | ModelInferResponse.InferOutputTensor, raw: bytes | None
) -> Tensor:
    """One tensor as an array. Errors lack the field's name; nothing is allocated before sizes were compared."""
    datatype, shape = tensor.datatype, tensor.shape[:]
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidRequest(f"unknown datatype {datatype[:64]!r}")
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"shape has {len(shape)} dimensions, at most {MAX_DIMS} are allowed")
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise InvalidRequest(f"shape {shape} has a negative dimension")
    if count == 0 and math.prod([size for size in shape if size]) >= _MAX_ELEMENTS:
        raise InvalidRequest(f"shape {shape} is too large")
    if raw is None:
        return _typed_array(tensor.contents, datatype, dtype, shape, count)
    if tensor.HasField("contents"):
        raise InvalidRequest("contents is set although raw_input_contents is used")
    if dtype.hasobject:
        return np.array(list(_split(raw, count)), dtype).reshape(shape)
    if len(raw) != count * dtype.itemsize:
        expected = f"expected {count * dtype.itemsize} for {datatype} {shape}"
        raise InvalidRequest(f"raw_input_contents holds {len(raw)} bytes, {expected}")
    array: Tensor = np.ndarray(shape, dtype, raw)  # a view: upb's bytes objects are aligned to 16
    # Refused, not normalised: a bool of 2 is undefined in numpy and C, and no writer of bools produces one.
    if datatype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        raise InvalidRequest("raw_input_contents holds a BOOL that is neither 0 nor 1")
    return array


def _typed_array(
    contents: InferTensorContents, datatype: str, dtype: np.dtype[Any], shape: list[int], count: int
) -> Tensor:
    field = TYPED.get(datatype)
    if field is None:
        raise InvalidRequest(f"{datatype} has no typed contents: send it in raw_input_contents")
    present = [descriptor.name for descriptor, _ in contents.ListFields()]
    if present not in ([], [field]):
        raise InvalidRequest(f"contents has {', '.join(present)}, expected {field} for {datatype}")
    values = getattr(contents, field)
    if len(values) != count:
        expected = f"expected {count} for {datatype} {shape}"
        raise InvalidRequest(f"contents.{field} holds {len(values)} elements, {expected}")
    if dtype.hasobject:
        return np.array(list(values), dtype).reshape(shape)
    if dtype.kind == "f":
        # A packed field of fixed-size numbers ends, on the wire, in the very bytes of the array: 100 times faster
        # than one Python object per element.
        contents.DiscardUnknownFields()
        packed = contents.SerializeToString()
        return np.frombuffer(packed[len(packed) - count * dtype.itemsize :], dtype).reshape(shape)
    wide = np.fromiter(values, np.int64 if datatype in _NARROW else dtype, count)
    array: Tensor = wide.astype(dtype, copy=False).reshape(shape)
    if datatype in _NARROW and not np.array_equal(array.ravel(), wide):
        limits = np.iinfo(dtype)
        raise InvalidRequest(f"contents.{field} holds a value outside {limits.min} to {limits.max}, for {datatype}")
    return array


def _split(raw: bytes, count: int) -> Iterator[bytes]:
    """The elements of a raw BYTES tensor: each a 4-byte little-endian length and that many bytes."""
    at = 0
    for found in range(count):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise InvalidRequest(f"raw_input_contents ends inside BYTES element {found} of {count}")
        yield raw[start:at]
    if at != len(raw):
        raise InvalidRequest(f"raw_input_contents holds {len(raw) - at} bytes after the last of {count} BYTES elements")


def _datatype(name: str, outputs: Mapping[str, Tensor]) -> str:
    if name not in outputs:
        raise ModelFailed(f"output {name!r}: the model did not return it")
    try:
        return datatype_of(outputs[name].dtype)
    except ValueError as error:
        raise ModelFailed(f"output {name!r}: {error}") from None


def _raw(name: str, datatype: str, array: Tensor) -> bytes:
    if datatype == "BYTES":
        return b"".join([len(item).to_bytes(4, "little") + item for item in _strings(name, array)])
    return array.astype(DTYPES[datatype], copy=False).tobytes()  # tobytes is row-major whatever the layout


def _fits(size: int, expected: int) -> bool:
    return expected in (-1, size)


def _strings(name: str, array: Tensor) -> list[bytes]:
    items: list[bytes] = []
    for item in array.ravel().tolist():
        try:
            items.append(item if isinstance(item, bytes) else item.encode())
        except (AttributeError, UnicodeEncodeError):
            raise ModelFailed(f"output {name!r}: BYTES element {item!r:.64} is neither bytes nor UTF-8 text") from None
    return items


def _field(kind: str, index: int, name: str) -> str:
    return f"{kind}[{index}] {name[:64]!r}"  # names are the client's, and errors travel in a header


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:64]) for name in sorted(names)[:16])
