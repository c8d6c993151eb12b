"""Reflection shows the public services under their public names, and clients can build messages from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection_pb2 import (
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from mesh.errors import Code, InvalidRequest
from mesh.reflection import POOL, SERVICES, _with_dependencies, answer, reflect
from protos.inference_pb2 import ModelInferRequest
from protos.management_pb2 import GetStateRequest, RegisterModelRequest


def ask(request: ServerReflectionRequest) -> ServerReflectionResponse:
    return ServerReflectionResponse.FromString(answer(request.SerializeToString()))


def resolve(symbol: str) -> DescriptorPool:
    """A fresh pool with what the answers about one symbol hold."""
    pool = DescriptorPool()
    response = ask(ServerReflectionRequest(file_containing_symbol=symbol))
    for serialized in response.file_descriptor_response.file_descriptor_proto:
        pool.AddSerializedFile(serialized)
    return pool


def test_every_service_listed_resolves_and_has_only_itself_in_its_file() -> None:
    # grpc/doc/server-reflection.md: "list services", "file containing symbol"
    listed = [service.name for service in ask(ServerReflectionRequest(list_services="")).list_services_response.service]
    assert listed == sorted(SERVICES)
    assert {"inference.GRPCInferenceService", "mmesh.ModelMesh", "densemesh.Mesh", "grpc.health.v1.Health"} < set(
        listed
    )
    for name in listed:
        file = resolve(name).FindServiceByName(name).file
        assert [service.full_name for service in file.services_by_name.values()] == [name]
        assert "densemesh.inference" not in str(file.serialized_pb)
        assert "densemesh.management" not in str(file.serialized_pb)


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        (
            "inference.GRPCInferenceService.ModelInfer",
            ModelInferRequest(model_name="m", inputs=[{"name": "x", "shape": [1], "contents": {"int_contents": [7]}}]),
        ),
        ("mmesh.ModelMesh.registerModel", RegisterModelRequest(modelId="m", modelInfo={"type": "onnx"}, sync=True)),
        ("densemesh.Mesh.GetState", GetStateRequest(models=True)),
    ],
)
def test_a_message_built_from_the_answers_is_ours_on_the_wire(
    method: str, request_message: ModelInferRequest | RegisterModelRequest | GetStateRequest
) -> None:
    message_class = GetMessageClass(resolve(method).FindMethodByName(method).input_type)
    message = message_class.FromString(request_message.SerializeToString())
    assert message.DESCRIPTOR.full_name.rpartition(".")[0] == method.rsplit(".", 2)[0]
    assert str(message) == str(request_message)


@pytest.mark.parametrize(
    "request_message",
    [
        ServerReflectionRequest(file_by_filename="protos/inference.proto"),
        ServerReflectionRequest(file_containing_symbol="densemesh.inference.ModelInferRequest"),
        ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService.Nope"),
        ServerReflectionRequest(
            file_containing_extension=ExtensionRequest(containing_type="inference.InferParameter", extension_number=1)
        ),
        ServerReflectionRequest(all_extension_numbers_of_type="inference.InferParameter"),
    ],
)
def test_what_is_not_there_is_an_answer_and_no_failure(request_message: ServerReflectionRequest) -> None:
    # grpc/reflection/v1/reflection.proto: ServerReflectionResponse.error_response
    response = ask(request_message)
    assert response.error_response.error_code == Code.NOT_FOUND
    assert response.original_request == request_message


def test_malformed_requests() -> None:
    assert ask(ServerReflectionRequest(host="h")).error_response.error_code == Code.INVALID_ARGUMENT
    assert ask(ServerReflectionRequest(host="h")).valid_host == "h"
    with pytest.raises(InvalidRequest, match="not a ServerReflectionRequest"):
        answer(b"\xff")


def test_files_come_with_all_they_import() -> None:
    # "the transitive closure of its dependencies": none of our files has any, so a chain made here
    pool = DescriptorPool()
    for name, imports in {"a": [], "b": ["a"], "c": ["a", "b"]}.items():
        pool.AddSerializedFile(FileDescriptorProto(name=name, dependency=imports).SerializeToString())
    assert set(_with_dependencies(pool.FindFileByName("c"))) == {"a", "b", "c"}
    assert set(_with_dependencies(POOL.FindFileByName("inference.proto"))) == {"inference.proto"}


async def test_grpc_pythons_own_reflection_client() -> None:
    async def handler(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for response in reflect(requests):
            yield response

    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(handler)  # bytes in, bytes out
    service = "grpc.reflection.v1alpha.ServerReflection"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def client() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert tuple(database.get_services()) == SERVICES
            pool = DescriptorPool(database)
            found = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
            assert GetMessageClass(found.input_type)(model_name="m").SerializeToString() == b"\x0a\x01m"

    try:
        await asyncio.to_thread(client)
    finally:
        await server.stop(None)
