"""Requests that differ only in their tensors' bytes are worked out once: decoded, checked and half encoded.

The bytes of a ModelInferRequest before `raw_input_contents`, without its id, are the key: what they mean for a loaded
model is a function of them alone. Whatever is not known yet, or not of this form, takes the long way (`mesh.tensors`),
and so does everything that would be refused, so that there is one place that says why.

Source: Protocol Buffers, "Encoding"; Open Inference Protocol, gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loaders.base import Tensor
from loaders.datatypes import datatype_of
from mesh.tensors import DecodedRequest
from protos.inference_pb2 import ModelInferResponse

_ID: Final = 3 << 3 | 2
_RAW: Final = 7 << 3 | 2
_RAW_OUTPUT: Final = bytes((6 << 3 | 2,))
_KEPT_PLANS: Final = 64
_KEY_BYTES: Final = 2_048
_HEAD_BYTES: Final = 48
_VIEWED_BYTES: Final = 65_536
"""Arrays from this size on are copied once less; for smaller ones a view costs more than the copy."""


@dataclass(slots=True)
class Plan:
    """What is known of all requests with one key."""

    inputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
    """Under the signature's names: dtype, shape, bytes."""
    outputs: tuple[str, ...]
    """What the model is to compute."""
    requested: tuple[str, ...]
    """What the client asked for; empty: all."""
    answer: tuple[tuple[str, np.dtype[Any], tuple[int, ...], bytes], ...] = ()
    """Outputs of the last answer: name, dtype, shape, and the head of its bytes' field."""
    named: bytes = b""
    """Fields 1 and 2 of the answer."""
    described: bytes = b""
    """Field 5 of the answer, once for each output."""


class Plans:
    """The plans of one loaded model."""

    __slots__ = ("_plans", "_whole")

    def __init__(self) -> None:
        self._plans: dict[bytes, Plan] = {}
        self._whole: dict[bytes, tuple[int, bytes, bytes, Plan]] = {}
        """By first bytes, for requests with one tensor: the message's length, all before the tensor, the id's field."""

    def find(self, message: bytes) -> tuple[bytes | None, Plan | None, bytes, dict[str, Tensor]]:
        """The key, if the message has one; its plan, if there is one; then also the id's field and the inputs."""
        at, end = 0, len(message)
        whole = self._whole.get(message[:_HEAD_BYTES])
        if whole is not None and whole[0] == end and message.startswith(whole[1]):
            _, prefix, id_field, known = whole  # the same but for the tensor, as in `wire.peek_string`
            ((name, dtype, shape, _),) = known.inputs
            return b"", known, id_field, {name: np.ndarray(shape, dtype, message[len(prefix) :])}
        id_start = id_stop = raw_start = 0
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
                    return None, None, b"", {}  # nothing after the tensors, nothing unusual before them
                elif tag == _ID:
                    if id_stop:
                        return None, None, b"", {}
                    id_start, id_stop = start, at + size
                at += size
        except IndexError:
            return None, None, b"", {}
        if at != end or not spans or raw_start > _KEY_BYTES:
            return None, None, b"", {}
        key = message[:id_start] + message[id_stop:raw_start] if id_stop else message[:raw_start]
        plan = self._plans.get(key)
        if plan is None or len(plan.inputs) != len(spans):
            return key, None, b"", {}
        inputs: dict[str, Tensor] = {}
        for (name, dtype, shape, size), (start, stop) in zip(plan.inputs, spans, strict=True):
            if stop - start != size:
                return key, None, b"", {}
            inputs[name] = np.ndarray(shape, dtype, message[start:stop])  # a copy: views would not be aligned
        id_field = message[id_start:id_stop]
        if len(spans) == 1:
            if len(self._whole) >= _KEPT_PLANS:
                self._whole.clear()
            self._whole[message[:_HEAD_BYTES]] = end, message[: spans[0][0]], id_field, plan
        return key, plan, id_field, inputs

    def keep(self, key: bytes, request: DecodedRequest, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> None:
        """Remember a request that was found right, if those like it can be told from their bytes' sizes alone."""
        if not request.raw or not request.model_name:
            return
        if any(array.dtype.hasobject or array.dtype.kind == "b" for array in inputs.values()):
            return  # BYTES and BOOL: also their values can be wrong
        if len(self._plans) >= _KEPT_PLANS:
            self._plans.clear()
            self._whole.clear()
        shapes = tuple((name, array.dtype, array.shape, array.nbytes) for name, array in inputs.items())
        self._plans[key] = Plan(shapes, outputs, request.outputs)


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
