"""Tools that speak HTTP/2, and grpcio from threads; tritonclient and grpc.aio are in tests/mesh, through a pod."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from mesh.tls import Tls
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S, Handled, serving
from tests.mesh.http2.wire import prefixed

needs = {
    tool: pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")
    for tool in ("h2load", "curl")
}


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    return said.decode()


async def test_grpcio_from_threads() -> None:
    async with serving("h2", Handled()) as (_, address):

        def call_all() -> list[bytes]:
            with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(8) as threads:
                later = channel.unary_unary("/test/later")
                return list(threads.map(lambda n: later(b"%d" % n, timeout=TIMEOUT_S), range(1_000, 2_000)))

        answers = await asyncio.to_thread(call_all)
        assert answers == [str(n)[::-1].encode() for n in range(1_000, 2_000)]


@needs["h2load"]
@pytest.mark.parametrize(("connections", "streams"), [(1, 1), (8, 8), (64, 1), (2, 1_000)])
async def test_h2load(tmp_path: Path, connections: int, streams: int) -> None:
    requests = min(4_000, 500 * connections * streams)
    body = tmp_path / "body"
    body.write_bytes(prefixed(bytes(291)))
    async with serving("h2", Handled()) as (_, address):
        said = await run(
            *("h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-n{requests}", "-d", str(body)),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}/test/later"),
        )
        assert f"{requests} succeeded, 0 failed, 0 errored, 0 timeout" in said
        assert f"({requests * 296}) data" in said


@needs["h2load"]
async def test_h2load_over_tls(tmp_path: Path, authority: Authority) -> None:
    body = tmp_path / "body"
    body.write_bytes(prefixed(bytes(100_000)))
    async with serving("h2", Handled(), Tls(authority.files(mutual=False))) as (_, address):
        said = await run(
            *("h2load", "-t1", "-c8", "-m8", "-n400", "-d", str(body)),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", f"https://{address}/test/later"),
        )
        assert "Application protocol: h2" in said
        assert "400 succeeded, 0 failed, 0 errored, 0 timeout" in said


@needs["curl"]
@pytest.mark.parametrize("secure", [False, True])
async def test_curl(tmp_path: Path, authority: Authority, secure: bool) -> None:
    body = tmp_path / "body"
    body.write_bytes(prefixed(b"hello"))
    tls = Tls(authority.files(mutual=False)) if secure else None
    async with serving("h2", Handled(), tls) as (_, address):
        how = ("--http2", "--cacert", authority.ca) if secure else ("--http2-prior-knowledge",)
        curl = ("curl", *how, "-s", "-w", "%{http_code} %header{grpc-status}", "-o")
        url = f"{'https' if secure else 'http'}://{address}/test/echo"
        assert (await run(*curl, "/dev/null", url)) == "405 12"
        assert (await run(*curl, "/dev/null", "-X", "POST", "-H", "content-type: text/plain", url)) == "415 2"
        grpc_post = ("-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary")
        assert (await run(*curl, str(tmp_path / "answer"), *grpc_post, f"@{body}", url)).startswith("200")
        assert (tmp_path / "answer").read_bytes() == prefixed(b"hello")
