"""`densemesh bench`: load on one model of any V2 gRPC server, ours or another's."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import numpy as np

from loaders.datatypes import DTYPES
from mesh.cli.manage import secured
from mesh.config import format_bytes
from mesh.errors import MeshError
from mesh.h2_client import H2Client
from mesh.inference import SERVICE
from mesh.load_generator import Load, LoadError, LoadGenerator, Result, one_line, tree_cpu_s
from mesh.loop import new_event_loop
from mesh.rpc import Metadata
from mesh.tls import Tls
from protos import inference_pb2 as pb

_MESSAGES: Final = 16
"""Different requests that go round, ..."""
_MESSAGES_BYTES: Final = 256 << 20
"""... fewer if together they would be larger than this, which is also the most for one."""
_LIVE_S: Final = 0.5
_SHAPE: Final = re.compile(r"([^=:]+)(?::([A-Z0-9]+))?=(\d{1,18}(?:,\d{1,18}){0,31}|)")
_HEADER: Final = re.compile(r"([0-9a-z_.-]+)=([!-~](?:[ -~]*[!-~])?)")

F = TypeVar("F", bound=Callable[..., object])

Inputs = dict[str, tuple[str, list[int]]]
"""Datatype and shape of each input."""


def _shapes(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> Inputs:
    """The datatype is empty where the server is to say it."""
    shapes: Inputs = {}
    for text in given:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise click.BadParameter(f"expected INPUT=1,64 or INPUT:FP32=1,64, found {text!r}")
        name, datatype, dims = match.groups()
        if datatype and datatype not in DTYPES:
            raise click.BadParameter(f"{name}: expected one of {', '.join(DTYPES)}, found {datatype!r}")
        shapes[name] = (datatype or "", [int(size) for size in dims.split(",") if size])
    return shapes


def _headers(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> Metadata:
    pairs: list[tuple[str, str]] = []
    for text in given:
        match = _HEADER.fullmatch(text)
        if match is None or match[1].endswith("-bin") or match[1].startswith("grpc-"):
            raise click.BadParameter(f"expected key=value in lower case, neither -bin nor grpc-, found {text!r}")
        pairs.append((match[1], match[2]))
    return pairs


def _option(flag: str, kind: Any, default: Any, explanation: str) -> Callable[[F], F]:
    return click.option(flag, type=kind, default=default, show_default=default is not None, help=explanation)


@click.command()
@click.argument("address")
@click.option("--model", required=True, help="Model or vmodel to ask.")
@_option("--connections", click.IntRange(1, 10_000), 8, "Connections to open.")
@_option("--streams", click.IntRange(1, 10_000), 8, "Requests in flight on each connection.")
@_option("--seconds", click.FloatRange(0.1, 86_400), 10.0, "Measured time.")
@_option("--requests", click.IntRange(1, 1_000_000_000), None, "Send so many instead, all of them measured.")
@_option(
    "--rate", click.FloatRange(0.01, 10_000_000), None, "Open loop: requests per second, however fast answers come."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_shapes,
    metavar="INPUT[:DATATYPE]=DIMS",
    help="E.g. X=1,64. By default what ModelMetadata says, with 1 for the dimensions it leaves open.",
)
@click.option(
    "--header", "metadata", multiple=True, callback=_headers, metavar="KEY=VALUE", help="Sent with each request."
)
@_option("--timeout", click.FloatRange(0.001, 86_400), 30.0, "Seconds for each request.")
@_option("--warm-up", click.FloatRange(0, 3600), 1.0, "Seconds of load before the measured time.")
@click.option(
    "--pid", "pids", type=click.IntRange(1), multiple=True, help="Server process here: tells its tree's CPU time."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Also write the figures to FILE (-: to stdout, instead of the text).",
)
@secured
def bench(
    address: str,
    model: str,
    requests: int | None,
    rate: float | None,
    shapes: Inputs,
    metadata: Metadata,
    timeout: float,
    warm_up: float,
    pids: Sequence[int],
    json_path: Path | None,
    tls: Tls | None,
    **shape: Any,
) -> int:
    """Load a model of the V2 gRPC server at ADDRESS (host:port) with random data; tell its rate and its latencies.

    Each answer is followed by the next request (a closed loop of connections x streams), or with --rate requests are
    sent when they are due, and latency counts from then. Ctrl-C ends it and tells what was measured so far. The status
    is 1 if any request failed.
    """
    for pid in pids:
        try:
            tree_cpu_s(pid)
        except OSError:
            raise click.BadParameter(f"{pid} is no process on this machine", param_hint="--pid") from None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            messages = runner.run(_messages(H2Client(tls=tls), address, model, shapes, metadata, timeout))
            load = Load(
                address,
                SERVICE + "ModelInfer",
                messages,
                requests=requests or 0,
                rate=rate or 0.0,
                warm_up_s=warm_up,
                timeout_s=timeout,
                metadata=metadata,
                server_pids=pids,
                **shape,
            )
            result, interrupted = runner.run(_measure(LoadGenerator(load, tls)))
        except LoadError as error:
            raise click.ClickException(str(error)) from None
    if json_path is None or str(json_path) != "-":
        _tell(load, model, result)
    if json_path is not None:
        try:
            with click.open_file(json_path, "w") as file:
                file.write(_figures(load, model, result))
        except OSError as error:
            raise click.ClickException(f"--json: {json_path}: {error.strerror}") from None
    if interrupted:
        return 130
    return 1 if result.errors or not result.requests else 0


async def _messages(
    client: H2Client, address: str, model: str, shapes: Inputs, metadata: Metadata, timeout_s: float
) -> list[bytes]:
    """Requests that the server answers: the first was tried.

    Raises:
        LoadError
    """

    async def call(method: str, message: bytes) -> bytes:
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            return (await client.call(address, SERVICE + method, message, metadata, deadline))[0]
        except MeshError as error:
            raise LoadError(f"{method} of {model!r}: {error.code.name}: {one_line(str(error))}") from None

    try:
        inputs = shapes
        if not shapes or not all(datatype for datatype, _ in shapes.values()):
            answer = await call("ModelMetadata", pb.ModelMetadataRequest(name=model).SerializeToString())
            inputs = _inputs(pb.ModelMetadataResponse.FromString(answer), shapes)
        messages = list(_random_requests(model, inputs))
        await call("ModelInfer", messages[0])
        return messages
    finally:
        await client.close()


def _inputs(said: pb.ModelMetadataResponse, shapes: Inputs) -> Inputs:
    """What the server says, with the shapes that were given.

    Raises:
        LoadError
    """
    names = [tensor.name for tensor in said.inputs]
    if not names:
        raise LoadError(
            "the server does not say what the model's inputs are; give --shape INPUT:DATATYPE=DIMS for each"
        )
    for unknown in shapes.keys() - names:
        raise LoadError(f"--shape: the model has no input {unknown!r}, only {', '.join(names)}")
    inputs: Inputs = {}
    for tensor in said.inputs:
        datatype, shape = shapes.get(tensor.name, ("", [max(1, size) for size in tensor.shape]))
        inputs[tensor.name] = (datatype or tensor.datatype, shape)
        if inputs[tensor.name][0] not in DTYPES:
            raise LoadError(f"input {tensor.name}: the server says datatype {tensor.datatype!r}, which V2 has not")
    return inputs


def _random_requests(model: str, inputs: Inputs) -> Iterator[bytes]:
    """Floats from 0 to 1, whole numbers from 0 to 9, texts of eight digits; the same ones each time.

    Raises:
        LoadError
    """
    size_bytes = sum(
        math.prod(shape) * max(DTYPES[datatype].itemsize, 12 * (datatype == "BYTES"))
        for datatype, shape in inputs.values()
    )
    if size_bytes > _MESSAGES_BYTES:
        raise LoadError(
            f"a request would have {format_bytes(size_bytes)}, expected at most {format_bytes(_MESSAGES_BYTES)}"
        )
    rng = np.random.default_rng(0)
    for _ in range(max(1, min(_MESSAGES, _MESSAGES_BYTES // max(1, size_bytes)))):
        request = pb.ModelInferRequest(model_name=model)
        for name, (datatype, shape) in inputs.items():
            request.inputs.add(name=name, datatype=datatype, shape=shape)
            request.raw_input_contents.append(_random_tensor(datatype, math.prod(shape), rng))
        yield request.SerializeToString()


def _random_tensor(datatype: str, count: int, rng: np.random.Generator) -> bytes:
    if datatype == "BYTES":
        return b"".join([b"\x08\0\0\0%08d" % number for number in rng.integers(0, 10**8, count)])
    if datatype.startswith(("FP", "BF")):
        return rng.random(count, np.float32).astype(DTYPES[datatype]).tobytes()
    return rng.integers(0, 2 if datatype == "BOOL" else 10, count).astype(DTYPES[datatype]).tobytes()


async def _measure(generator: LoadGenerator) -> tuple[Result, bool]:
    """What came of it, and whether it was interrupted.

    Raises:
        LoadError
    """
    loop, interrupted = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        generator.stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    live = asyncio.create_task(_live(generator)) if sys.stderr.isatty() else None
    try:
        return await generator.run(), interrupted.is_set()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if live is not None:
            live.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def _live(generator: LoadGenerator) -> None:
    """A line that is written over, until cancelled."""
    before, then_s = 0, time.perf_counter()
    while True:
        await asyncio.sleep(_LIVE_S)
        answered, now_s = generator.answered, time.perf_counter()
        rate, before, then_s = (answered - before) / (now_s - then_s), answered, now_s
        if generator.started_s < now_s:
            latencies = "  ".join(f"p{q} {_ms(generator.latencies.percentile_s(q) * 1e3)}" for q in (50, 99))
            errors = sum(generator.errors.values())
            line = f"{now_s - generator.started_s:6.1f} s  {rate:9,.0f} /s  {latencies}  {errors:,} errors"
        else:
            line = "warming up"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _figures(load: Load, model: str, result: Result) -> str:
    """As JSON; null is what was not measured."""
    figures = {
        "address": load.address,
        "model": model,
        "connections": load.connections,
        "streams": load.streams,
        "rate": load.rate or None,
        "request_bytes": len(load.messages[0]),
        **asdict(result),
        "per_second": result.per_second,
        "cpu_us": result.cpu_us,
    }
    return json.dumps(json.loads(json.dumps(figures), parse_constant=lambda nan: None), indent=1) + "\n"


def _tell(load: Load, model: str, result: Result) -> None:
    loop = f"open loop, {load.rate:g} requests/s" if load.rate else "closed loop"
    size = format_bytes(len(load.messages[0]))
    print(f"{model} at {load.address}: {load.connections} x {load.streams}, {loop}, requests of {size}")
    failed = sum(result.errors.values())
    print(f"answered   {result.requests:,} in {result.seconds:.1f} s, {result.per_second:,.1f} /s; {failed:,} errors")
    told = (("p50", result.p50_ms), ("p90", result.p90_ms), ("p99", result.p99_ms), ("max", result.max_ms))
    print("latency    " + "  ".join(f"{name} {_ms(latency_ms)}" for name, latency_ms in told))
    per_s = format_bytes(int((result.sent_bytes + result.received_bytes) / max(result.seconds, 1e-9)))
    sent, received = format_bytes(result.sent_bytes), format_bytes(result.received_bytes)
    print(f"messages   {sent} sent, {received} received, {per_s}/s together")
    servers = ", ".join(
        f"{used:,.1f} us (process {pid})" for pid, used in zip(load.server_pids, result.server_us, strict=True)
    )
    print(f"CPU        {f'server {servers}; ' if servers else ''}this client {result.client_us:,.1f} us per request")
    for name, count in sorted(result.errors.items()):
        print(f"errors     {count:,} {name}")
    for words in result.words:
        print(f"           {words}")


def _ms(latency_ms: float) -> str:
    return "-" if math.isnan(latency_ms) else f"{latency_ms:.2f} ms"
