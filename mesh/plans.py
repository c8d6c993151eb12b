"""Requests that differ only in their tensors' bytes are worked out once: decoded, checked and half encoded.

The bytes of a ModelInferRequest before `raw_input_contents`, without its id, are the key: what they mean for a loaded
model is a function of them alone. Whatever is not known yet, or not of this form, takes the long way (`mesh.tensors`),
and so does everything that would be refused, so that there is one place that says why.

Source: Protocol Buffers, "Encoding"; Open Inference Protocol, gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loaders.base import Tensor
from loaders.datatypes import datatype_of
from mesh.rowwise import Kind, kind_of, rows_of
from mesh.tensors import DecodedRequest
from protos.inference_pb2 import ModelInferResponse

Tensors = tuple[bytes, ...]
"""The bytes of a request's tensors."""
Split = tuple[bytes, str, bytes, Tensors]
"""A request's key, its model's name, its id's field, its tensors."""

_NAME: Final = 1 << 3 | 2
_ID: Final = 3 << 3 | 2
_RAW: Final = 7 << 3 | 2
_RAW_OUTPUT: Final = bytes((6 << 3 | 2,))
_KEPT_PLANS: Final = 64
_KEY_BYTES: Final = 1_024
_MEMO_ENTRIES: Final = 4_096
_HEAD_BYTES: Final = 48
_memo: Final[dict[bytes, tuple[int, bytes, bytes, str, bytes]]] = {}
"""By first bytes, for requests with one tensor: the message's length, all before the tensor, and what `split` says."""
_VIEWED_BYTES: Final = 65_536
"""Arrays from this size on are copied once less; for smaller ones a view costs more than the copy."""


@dataclass(slots=True)
class Plan:
    """What is known of all requests with one key."""

    inputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
    """Under the signature's names: dtype, shape."""
    sizes: list[int]
    """Bytes of each input."""
    outputs: tuple[str, ...]
    """What the model is to compute."""
    rows: int
    """First dimension of all inputs; 0: they have none in common."""
    kind: Kind
    requested: tuple[str, ...]
    """What the client asked for; empty: all."""
    answer: tuple[tuple[str, np.dtype[Any], tuple[int, ...], bytes], ...] = ()
    """Outputs of the last answer: name, dtype, shape, and the head of its bytes' field."""
    named: bytes = b""
    """Fields 1 and 2 of the answer."""
    described: bytes = b""
    """Field 5 of the answer, once for each output."""

    def fits(self, tensors: Tensors) -> bool:
        """Whether the tensors have the bytes they should have."""
        return [*map(len, tensors)] == self.sizes

    def stacked(self, requests: Sequence[Tensors]) -> dict[str, Tensor]:
        """The inputs of several requests as one; all of them have at least one dimension."""
        count = len(requests)
        return {
            name: np.ndarray((count * shape[0], *shape[1:]), dtype, b"".join([tensors[n] for tensors in requests]))
            for n, (name, dtype, shape) in enumerate(self.inputs)
        }

    def arrays(self, tensors: Tensors) -> dict[str, Tensor]:
        """The inputs. Each has its own bytes object, so that it is aligned."""
        return {
            name: np.ndarray(shape, dtype, tensor)
            for tensor, (name, dtype, shape) in zip(tensors, self.inputs, strict=True)
        }


def split(message: bytes) -> Split | None:
    """None: the request is not of the form that has a key."""
    known = _memo.get(message[:_HEAD_BYTES])
    if known is not None and known[0] == len(message) and message.startswith(known[1]):
        _, prefix, key, name, id_field = known  # the same but for the tensor, as in `wire.peek_string`
        return key, name, id_field, (message[len(prefix) :],)
    at, end = 0, len(message)
    id_start = id_stop = raw_start = 0
    name = ""
    spans: list[tuple[int, int]] = []
    try:
        while at < end:
            start, tag = at, message[at]
            size = message[at + 1]
            at += 2
            if size >= 0x80:
                size, at = _varint(size, message, at)
            if tag == _RAW:
                raw_start = raw_start or start
                spans.append((at, at + size))
            elif spans or tag >= _RAW or tag & 7 != 2:
                return None  # nothing after the tensors, nothing unusual before them
            elif tag == _NAME:
                name = message[at : at + size].decode()
            elif tag == _ID:
                if id_stop:
                    return None
                id_start, id_stop = start, at + size
            at += size
    except (IndexError, UnicodeDecodeError):
        return None
    if at != end or not spans or raw_start > _KEY_BYTES:
        return None
    key = message[:id_start] + message[id_stop:raw_start] if id_stop else message[:raw_start]
    id_field = message[id_start:id_stop]
    if len(spans) == 1:
        if len(_memo) >= _MEMO_ENTRIES:
            _memo.clear()
        _memo[message[:_HEAD_BYTES]] = end, message[: spans[0][0]], key, name, id_field
    return key, name, id_field, tuple([message[start:stop] for start, stop in spans])


