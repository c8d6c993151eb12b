"""Descriptors of the public services, and the answers of gRPC server reflection.

Source: grpc/grpc, doc/server-reflection.md and grpc/reflection/v1/reflection.proto. v1 and v1alpha have the same bytes
on the wire, so one function serves both. The generated messages live in private proto packages (see protos/*.proto);
clients must see the names that the services are served under, so a pool of its own holds renamed copies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from google.protobuf import text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mesh.errors import Code, InvalidRequest
from protos import inference_pb2, management_pb2

_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
_FILES: Final[dict[str, tuple[str, FileDescriptor]]] = {
    "inference.GRPCInferenceService": ("inference.proto", inference_pb2.DESCRIPTOR),
    "mmesh.ModelMesh": ("management.proto", management_pb2.DESCRIPTOR),
    "densemesh.Mesh": ("densemesh.proto", management_pb2.DESCRIPTOR),
    "grpc.health.v1.Health": ("grpc/health/v1/health.proto", health_pb2.DESCRIPTOR),
    "grpc.reflection.v1.ServerReflection": ("grpc/reflection/v1/reflection.proto", reflection_pb2.DESCRIPTOR),
    _V1ALPHA: ("grpc/reflection/v1alpha/reflection.proto", reflection_pb2.DESCRIPTOR),
}
"""Each public service with the file it is shown in, and the file of ours that this is a copy of."""

SERVICES: Final = tuple(sorted(_FILES))
"""Full names of the public services."""


def _public(service: str, name: str, source: FileDescriptor) -> bytes:
    """A copy of a file: renamed, in the package of its service, with this one service and all messages."""
    package, _, short_name = service.rpartition(".")
    file = FileDescriptorProto()
    source.CopyToProto(file)
    # References to messages are absolute, `".package.Message"`, and nothing else in a descriptor looks like that.
    text = text_format.MessageToString(file).replace(f'".{file.package}.', f'".{package}.')
    file = text_format.Parse(text, FileDescriptorProto())
    file.name, file.package = name, package
    kept = [entry for entry in file.service if entry.name == short_name]
    del file.service[:]
    file.service.extend(kept)
    return file.SerializeToString()


POOL: Final = DescriptorPool()
"""The public descriptors, and no others."""
for _service, _file in _FILES.items():
    POOL.AddSerializedFile(_public(_service, *_file))


async def reflect(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream ServerReflectionInfo: one answer per request, in their order.

    Raises:
        InvalidRequest: a message is not a ServerReflectionRequest.
    """
    async for message in requests:
        yield answer(message)


def answer(message: bytes) -> bytes:
    """One ServerReflectionResponse; what cannot be found is an error in it and leaves the stream open.

    Raises:
        InvalidRequest: the message is not a ServerReflectionRequest.
    """
    try:
        request = reflection_pb2.ServerReflectionRequest.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"not a ServerReflectionRequest: {error}") from None
    response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
    kind = request.WhichOneof("message_request")
    if kind == "list_services":
        for service in SERVICES:
            response.list_services_response.service.add(name=service)
    elif kind is None:
        response.error_response.error_code = Code.INVALID_ARGUMENT
        response.error_response.error_message = "message_request is not set"
    else:
        try:
            files = _with_dependencies(_find(kind, getattr(request, kind)))
            response.file_descriptor_response.file_descriptor_proto.extend(files.values())
        except KeyError:
            response.error_response.error_code = Code.NOT_FOUND
            response.error_response.error_message = f"{kind}: not found"
    encoded: bytes = response.SerializeToString()
    return encoded


def _find(kind: str, name: str) -> FileDescriptor:
    """The file asked for.

    Raises:
        KeyError: there is none; always so for extensions, which proto3 does not have.
    """
    if kind == "file_by_filename":
        return POOL.FindFileByName(name)
    if kind != "file_containing_symbol":
        raise KeyError(name)
    try:
        return POOL.FindFileContainingSymbol(name)
    except KeyError:  # upb's pool does not count methods as symbols
        return POOL.FindMethodByName(name).containing_service.file


def _with_dependencies(file: FileDescriptor) -> dict[str, bytes]:
    """The serialised file and, transitively, all it imports, by name: clients may add them in any order."""
    files: dict[str, bytes] = {file.name: file.serialized_pb}
    for dependency in file.dependencies:
        files |= _with_dependencies(dependency)
    return files
