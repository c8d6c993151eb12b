"""The V2 service of a pod process with real models, by generated messages. Authority: Open Inference Protocol (gRPC);
Triton's extensions, KServe's proto and ModelMesh's headers where a test says so."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import TIMEOUT_S, Client
from tests.mesh.models import FLOWERS, classifier, mlp

TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65_535]),
    "UINT32": ("uint_contents", [0, 4_294_967_295]),
    "UINT64": ("uint64_contents", [0, 18_446_744_073_709_551_615]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-32_768, 32_767]),
    "INT32": ("int_contents", [-2_147_483_648, 2_147_483_647]),
    "INT64": ("int64_contents", [-9_223_372_036_854_775_808, 9_223_372_036_854_775_807]),
    "FP32": ("fp32_contents", [1.5, -0.25]),
    "FP64": ("fp64_contents", [0.1, 5e-324]),
    "BYTES": ("bytes_contents", [b"", "grün".encode()]),
}


def identity(datatype: str, **how: Any) -> v2.ModelInferRequest:
    request = v2.ModelInferRequest(model_name=f"identity_{datatype.lower()}", **how)
    request.inputs.add(name="INPUT0", datatype=datatype, shape=[1, 2])
    return request


def typed(datatype: str = "FP32", **how: Any) -> v2.ModelInferRequest:
    request = identity(datatype, **how)
    field, values = TYPED[datatype]
    getattr(request.inputs[0].contents, field).extend(values)
    return request


@pytest.mark.parametrize("datatype", TYPED)
async def test_typed_contents_come_back_typed(client: Client, datatype: str) -> None:
    response = await client.call("ModelInfer", typed(datatype))
    assert not response.raw_output_contents
    assert list(getattr(response.outputs[0].contents, TYPED[datatype][0])) == TYPED[datatype][1]
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == (datatype, [1, 2])


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [
        ("FP32", np.array([1.5, -2], "<f4").tobytes()),
        ("INT64", np.array([1, -2], "<i8").tobytes()),
        ("BOOL", b"\1\0"),
        ("BYTES", b"\0\0\0\0\3\0\0\0abc"),
        ("FP16", np.array([1.5, -2], "<f2").tobytes()),
        ("BF16", np.array([1.5, -2], ml_dtypes.bfloat16).tobytes()),
    ],
)
async def test_raw_contents_come_back_raw(client: Client, datatype: str, raw: bytes) -> None:
    response = await client.call("ModelInfer", identity(datatype, raw_input_contents=[raw]))
    assert list(response.raw_output_contents) == [raw]
    assert not response.outputs[0].HasField("contents")


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_halves_have_no_typed_contents(client: Client, datatype: str) -> None:
    request = identity(datatype)
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    status, message = await client.refusal("ModelInfer", request)
    assert (status, "raw_input_contents" in message) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize("shape", [[0, 2], [3, 0]])
async def test_tensors_without_elements_are_tensors(client: Client, shape: list[int]) -> None:
    request = v2.ModelInferRequest(model_name="identity_fp32", raw_input_contents=[b""])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=shape)
    response = await client.call("ModelInfer", request)
    assert list(response.outputs[0].shape) == shape
    assert list(response.raw_output_contents) == [b""]


async def test_parameters_of_all_five_kinds_are_accepted(client: Client) -> None:
    request = typed()
    for parameters in (request.parameters, request.inputs[0].parameters):
        parameters["bool"].bool_param = True
        parameters["int64"].int64_param = -1
        parameters["string"].string_param = "grün"
        parameters["double"].double_param = 0.5
        parameters["uint64"].uint64_param = 1 << 63
    request.outputs.add(name="OUTPUT0").parameters["binary_data"].bool_param = True
    assert (await client.call("ModelInfer", request)).outputs[0].contents.fp32_contents == [1.5, -0.25]


async def test_a_batch_is_computed_as_the_framework_does(client: Client) -> None:
    rows = np.random.default_rng(3).standard_normal((5, 8)).astype(np.float32)
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    response = await client.call("ModelInfer", request)
    found: npt.NDArray[Any] = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(5, 3)
    np.testing.assert_allclose(found, mlp(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["input-0", "predict"])
async def test_scikit_learn_answers_its_own_predictions(client: Client, name: str) -> None:
    # KServe's clients call the input input-0, MLServer's predict
    request = v2.ModelInferRequest(model_name="classifier", raw_input_contents=[FLOWERS.tobytes()])
    request.inputs.add(name=name, datatype="FP64", shape=FLOWERS.shape)
    response = await client.call("ModelInfer", request)
    assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == classifier().predict(FLOWERS).tolist()


# Names


@pytest.mark.parametrize("header", ["mm-model-id", "mm-model-id-bin"])
@pytest.mark.parametrize("in_message", ["", "something else"])
async def test_model_by_header(client: Client, header: str, in_message: str) -> None:
    # ModelMesh: the header decides; the response's model_name is what the client said
    request = typed()
    request.model_name = in_message
    value = b"identity_fp32" if header.endswith("-bin") else "identity_fp32"
    response = await client.call("ModelInfer", request, metadata=[(header, value)])
    assert response.model_name == (in_message or "identity_fp32")


@pytest.mark.parametrize("how", ["name", "mm-vmodel-id", "mm-vmodel-id-bin"])
async def test_vmodel_by_name_and_by_header(client: Client, how: str) -> None:
    await client.call("setVModel", mm.SetVModelRequest(vModelId="lively ü", targetModelId="identity_fp32"))
    if how == "mm-vmodel-id":  # ASCII only
        await client.call("setVModel", mm.SetVModelRequest(vModelId="lively", targetModelId="identity_fp32"))
    request = typed()
    request.model_name = "lively ü" if how == "name" else ""
    values: dict[str, list[tuple[str, str | bytes]]] = {
        "mm-vmodel-id": [("mm-vmodel-id", "lively")],
        "mm-vmodel-id-bin": [("mm-vmodel-id-bin", "lively ü".encode())],
    }
    response = await client.call("ModelInfer", request, metadata=values.get(how, []))
    assert response.model_name == ("lively" if how == "mm-vmodel-id" else "lively ü")


async def test_metadata_is_told_under_the_name_asked_for(client: Client) -> None:
    await client.call("setVModel", mm.SetVModelRequest(vModelId="current", targetModelId="addsub"))
    for name in ("addsub", "current"):
        told = await client.call("ModelMetadata", v2.ModelMetadataRequest(name=name))
        assert (told.name, list(told.versions)) == (name, ["3"])
        assert (await client.call("ModelReady", v2.ModelReadyRequest(name=name))).ready


async def test_the_holder_is_in_the_response_headers(client: Client) -> None:
    _, headers = await client.call_for_headers("ModelInfer", typed())
    assert headers["densemesh-pod"] == "pod-1"


# The rest of the port


async def test_server(client: Client) -> None:
    assert (await client.call("ServerLive", v2.ServerLiveRequest())).live
    assert (await client.call("ServerReady", v2.ServerReadyRequest())).ready
    told = await client.call("ServerMetadata", v2.ServerMetadataRequest())
    assert (told.name, bool(told.version)) == ("densemesh", True)


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/ModelConfig", "/no.Such/Thing", "/x"])
async def test_an_unknown_rpc_is_unimplemented(client: Client, path: str) -> None:
    # gRPC, statuscodes.md
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.channel.unary_unary(path)(b"", timeout=TIMEOUT_S)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_kserves_own_load_and_unload_are_understood(client: Client) -> None:
    # kserve, grpc_predict_v2.proto: model_name = 1; answers {model_name = 1, isLoaded = 2}
    loaded = await client.call("RepositoryModelLoad", b"\x0a\x03mlp")
    assert (loaded.model_name, loaded.isLoaded) == ("mlp", True)
    unloaded = await client.call("RepositoryModelUnload", b"\x0a\x03mlp")
    assert (unloaded.model_name, unloaded.isUnloaded) == ("mlp", True)


async def test_triton_load_does_not_override_files(client: Client) -> None:
    request = v2.RepositoryModelLoadRequest(model_name="mlp")
    request.parameters["config"].string_param = "{}"
    status, message = await client.refusal("RepositoryModelLoad", request)
    assert (status, "parameters" in message) == ("UNIMPLEMENTED", True)


async def test_index_lists_all_or_the_loaded(client: Client) -> None:
    await client.call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="mlp"))
    await client.call("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="addsub"))
    every = (await client.call("RepositoryIndex", v2.RepositoryIndexRequest())).models
    ready = (await client.call("RepositoryIndex", v2.RepositoryIndexRequest(ready=True))).models
    assert {model.name: model.version for model in every}["addsub"] == "3"
    assert {"mlp", "classifier", "slow"} <= {model.name for model in every}
    assert "addsub" in {model.name for model in ready}
    assert "mlp" not in {model.name for model in ready}
    assert {model.state for model in ready} == {"READY"}


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "mmesh.ModelMesh", "densemesh.Mesh"])
async def test_health_check_and_watch(client: Client, service: str) -> None:
    # grpc.health.v1
    request = HealthCheckRequest(service=service).SerializeToString()
    check = client.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert HealthCheckResponse.FromString(await check(request, timeout=TIMEOUT_S)).status == 1
    watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(request, timeout=TIMEOUT_S)
    assert HealthCheckResponse.FromString(await watch.read()).status == 1
    watch.cancel()


async def test_health_of_an_unknown_service(client: Client) -> None:
    # grpc.health.v1: Check fails with NOT_FOUND, Watch says SERVICE_UNKNOWN and goes on
    request = HealthCheckRequest(service="nobody").SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=TIMEOUT_S)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(request, timeout=TIMEOUT_S)
    assert HealthCheckResponse.FromString(await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_reflection_describes_the_public_services(pod: LocalPod) -> None:
    # grpc.reflection.v1alpha, by grpc_reflection's own client
    def methods() -> tuple[list[str], set[str]]:
        with grpc.insecure_channel(pod.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName("inference.GRPCInferenceService")
            return database.get_services(), {method.name for method in service.methods}

    services, names = await asyncio.to_thread(methods)
    assert {"inference.GRPCInferenceService", "mmesh.ModelMesh", "grpc.health.v1.Health"} <= set(services)
    assert {"ModelInfer", "ModelStreamInfer", "RepositoryIndex"} <= names


async def test_a_stream_answers_in_order_and_names_the_request_that_failed(client: Client) -> None:
    # Triton, ModelStreamInfer: errors in band, with the request's id
    asked = [typed(id="1"), v2.ModelInferRequest(model_name="nobody", id="2"), typed(id="3")]

    async def requests() -> Any:
        for request in asked:
            yield request.SerializeToString()

    path = "/inference.GRPCInferenceService/ModelStreamInfer"
    stream = client.channel.stream_stream(path, response_deserializer=v2.ModelStreamInferResponse.FromString)
    seen = [answer async for answer in stream(requests(), timeout=TIMEOUT_S)]
    assert [answer.infer_response.id for answer in seen] == ["1", "2", "3"]
    assert [bool(answer.error_message) for answer in seen] == [False, True, False]
