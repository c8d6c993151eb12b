"""V2 tensors: every datatype, both forms of contents, and every way in which a request can disagree with itself."""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loaders.base import Signature, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from mesh.errors import InvalidRequest, ModelFailed, Unimplemented
from mesh.tensors import TYPED, DecodedRequest, check, decode, encode
from protos.inference_pb2 import ModelInferRequest, ModelInferResponse

TRITON = """
import pickle, sys
import ml_dtypes
import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import np_to_triton_dtype

DTYPES = "bool u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()
arrays = {np_to_triton_dtype(np.dtype(d)): np.array([[0, 1, 1], [1, 0, 1]], d) for d in DTYPES}
arrays["BF16"] = np.array([[0, 1, -2.5], [1e30, -0.5, 3]], ml_dtypes.bfloat16)
arrays["BYTES"] = np.array([[b"", "ä".encode(), b"a,b"], [b"0" * 300, b"1", b"2"]], object)
messages = {}
for datatype, array in arrays.items():
    tensor = InferInput("x", array.shape, datatype)
    tensor.set_data_from_numpy(array)
    messages[datatype] = _get_inference_request(
        model_name="m", inputs=[tensor], model_version="3", request_id="7", outputs=[InferRequestedOutput("x")],
        sequence_id=0, sequence_start=False, sequence_end=False, priority=2, timeout=9, parameters=None,
    ).SerializeToString()
pickle.dump((arrays, messages), sys.stdout.buffer)
sys.stdout.flush()
for datatype, message in pickle.load(sys.stdin.buffer).items():
    result = InferResult(service_pb2.ModelInferResponse.FromString(message))
    np.testing.assert_array_equal(result.as_numpy("x"), arrays[datatype])
    assert result.get_output("x").datatype == datatype and result.get_response().id == "7"
"""

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT8", ())),
    outputs=(TensorSpec("y", "FP32", (-1,)), TensorSpec("z", "BYTES", (-1,))),
    platform="test",
)


def raw_bytes(array: Tensor) -> bytes:
    if array.dtype.hasobject:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())
    return array.tobytes()


def request(*tensors: tuple[str, str, Tensor], raw: bool = True, outputs: tuple[str, ...] = ()) -> ModelInferRequest:
    made = ModelInferRequest(model_name="m", model_version="3", id="7", outputs=[{"name": name} for name in outputs])
    for name, datatype, array in tensors:
        tensor = made.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            made.raw_input_contents.append(raw_bytes(array))
        else:
            getattr(tensor.contents, TYPED[datatype]).extend(array.ravel().tolist())
    return made


def arrays(datatype: str) -> st.SearchStrategy[Tensor]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(object, shapes, elements=st.binary(max_size=20), fill=st.nothing())
    if datatype == "BF16":
        return hnp.arrays(np.uint16, shapes).map(lambda array: array.view(DTYPES["BF16"]))
    return hnp.arrays(DTYPES[datatype], shapes)


def same(left: Tensor, right: Tensor, datatype: str) -> None:
    assert left.dtype == right.dtype == DTYPES[datatype]
    assert left.shape == right.shape
    if datatype == "BF16":
        left, right = left.view(np.uint16), right.view(np.uint16)
    np.testing.assert_array_equal(left, right)


