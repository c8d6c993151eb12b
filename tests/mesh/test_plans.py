"""The short way gives, byte for byte, what the long way gives, and takes nothing that the long way would refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.base import Signature, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from mesh.errors import MeshError
from mesh.plans import Plans, answered, learn, split
from mesh.tensors import check, decode, encode
from protos.inference_pb2 import ModelInferRequest

LENIENT = Signature((TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), "test", lenient=True)
STRICT = Signature(
    (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,))),
    (TensorSpec("y", "FP32", (-1,)), TensorSpec("z", "INT64", (-1,))),
    "test",
)


def model(inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    arrays = list(inputs.values())
    return {name: arrays[n % len(arrays)] for n, name in enumerate(outputs)}


def the_long_way(message: bytes, signature: Signature) -> bytes | str:
    try:
        request = decode(message)
        inputs, outputs = check(request, signature)
        return encode(request, model(dict(inputs), outputs), model_name=request.model_name, model_version="7")
    except MeshError as error:
        return str(error)


class Planned:
    """As `Inference._infer_here` does it."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.plans = Plans()
        self.short = 0

    def __call__(self, message: bytes) -> bytes | str:
        found = split(message)
        plan = self.plans.get(found[0], found[3]) if found else None
        if found is None or plan is None:
            answer = the_long_way(message, self.signature)
            if found is not None and isinstance(answer, bytes):
                request = decode(message)
                self.plans.keep(found[0], request, *check(request, self.signature))
            return answer
        _, _, id_field, tensors = found
        results = model(plan.arrays(tensors), plan.outputs)
        response = answered(plan, id_field, results)
        if response is None:
            request = decode(message)
            learn(plan, results, model_name=request.model_name, model_version="7")
            return encode(request, results, model_name=request.model_name, model_version="7")
        self.short += 1
        return response


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Mostly right for one of the signatures; sometimes with something missing, wrong or in another order."""
    request = ModelInferRequest(
        model_name=draw(st.sampled_from(["m", "", "other"])), id=draw(st.sampled_from(["", "1", "é"]))
    )
    strict = draw(st.booleans())
    for name, datatype, tail in (("a", "FP32", [2]), ("b", "INT64", [])) if strict else (("x", None, [3]),):
        datatype = datatype or draw(st.sampled_from(sorted(DTYPES)))
        shape = [draw(st.integers(0, 3)), *tail]
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        size = int(np.prod(shape)) * (DTYPES[datatype].itemsize if datatype != "BYTES" else 4)
        size += draw(st.sampled_from([0] * 8 + [1, -1]))
        request.raw_input_contents.append(draw(st.binary(min_size=max(size, 0), max_size=max(size, 0))))
    for name in draw(st.sampled_from([(), (), ("y",), ("z", "y"), ("none",)])):
        request.outputs.add(name=name)
    if draw(st.integers(0, 9)) == 0:
        del request.raw_input_contents[-1]
    message = request.SerializeToString()
    extra = draw(st.sampled_from([b""] * 8 + [b"\x1a\x01x", b"\x78\x01", b"\x7a\x00", b"\x3a\x01a", b"\x1a"]))
    return extra + message if draw(st.booleans()) else message + extra


@given(st.lists(requests(), min_size=1, max_size=12), st.sampled_from([LENIENT, STRICT]))
@settings(max_examples=400, deadline=None)
def test_both_ways_give_the_same(messages: list[bytes], signature: Signature) -> None:
    planned = Planned(signature)
    for message in messages * 3:
        assert planned(message) == the_long_way(message, signature)


def simple(**changed: Any) -> bytes:
    fields: dict[str, Any] = {"model_name": "m", "id": "1", "raw_input_contents": [bytes(12)], **changed}
    request = ModelInferRequest(**fields)
    request.inputs.add(name="x", datatype="FP32", shape=[3])
    return request.SerializeToString()


def test_the_short_way_is_taken() -> None:
    """By requests that differ in nothing but their id and their tensors."""
    planned = Planned(LENIENT)
    for n in range(5):
        message = simple(id="n" * n, raw_input_contents=[np.arange(n, n + 3, dtype="<f4").tobytes()])
        assert planned(message) == the_long_way(message, LENIENT)
    assert planned.short == 3


def test_plans_are_bounded() -> None:
    planned = Planned(LENIENT)
    for n in range(1_000):
        planned(simple(model_name=f"m{n}"))
    assert len(planned.plans._plans) <= 64
    assert split(simple(model_name="m" * 5_000)) is None


def test_tensors_are_aligned_and_read_only() -> None:
    planned = Planned(LENIENT)
    planned(simple())
    found = split(simple())
    assert found is not None
    key, name, _, tensors = found
    assert name == "m"
    plan = planned.plans.get(key, tensors)
    assert plan is not None
    inputs = plan.arrays(tensors)
    assert inputs["x"].flags.aligned
    assert not inputs["x"].flags.writeable
