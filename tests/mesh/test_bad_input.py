"""Bad requests to a pod process: each is refused with the status of design section 7 and a message that names the field
and the expectation, and leaves nothing behind. Authority: issue 2, "Bad input gets"; Open Inference Protocol."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client

MESSAGE_LIMIT = 1 << 20

ROW = np.arange(4, dtype="<f4").tobytes()


def addsub(change: Callable[[Any], object] = lambda request: None, *, raw: bool = True) -> bytes:
    """A good request for `addsub`, changed."""
    request = v2.ModelInferRequest(model_name="addsub")
    for name in ("INPUT0", "INPUT1"):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 4])
        if raw:
            request.raw_input_contents.append(ROW)
        else:
            tensor.contents.fp32_contents.extend([0, 1, 2, 3])
    change(request)
    return request.SerializeToString()


def shaped(*shape: int) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.inputs[0].shape[:] = shape

    return change


def three_and_two_rows(request: Any) -> None:
    for index, rows in enumerate((3, 2)):
        request.inputs[index].shape[:] = [rows, 4]
        request.raw_input_contents[index] = ROW * rows


def named(name: bytes) -> bytes:
    """A message whose first field, the model's name, has these bytes."""
    return b"\x0a" + bytes([len(name)]) + name


GOOD = addsub()
BAD: dict[str, tuple[bytes, str, str]] = {
    "truncated": (GOOD[:-5], "INVALID_ARGUMENT", "malformed message"),
    "truncated inside a tensor": (
        b"\x0a\x06addsub" + b"\x2a\x03\x0a\x09I",
        "INVALID_ARGUMENT",
        "not a ModelInferRequest",
    ),
    "group": (named(b"addsub") + b"\x0b\x0c", "INVALID_ARGUMENT", "wire type"),
    "no name": (addsub(lambda r: r.ClearField("model_name")), "INVALID_ARGUMENT", "name is missing"),
    "name not UTF-8": (named(b"\xff\xfe"), "INVALID_ARGUMENT", "field 1 is not UTF-8"),
    "input name not UTF-8": (GOOD.replace(b"INPUT0", b"INPUT\xff"), "INVALID_ARGUMENT", "not a ModelInferRequest"),
    "name with control characters": (named(b"a\nb\0c"), "INVALID_ARGUMENT", "no control characters in 'a\\nb\\x00c'"),
    "name too long": (
        v2.ModelInferRequest(model_name="ü" * 257).SerializeToString(),
        "INVALID_ARGUMENT",
        "at most 512 bytes, found 514",
    ),
    "unknown model": (named(b"nobody"), "NOT_FOUND", "model 'nobody' is not registered"),
    "unknown version": (addsub(lambda r: setattr(r, "model_version", "9")), "NOT_FOUND", "has version '3', not '9'"),
    "no inputs": (named(b"addsub"), "INVALID_ARGUMENT", "inputs: missing 'INPUT0', 'INPUT1'"),
    "missing input": (
        addsub(lambda r: (r.inputs.pop(), r.raw_input_contents.pop())),
        "INVALID_ARGUMENT",
        "inputs: missing 'INPUT1'",
    ),
    "unknown input": (
        addsub(lambda r: setattr(r.inputs[1], "name", "IN")),
        "INVALID_ARGUMENT",
        "inputs[1] 'IN': not an input of the model: 'INPUT0', 'INPUT1'",
    ),
    "duplicate input": (
        addsub(lambda r: setattr(r.inputs[1], "name", "INPUT0")),
        "INVALID_ARGUMENT",
        "inputs[1] 'INPUT0': occurs twice",
    ),
    "too many inputs": (
        addsub(lambda r: r.inputs.extend(v2.ModelInferRequest.InferInputTensor(name=str(i)) for i in range(300))),
        "INVALID_ARGUMENT",
        "at most 256",
    ),
    "unknown datatype": (
        addsub(lambda r: setattr(r.inputs[0], "datatype", "FP8")),
        "INVALID_ARGUMENT",
        "inputs[0] 'INPUT0': unknown datatype 'FP8'",
    ),
    "no datatype": (addsub(lambda r: setattr(r.inputs[0], "datatype", "")), "INVALID_ARGUMENT", "unknown datatype ''"),
    "wrong datatype": (
        addsub(lambda r: setattr(r.inputs[0], "datatype", "INT32")),
        "INVALID_ARGUMENT",
        "inputs[0] 'INPUT0': datatype is INT32, expected FP32",
    ),
    "shape and bytes disagree": (
        addsub(shaped(2, 4)),
        "INVALID_ARGUMENT",
        "raw_input_contents holds 16 bytes, expected 32 for FP32 [2, 4]",
    ),
    "shape and elements disagree": (
        addsub(shaped(2, 4), raw=False),
        "INVALID_ARGUMENT",
        "contents.fp32_contents holds 4 elements, expected 8 for FP32 [2, 4]",
    ),
    "wrong shape": (addsub(shaped(4, 1)), "INVALID_ARGUMENT", "shape is [4, 1], expected [-1, 4]"),
    "huge shape": (addsub(shaped(1 << 40, 1 << 20)), "INVALID_ARGUMENT", "raw_input_contents holds 16 bytes, expected"),
    "shape beyond 64 bits": (addsub(shaped(1 << 62, 1 << 62, 1 << 62)), "INVALID_ARGUMENT", "expected"),
    "huge typed shape": (addsub(shaped(1 << 40, 4), raw=False), "INVALID_ARGUMENT", "holds 4 elements, expected"),
    "huge shape without elements": (addsub(shaped(0, 1 << 62, 1 << 62)), "INVALID_ARGUMENT", "too large"),
    "negative shape": (addsub(shaped(-1, 4)), "INVALID_ARGUMENT", "negative dimension"),
    "many dimensions": (addsub(shaped(*[1] * 40)), "INVALID_ARGUMENT", "at most 32"),
    "zero dimensions": (addsub(shaped()), "INVALID_ARGUMENT", "holds 16 bytes, expected 4 for FP32 []"),
    "zero-dimensional": (
        addsub(lambda r: (shaped()(r), r.raw_input_contents.__setitem__(0, ROW[:4]))),
        "INVALID_ARGUMENT",
        "shape is [], expected [-1, 4]",
    ),
    "zero size in the wrong place": (
        addsub(lambda r: (shaped(1, 0)(r), r.raw_input_contents.__setitem__(0, b""))),
        "INVALID_ARGUMENT",
        "shape is [1, 0], expected [-1, 4]",
    ),
    "raw and typed": (
        addsub(lambda r: r.inputs[1].contents.fp32_contents.append(1)),
        "INVALID_ARGUMENT",
        "inputs[1] 'INPUT1': contents is set although raw_input_contents is used",
    ),
    "raw for some inputs": (
        addsub(lambda r: r.raw_input_contents.pop()),
        "INVALID_ARGUMENT",
        "raw_input_contents: 1 entries for 2 inputs",
    ),
    "contents of another datatype": (
        addsub(lambda r: r.inputs[0].contents.int_contents.append(1), raw=False),
        "INVALID_ARGUMENT",
        "expected fp32_contents for FP32",
    ),
    "unknown output": (
        addsub(lambda r: r.outputs.add(name="OUT")),
        "INVALID_ARGUMENT",
        "outputs[0] 'OUT': not an output of the model: 'OUTPUT0', 'OUTPUT1'",
    ),
    "shared memory": (
        addsub(lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "r")),
        "UNIMPLEMENTED",
        "inputs[0] 'INPUT0': shared memory",
    ),
    "shapes that only the model refuses": (
        addsub(three_and_two_rows),
        "INTERNAL",  # well-formed by all that the model tells of itself: its own words
        "running Sub node",
    ),
}