def test_what_tritonclient_sends_and_reads() -> None:
    # Triton's client is the reference writer of raw contents. Its messages need a process of their own.
    with subprocess.Popen([sys.executable, "-c", TRITON], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin
        assert client.stdout
        sent, messages = pickle.load(client.stdout)
        assert messages.keys() == DTYPES.keys()
        responses = {}
        for datatype, message in messages.items():
            decoded = decode(message)
            assert (decoded.model_name, decoded.model_version, decoded.id) == ("m", "3", "7")
            assert (decoded.raw, decoded.outputs, decoded.datatypes) == (True, ("x",), {"x": datatype})
            same(decoded.inputs["x"], sent[datatype], datatype)
            responses[datatype] = encode(decoded, decoded.inputs, model_name="m", model_version="3")
        pickle.dump(responses, client.stdin)
    assert client.returncode == 0


@pytest.mark.parametrize(
    ("datatype", "raw"), [(name, raw) for name in DTYPES for raw in (True, False) if raw or name in TYPED]
)
def test_decode_and_encode_are_inverse(datatype: str, raw: bool) -> None:
    # Open Inference Protocol, Tensor Contents: FP16 (and BF16) "must be represented in raw_input_contents"
    @settings(max_examples=40)
    @given(arrays(datatype))
    def check_array(array: Tensor) -> None:
        decoded = decode(request(("x", datatype, array), raw=raw).SerializeToString())
        same(decoded.inputs["x"], array, datatype)
        assert decoded.inputs["x"].flags.c_contiguous
        assert decoded.inputs["x"].flags.aligned
        response = ModelInferResponse.FromString(encode(decoded, {"x": array}, model_name="a", model_version="b"))
        assert (response.model_name, response.model_version, response.id) == ("a", "b", "7")
        assert len(response.raw_output_contents) == (decoded.raw or datatype not in TYPED)
        back = ModelInferRequest(raw_input_contents=response.raw_output_contents)
        back.inputs.add().MergeFromString(response.outputs[0].SerializeToString())
        same(decode(back.SerializeToString()).inputs["x"], array, datatype)

    check_array()


contents = st.fixed_dictionaries(
    {},
    optional={
        "bool_contents": st.lists(st.booleans(), max_size=3),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
        "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=3),
        "fp32_contents": st.lists(st.floats(width=32), max_size=3),
        "bytes_contents": st.lists(st.binary(max_size=4), max_size=3),
    },
)
tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "n", ""]),
        "datatype": st.sampled_from([*DTYPES, "STRING", ""]),
        "shape": st.lists(st.sampled_from([1, -1, 2, 0, 3, 2**31, 2**62, 2**63 - 1]), max_size=4),
    },
    optional={"contents": contents},
)
requests = st.builds(
    lambda inputs, raws: ModelInferRequest(inputs=inputs, raw_input_contents=raws[: len(inputs)]).SerializeToString(),
    st.lists(tensors, max_size=3),
    st.lists(st.one_of(st.binary(max_size=8), st.just(b""), st.just(bytes(4))), max_size=4),
)


