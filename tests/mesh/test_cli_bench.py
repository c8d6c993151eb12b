"""`densemesh bench` against a pod process and against servers of one method. Authority: issue 3, item 7: any V2 gRPC
server, every answer's status checked, one-sentence errors, Ctrl-C prints what was measured."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.__main__ import main
from mesh.errors import NoRoom
from mesh.frontends import open_server
from mesh.local_cluster import LocalPod
from mesh.rpc import Call, Handlers, Unary
from mesh.tls import Tls
from protos import inference_pb2 as pb
from tests.mesh.certificates import Authority
from tests.mesh.models import KINDS

FEW = ("--connections", "2", "--streams", "3", "--requests", "60")


@pytest.fixture(scope="module")
def frontend() -> str:
    """One is enough: the generator's own tests take both."""
    return "h2"


Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(pod: LocalPod, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """The command on the module's pod: its status, stdout and stderr."""

    def run(*words: str, address: str = pod.address) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["densemesh", "bench", address, *FEW, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def figures(bench: Bench, *words: str) -> Any:
    status, out, err = bench("--json", "-", *words)
    assert (status, err) == (0, "")
    return json.loads(out)


def test_figures_as_json(bench: Bench, pod: LocalPod, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    status, out, err = bench("--model", "mlp", "--pid", str(pod.pid), "--json", str(path))
    assert (status, err) == (0, "")
    told = json.loads(path.read_text())
    assert (told["requests"], told["errors"], told["connections"], told["streams"]) == (60, {}, 2, 3)
    assert told["sent_bytes"] == 60 * told["request_bytes"]
    assert told["cpu_us"] == told["server_us"][0] > 0
    assert 0 < told["p50_ms"] <= told["p90_ms"] <= told["p99_ms"] <= told["max_ms"]
    assert "answered   60 in " in out
    assert f"us (process {pod.pid}); this client" in out


@pytest.mark.parametrize("datatype", ["bool", "uint8", "fp16", "bf16", "fp64", "bytes"])
def test_data_is_of_the_datatype_that_the_model_takes(bench: Bench, datatype: str) -> None:
    """The pod refuses what is not: bytes that do not fit the shape, a BOOL of 2."""
    assert datatype.upper() in KINDS
    told = figures(bench, "--model", f"identity_{datatype}", "--shape", "INPUT0=3,5")
    assert told["requests"] == 60


def test_shapes(bench: Bench) -> None:
    """What the model leaves open is 1; a shape that is given replaces all of it."""
    assert figures(bench, "--model", "addsub")["requests"] == 60
    small = figures(bench, "--model", "identity_fp32")["request_bytes"]
    large = figures(bench, "--model", "identity_fp32", "--shape", "INPUT0=10,100")["request_bytes"]
    assert 3_900 < large - small < 4_010


def test_the_rate_of_an_open_loop_and_headers(bench: Bench) -> None:
    """A vmodel's or model's header says which model is meant."""
    told = figures(bench, "--model", "mlp", "--rate", "2000", "--header", "mm-model-id=addsub", "--shape", "INPUT0=1,4")
    assert (told["rate"], told["requests"]) == (2000.0, 60)


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--model", "none"], 1, "ModelMetadata of 'none': NOT_FOUND: model 'none' is not registered"),
        (["--model", "mlp", "--shape", "y=1"], 1, "--shape: the model has no input 'y', only x"),
        (["--model", "mlp", "--shape", "x=1,9"], 1, "ModelInfer of 'mlp': INVALID_ARGUMENT: inputs[0] 'x': shape is"),
        (
            ["--model", "mlp", "--shape", "x=99999,99999"],
            1,
            "a request would have 37.3 GiB, expected at most 256.0 MiB",
        ),
        (["--model", "mlp", "--shape", "x"], 2, "Invalid value for '--shape': expected INPUT=1,64 or INPUT:FP32=1,64"),
        (["--model", "mlp", "--shape", "x:FP8=1"], 2, "Invalid value for '--shape': x: expected one of BOOL, UINT8,"),
        (["--model", "mlp", "--header", "A=b"], 2, "Invalid value for '--header': expected key=value in lower case"),
        (["--model", "mlp", "--pid", "4194304"], 2, "Invalid value for --pid: 4194304 is no process on this machine"),
        (["--model", "mlp", "--rate", "0"], 2, "Invalid value for '--rate': 0.0 is not in the range"),
        ([], 2, "Missing option '--model'"),
    ],
)
def test_wrong_use_is_one_sentence(bench: Bench, words: list[str], status: int, sentence: str) -> None:
    ended, out, err = bench(*words)
    assert err.startswith(f"densemesh: {sentence}")
    assert (ended, out, err.count("\n")) == (status, "", 1)


def test_figures_that_cannot_be_written_are_told_all_the_same(bench: Bench) -> None:
    status, out, err = bench("--model", "mlp", "--json", "/nowhere/figures.json")
    assert (status, err) == (1, "densemesh: --json: /nowhere/figures.json: No such file or directory\n")
    assert "answered   60 in " in out


def test_no_server(bench: Bench) -> None:
    refused = "densemesh: ModelMetadata of 'm': UNAVAILABLE: 127.0.0.1:1: Connection refused\n"
    assert bench("--model", "m", address="127.0.0.1:1") == (1, "", refused)


@asynccontextmanager
async def server_of(infer: Unary, tls: Tls | None = None) -> AsyncIterator[str]:
    """A server of ModelInfer and nothing else."""
    server = open_server("grpcio", max_message_bytes=1 << 20, default_timeout_s=60.0, tls=tls)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start(Handlers({"/inference.GRPCInferenceService/ModelInfer": infer}))
    try:
        yield address
    finally:
        await server.stop(0)


async def command(address: str, *words: str) -> asyncio.subprocess.Process:
    arguments = ("-m", "mesh", "bench", address, "--model", "m", *words)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=pipe, stderr=pipe)