@pytest.fixture(scope="module")
def pod_settings() -> dict[str, str]:
    return {"max_message": str(MESSAGE_LIMIT), "log_level": "ERROR"}


@pytest.fixture
async def client(pod: LocalPod) -> AsyncIterator[Client]:
    """After whatever a test did, the pod still serves."""
    async with Client(pod.address) as connected:
        yield connected
        response = await connected.call("ModelInfer", GOOD)
        assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_told_what_is_wrong(client: Client, case: str) -> None:
    message, status, says = BAD[case]
    found = await client.refusal("ModelInfer", message)
    assert found[0] == status, found
    assert says in found[1]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([("mm-model-id", "addsub"), ("mm-vmodel-id", "addsub")], "expected one id in all"),
        ([("mm-model-id", "addsub"), ("mm-model-id", "mlp")], "expected one id in all"),
        ([("mm-model-id", "")], "header mm-model-id: expected a non-empty id"),
        ([("mm-model-id-bin", b"\xff\xfe")], "header mm-model-id-bin is not UTF-8"),
        ([("mm-vmodel-id-bin", b"a\x7fb")], "no control characters"),
        ([("mm-model-id", "x" * 513)], "at most 512 bytes"),
    ],
)
async def test_bad_headers(client: Client, metadata: list[tuple[str, str | bytes]], says: str) -> None:
    # ModelMesh: both ids or an empty one are INVALID_ARGUMENT
    status, message = await client.refusal("ModelInfer", GOOD, metadata=metadata)
    assert status == "INVALID_ARGUMENT"
    assert says in message