@settings(max_examples=400)
@given(st.one_of(requests, st.binary(max_size=200)), st.booleans())
def test_no_message_raises_anything_but_a_refusal(message: bytes, lenient: bool) -> None:
    signature = Signature(SIGNATURE.inputs[:1], SIGNATURE.outputs, "test", lenient)
    with contextlib.suppress(InvalidRequest, Unimplemented):
        assert list(check(decode(message), signature)[0]) == ["x"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # Raw Tensor Contents
        ("x.shape[0] = 3", "inputs[0] 'x': raw_input_contents holds 16 bytes, expected 24 for FP32 [3, 2]"),
        ("x.shape.append(2**62)", f"raw_input_contents holds 16 bytes, expected {2**66} for FP32 [2, 2, {2**62}]"),
        ("r.raw_input_contents.pop()", "raw_input_contents: 1 entries for 2 inputs, expected one for each"),
        ("n.contents.int_contents.append(1)", "inputs[1] 'n': contents is set although raw_input_contents is used"),
        ("x.datatype = 'BOOL'; x.shape.append(4)", "'x': raw_input_contents holds a BOOL that is neither 0 nor 1"),
        # Inference Request: names, datatypes, shapes
        ("x.datatype = 'FP31'", "inputs[0] 'x': unknown datatype 'FP31'"),
        ("x.shape[0] = -2", "inputs[0] 'x': shape [-2, 2] has a negative dimension"),
        ("x.shape[:] = [-2, -2]", "inputs[0] 'x': shape [-2, -2] has a negative dimension"),
        ("x.shape[:] = [2**62, 0, 2**62]", "is too large"),
        ("x.shape.extend([1] * 31)", "inputs[0] 'x': shape has 33 dimensions, at most 32 are allowed"),
        ("n.name = 'x'", "inputs[1] 'x': occurs twice"),
        ("n.name = 'q' * 999", f"inputs[1] '{'q' * 64}': not an input of the model: 'n', 'x'"),
        ("r.inputs.pop(); r.raw_input_contents.pop()", "inputs: missing 'n'"),
        ("n.datatype = 'UINT8'", "inputs[1] 'n': datatype is UINT8, expected INT8"),
        ("x.shape.append(1)", "inputs[0] 'x': shape is [2, 2, 1], expected [-1, 2]"),
        ("x.shape[:] = [4, 1]", "inputs[0] 'x': shape is [4, 1], expected [-1, 2]"),
        ("r.outputs.add(name='w')", "outputs[1] 'w': not an output of the model: 'y', 'z'"),
        ("r.outputs.add(name='z')", "outputs[1] 'z': occurs twice"),
        ("r.inputs.extend([x] * 255)", "inputs: 257 tensors, at most 256 are allowed"),
        ("r.outputs.extend(r.outputs[:] * 256)", "outputs: 257 tensors, at most 256 are allowed"),
        # Triton: Shared-Memory Extension, Classification Extension
        ("x.parameters['shared_memory_region'].string_param = 's'", "inputs[0] 'x': shared memory does not reach"),
        ("z.parameters['shared_memory_region'].string_param = 's'", "outputs[0] 'z': shared memory does not reach"),
        ("x.parameters['shared_memory_region']; r.raw_input_contents.pop()", "shared memory does not reach"),
        ("z.parameters['classification'].int64_param = 3", "outputs[0] 'z': classification is not supported"),
    ],
)
def test_a_request_that_disagrees_is_refused_by_field(change: str, sentence: str) -> None:
    good = request(("x", "FP32", np.ones((2, 2), "f4")), ("n", "INT8", np.array(1, "i1")), outputs=("z",))
    check(decode(good.SerializeToString()), SIGNATURE)
    exec(change, {"r": good, "x": good.inputs[0], "n": good.inputs[1], "z": good.outputs[0]})
    with pytest.raises(Unimplemented if ".parameters[" in change else InvalidRequest) as caught:
        check(decode(good.SerializeToString()), SIGNATURE)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("datatype", "shape", "contents", "sentence"),
    [
        ("FP32", [2], {"fp32_contents": [1]}, "contents.fp32_contents holds 1 elements, expected 2 for FP32 [2]"),
        ("FP32", [1], {"fp64_contents": [1]}, "contents has fp64_contents, expected fp32_contents for FP32"),
        (
            "FP32",
            [1],
            {"fp32_contents": [1], "int_contents": [1]},
            "contents has int_contents, fp32_contents, expected",
        ),
        ("FP16", [1], {"fp32_contents": [1]}, "FP16 has no typed contents: send it in raw_input_contents"),
        ("BF16", [0], {}, "BF16 has no typed contents"),
        ("INT8", [1], {"int_contents": [128]}, "contents.int_contents holds a value outside -128 to 127, for INT8"),
        ("UINT16", [2], {"uint_contents": [0, 65536]}, "holds a value outside 0 to 65535, for UINT16"),
        ("FP32", [2**40], {}, f"contents.fp32_contents holds 0 elements, expected {2**40}"),
        ("FP32", [2**62, 0, 2**62], {}, "is too large"),
    ],
)
def test_typed_contents_that_disagree_are_refused(
    datatype: str, shape: list[int], contents: dict[str, Any], sentence: str
) -> None:
    # Open Inference Protocol, Tensor Contents: one field per datatype
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "contents": contents}
    with pytest.raises(InvalidRequest) as caught:
        decode(ModelInferRequest(inputs=[tensor]).SerializeToString())
    assert str(caught.value).startswith("inputs[0] 'x': ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"\1\0\0\0a", "ends inside BYTES element 1 of 2"),
        (b"\1\0\0\0a\1\0\0", "ends inside BYTES element 1 of 2"),
        (b"\1\0\0\0a\2\0\0\0b", "ends inside BYTES element 1 of 2"),
        (b"\xff\xff\xff\xffa", "ends inside BYTES element 0 of 2"),
        (bytes(9), "holds 1 bytes after the last of 2 BYTES elements"),
    ],
)
def test_raw_bytes_that_disagree_are_refused(raw: bytes, sentence: str) -> None:
    # Open Inference Protocol, Raw Tensor Contents: "prefixed by its length as a 4-byte little-endian integer"
    tensor = {"name": "x", "datatype": "BYTES", "shape": [2]}
    with pytest.raises(InvalidRequest, match=sentence):
        decode(ModelInferRequest(inputs=[tensor], raw_input_contents=[raw]).SerializeToString())


def test_unknown_fields_and_parameters_are_ignored() -> None:
    # Open Inference Protocol, Parameters: "unrecognized parameters" are no error; Protocol Buffers, Unknown Fields
    made = request(("x", "FP32", np.arange(2, dtype="f4")), raw=False)
    made.parameters["sequence_id"].int64_param = 3
    made.inputs[0].contents.MergeFromString(b"\x9a\x06\x05extra")
    assert decode(made.SerializeToString()).inputs["x"].tolist() == [0, 1]