async def test_a_server_without_metadata_that_starts_to_fail() -> None:
    """With datatypes given, ModelMetadata is not needed; any failed request makes the status 1."""
    asked: list[bytes] = []

    async def infer(call: Call, message: bytes) -> bytes:
        asked.append(message)
        if len(asked) > 5:
            raise NoRoom("full")
        return b""

    async with server_of(infer) as address:
        process = await command(address, *FEW, "--shape", "x:INT64=2,2", "--shape", "s:BYTES=1")
        out, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")
    assert "answered   4 in " in out.decode()
    assert "errors     56 RESOURCE_EXHAUSTED\n           RESOURCE_EXHAUSTED: full\n" in out.decode()
    request = pb.ModelInferRequest.FromString(asked[0])
    assert [(each.name, each.datatype, each.shape[:]) for each in request.inputs] == [
        ("x", "INT64", [2, 2]),
        ("s", "BYTES", [1]),
    ]
    assert [len(raw) for raw in request.raw_input_contents] == [32, 12]


async def test_a_server_that_says_nothing_of_inputs() -> None:
    async def infer(call: Call, message: bytes) -> bytes:
        raise AssertionError

    async with server_of(infer) as address:
        process = await command(address, *FEW)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.startswith(b"densemesh: ModelMetadata of 'm': UNIMPLEMENTED")


async def test_tls(tmp_path: Path) -> None:
    async def infer(call: Call, message: bytes) -> bytes:
        return b""

    authority = Authority(tmp_path)
    async with server_of(infer, Tls(authority.files(mutual=False))) as address:
        process = await command(address, *FEW, "--shape", "x:FP32=1", "--tls-ca", authority.ca, "--json", "-")
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert json.loads(out)["requests"] == 60
        process = await command(address, *FEW, "--shape", "x:FP32=1", "--tls")
        _, err = await process.communicate()
    assert process.returncode == 1
    assert b"its certificate is not accepted" in err


async def test_an_interrupt_tells_what_was_measured() -> None:
    enough, count = asyncio.Event(), 0

    async def infer(call: Call, message: bytes) -> bytes:
        nonlocal count
        count += 1
        if count > 50:
            enough.set()
            await asyncio.sleep(60)
        return b""

    async with server_of(infer) as address:
        process = await command(address, "--warm-up", "0", "--shape", "x:FP32=1")
        await enough.wait()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
    answered = re.search(r"^answered   (\d+) in ", out.decode(), re.MULTILINE)
    assert answered
    assert 0 < int(answered[1]) <= 49  # the first request was the trial