class Plans:
    """The plans of one loaded model."""

    __slots__ = ("_plans",)

    def __init__(self) -> None:
        self._plans: dict[bytes, Plan] = {}

    def get(self, key: bytes, tensors: Tensors) -> Plan | None:
        """The plan of requests like this one, if there was one before."""
        plan = self._plans.get(key)
        return plan if plan is not None and plan.fits(tensors) else None

    def keep(self, key: bytes, request: DecodedRequest, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> None:
        """Remember a request that was found right, if those like it can be told from their bytes' sizes alone."""
        if not request.raw or not request.model_name:
            return
        if any(array.dtype.hasobject or array.dtype.kind == "b" for array in inputs.values()):
            return  # BYTES and BOOL: also their values can be wrong
        if len(self._plans) >= _KEPT_PLANS:
            self._plans.clear()
        shapes = tuple((name, array.dtype, array.shape) for name, array in inputs.items())
        sizes = [array.nbytes for array in inputs.values()]
        self._plans[key] = Plan(shapes, sizes, outputs, rows_of(inputs), kind_of(inputs, outputs), request.outputs)


def answered(plan: Plan, id_field: bytes, outputs: Mapping[str, Tensor]) -> bytes | None:
    """The ModelInferResponse, byte for byte what `tensors.encode` makes; None: like no answer before it."""
    answer = plan.answer
    if not answer or (not plan.requested and len(outputs) != len(answer)):
        return None
    parts: list[bytes | memoryview] = [plan.named, id_field, plan.described]
    for name, dtype, shape, head in answer:
        array = outputs.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            return None
        parts.append(head)
        if array.nbytes < _VIEWED_BYTES or not array.flags.c_contiguous:
            parts.append(array.tobytes())
        else:
            parts.append(array.reshape(-1).view(np.uint8).data)
    return b"".join(parts)


def answered_together(plan: Plan, id_fields: Sequence[bytes], outputs: Mapping[str, Tensor]) -> list[bytes] | None:
    """As `answered`, for requests that were run as one; None: not all of them like an answer before them."""
    count = len(id_fields)
    if not plan.requested and len(outputs) != len(plan.answer):
        return None
    columns: list[tuple[bytes, bytes, int]] = []
    for name, dtype, shape, head in plan.answer:
        array = outputs.get(name)
        if array is None or array.dtype != dtype or array.shape != (count * shape[0], *shape[1:]):
            return None
        columns.append((head, array.tobytes(), array.nbytes // count))
    named, described = plan.named, plan.described
    if len(columns) == 1:
        ((head, data, size),) = columns
        start, described = 0, described + head
        responses = []
        for id_field in id_fields:
            responses.append(b"".join((named, id_field, described, data[start : start + size])))
            start += size
        return responses
    return [
        b"".join(
            (
                *(named, id_field, described),
                *(part for head, data, size in columns for part in (head, data[n * size : (n + 1) * size])),
            )
        )
        for n, id_field in enumerate(id_fields)
    ]


def learn(plan: Plan, outputs: Mapping[str, Tensor], *, model_name: str, model_version: str) -> None:
    """Remember how an answer looked that `tensors.encode` has made."""
    names = plan.requested or tuple(outputs)
    arrays = [outputs[name] for name in names]
    if any(array.dtype.hasobject or array.dtype.kind in "SU" or not array.dtype.isnative for array in arrays):
        return
    response = ModelInferResponse()
    for name, array in zip(names, arrays, strict=True):
        response.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
    plan.named = ModelInferResponse(model_name=model_name, model_version=model_version).SerializeToString()
    plan.described = response.SerializeToString()
    plan.answer = tuple(
        (name, array.dtype, array.shape, _RAW_OUTPUT + _length(array.nbytes))
        for name, array in zip(names, arrays, strict=True)
    )


def _varint(value: int, message: bytes, at: int) -> tuple[int, int]:
    """The rest of a length whose first byte was not its last, and where it ends.

    Raises:
        IndexError: the message ends first.
    """
    value &= 0x7F
    for shift in (7, 14, 21, 28):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _length(size: int) -> bytes:
    out = bytearray()
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