def test_a_lenient_model_takes_its_one_input_under_any_name_datatype_and_shape() -> None:
    # KServe's clients say `input-0`, MLServer's `predict`
    outputs = (TensorSpec("predict", "INT64", (-1,)), TensorSpec("predict_proba", "FP32", (-1, 2)))
    lenient = Signature((TensorSpec("predict", "FP32", (-1, 2)),), outputs, "sklearn", True, ("predict",))
    made = request(("input-0", "FP64", np.ones(3)))
    inputs, asked = check(decode(made.SerializeToString()), lenient)
    assert (list(inputs), inputs["predict"].tolist(), asked) == (["predict"], [1, 1, 1], ("predict",))
    made.outputs.add(name="predict_proba")
    assert check(decode(made.SerializeToString()), lenient)[1] == ("predict_proba",)
    made.inputs.add(name="more", datatype="BOOL")
    made.raw_input_contents.append(b"\1")
    with pytest.raises(InvalidRequest, match=r"inputs\[0\] 'input-0': not an input of the model: 'predict'"):
        check(decode(made.SerializeToString()), lenient)


def test_a_model_that_does_not_tell_what_it_takes_is_handed_everything() -> None:
    # MLServer hands custom models the request as it came
    made = request(("x", "FP64", np.ones(3)), ("n", "INT8", np.array(1, "i1")))
    free = Signature((), (), "python", lenient=True)
    inputs, asked = check(decode(made.SerializeToString()), free)
    assert (list(inputs), asked) == (["x", "n"], ())
    made.outputs.add(name="y")
    assert check(decode(made.SerializeToString()), free)[1] == ("y",)
    told = Signature((), (TensorSpec("z", "FP32", (-1,)),), "python", lenient=True)
    with pytest.raises(InvalidRequest, match=r"outputs\[0\] 'y': not an output of the model: 'z'"):
        check(decode(made.SerializeToString()), told)


def test_all_outputs_are_computed_when_none_is_requested() -> None:
    made = request(("x", "FP32", np.ones((0, 2), "f4")), ("n", "INT8", np.array(1, "i1")))
    assert check(decode(made.SerializeToString()), SIGNATURE)[1] == ("y", "z")


ASKED = DecodedRequest("m", "", "7", {}, {}, ("b", "a"), raw=True)


def test_outputs_of_any_layout_are_written_in_the_order_asked() -> None:
    outputs = {
        "a": np.arange(6, dtype=">i4").reshape(2, 3).T,
        "b": np.array([["ä", "b"], ["c", "d"]])[:, ::-1],
        "c": np.zeros(1),
    }
    response = ModelInferResponse.FromString(encode(ASKED, outputs, model_name="m", model_version=""))
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in response.outputs] == [
        ("b", "BYTES", [2, 2]),
        ("a", "INT32", [3, 2]),
    ]
    assert response.raw_output_contents[0] == b"\1\0\0\0b\2\0\0\0\xc3\xa4\1\0\0\0d\1\0\0\0c"
    assert response.raw_output_contents[1] == np.array([0, 3, 1, 4, 2, 5], "<i4").tobytes()


def test_contents_are_typed_when_the_request_was_and_all_outputs_can_be() -> None:
    # kserve/protocol/infer_type.py, InferResponse.to_grpc; FP16 has no typed form
    asked = DecodedRequest("m", "", "7", {}, {}, (), raw=False)
    outputs: dict[str, Tensor] = {"s": np.array([b"a"], "S4"), "i": np.array([[1], [2]], "u1")}
    response = ModelInferResponse.FromString(encode(asked, outputs, model_name="m", model_version=""))
    assert [list(response.outputs[0].contents.bytes_contents), list(response.outputs[1].contents.uint_contents)] == [
        [b"a"],
        [1, 2],
    ]
    outputs["h"] = np.ones(1, np.float16)
    response = ModelInferResponse.FromString(encode(asked, outputs, model_name="m", model_version=""))
    assert len(response.raw_output_contents) == 3
    assert not any(tensor.HasField("contents") for tensor in response.outputs)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (np.zeros(1, complex), "output 'b': V2 has no datatype for numpy complex128"),
        (np.array([None], object), "output 'b': BYTES element None is neither bytes nor UTF-8 text"),
        (np.array(["\ud800"], object), "is neither bytes nor UTF-8 text"),
    ],
)
def test_what_v2_cannot_carry_is_the_models_failure(output: Tensor, sentence: str) -> None:
    with pytest.raises(ModelFailed, match=sentence):
        encode(ASKED, {"b": output, "a": np.zeros(1)}, model_name="m", model_version="")
    with pytest.raises(ModelFailed, match="output 'b': the model did not return it"):
        encode(ASKED, {}, model_name="m", model_version="")
