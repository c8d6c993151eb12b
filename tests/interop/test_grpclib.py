"""grpclib, gRPC in pure Python on python-hyper's h2. Authority: issue 3; gRPC over HTTP/2, PROTOCOL-HTTP2.md."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S, disconnected

SERVICE = "/inference.GRPCInferenceService/"
ROW = b"\0\0\x80\x3f" * 3

Infer = UnaryUnaryMethod[v2.ModelInferRequest, v2.ModelInferResponse]


def request(model: str, raw: bytes = ROW, request_id: str = "") -> v2.ModelInferRequest:
    made = v2.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[raw])
    made.inputs.add(name="INPUT0", datatype="FP32", shape=[1, len(raw) // 4])
    return made


@pytest.fixture
async def channel(pod: LocalPod) -> AsyncIterator[Channel]:
    async with Channel("127.0.0.1", pod.grpc_port) as opened:
        yield opened


def infer(channel: Channel) -> Infer:
    return UnaryUnaryMethod(channel, SERVICE + "ModelInfer", v2.ModelInferRequest, v2.ModelInferResponse)


async def test_unary(channel: Channel) -> None:
    """One, many at once, and one of many windows."""
    call = infer(channel)
    many = [call(request("identity_fp32", request_id=str(n)), timeout=TIMEOUT_S) for n in range(200)]
    assert [answer.id for answer in await asyncio.gather(*many)] == [str(n) for n in range(200)]
    large = ROW * 500_000
    assert (await call(request("identity_fp32", large), timeout=TIMEOUT_S)).raw_output_contents == [large]


async def test_metadata(channel: Channel) -> None:
    for header in ({"mm-model-id": "identity_fp32"}, {"mm-model-id-bin": b"identity_fp32"}):
        async with infer(channel).open(metadata=header, timeout=TIMEOUT_S) as stream:
            await stream.send_message(request(""), end=True)
            answer = await stream.recv_message()
            assert answer is not None
            assert answer.raw_output_contents == [ROW]
            assert stream.initial_metadata is not None
            assert stream.initial_metadata["densemesh-pod"] == "pod-1"


async def test_streaming(channel: Channel) -> None:
    method = StreamStreamMethod(
        channel, SERVICE + "ModelStreamInfer", v2.ModelInferRequest, v2.ModelStreamInferResponse
    )
    async with method.open(timeout=TIMEOUT_S) as stream:
        for n in range(3):  # each answer before the next request
            await stream.send_message(request("identity_fp32", request_id=str(n)), end=n == 2)
            answer = await stream.recv_message()
            assert answer is not None
            assert answer.infer_response.id == str(n)
        assert await stream.recv_message() is None


async def test_errors(channel: Channel) -> None:
    with pytest.raises(GRPCError) as refused:
        await infer(channel)(request("grün 100 %"), timeout=TIMEOUT_S)
    assert (refused.value.status, refused.value.message) == (Status.NOT_FOUND, "model 'grün 100 %' is not registered")
    with pytest.raises((asyncio.TimeoutError, GRPCError)) as late:  # its own timer, or our answer
        await infer(channel)(request("slow"), timeout=0.1)
    assert getattr(late.value, "status", Status.DEADLINE_EXCEEDED) is Status.DEADLINE_EXCEEDED
    assert (await infer(channel)(request("identity_fp32"), timeout=TIMEOUT_S)).raw_output_contents == [ROW]


@pytest.mark.parametrize("secure_pod", ["h2"], indirect=True)  # grpcio does not answer TLS' goodbye
async def test_mutual_tls(secure_pod: LocalPod, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=authority.ca)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(*authority.issue("client", name="client"))
    async with Channel("localhost", secure_pod.grpc_port, ssl=context) as channel:
        answer = await infer(channel)(request("identity_fp32", ROW * 100_000), timeout=TIMEOUT_S)
        assert answer.raw_output_contents == [ROW * 100_000]
    await disconnected(secure_pod.grpc_port)  # grpclib does not wait for TLS to say goodbye