async def test_random_messages_are_refused_by_every_rpc(client: Client) -> None:
    rng = random.Random(11)
    names = ("ModelInfer", "ModelMetadata", "ModelReady", "RepositoryModelLoad", "registerModel", "setVModel")
    for _ in range(60):
        message = b"\xff" + rng.randbytes(rng.randrange(200))  # 0xff begins no valid tag of a field below 2^32
        for name in names:
            status, _ = await client.refusal(name, message)
            assert status == "INVALID_ARGUMENT", (name, message)


async def test_mutated_messages_never_break_the_pod(client: Client) -> None:
    rng = random.Random(12)
    for _ in range(400):
        message = bytearray(GOOD)
        for _ in range(rng.randrange(1, 4)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        try:
            await client.call("ModelInfer", bytes(message))
        except grpc.aio.AioRpcError as error:
            # UNIMPLEMENTED, INTERNAL or UNKNOWN would be a case that nobody thought of
            assert error.code().name in ("INVALID_ARGUMENT", "NOT_FOUND"), (error, bytes(message))  # noqa: PT017


async def test_a_message_over_the_limit_is_resource_exhausted(client: Client) -> None:
    # gRPC, statuscodes.md
    message = addsub(lambda r: r.raw_input_contents.append(bytes(MESSAGE_LIMIT)))
    status, says = await client.refusal("ModelInfer", message)
    assert status == "RESOURCE_EXHAUSTED"
    assert str(MESSAGE_LIMIT) in says


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads a process' resources from Linux's /proc")
async def test_ten_thousand_bad_requests_leave_nothing_behind(client: Client, pod: LocalPod) -> None:
    process = Path(f"/proc/{pod.pid}")

    async def flood(count: int) -> None:
        slots = asyncio.Semaphore(64)
        async with asyncio.TaskGroup() as tasks:
            for message, status, _ in islice(cycle(BAD.values()), count):
                await slots.acquire()
                tasks.create_task(refused(message, status)).add_done_callback(lambda _: slots.release())

    async def refused(message: bytes, status: str) -> None:
        assert (await client.refusal("ModelInfer", message))[0] == status

    async def held() -> tuple[int, int, int]:
        """File descriptors, bytes by the books, resident KiB."""
        state = await client.call("GetState", mm.GetStateRequest())
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return len(list((process / "fd").iterdir())), state.pods[0].used_bytes, int(status["VmRSS"].split()[0])

    await flood(2_000)  # what is cached is now in memory: unknown names, gRPC's own buffers, malloc's arenas
    before = await held()
    await flood(10_000)
    after = await held()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 5_000, "KiB: half of one for each request"
