"""Node's gRPC, @grpc/grpc-js, on its own HTTP/2 stack. Authority: issue 3; gRPC over HTTP/2, PROTOCOL-HTTP2.md."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.local_cluster import LocalPod
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S, Handled, serving

SCRIPT = str(Path(__file__).with_name("grpc_js.js"))

See = Callable[..., dict[str, Any]]


@pytest.fixture
def see(node: str, proto: str) -> See:
    """What scenes of the script tell."""

    def run(scenes: str, address: str, *tls: str) -> dict[str, Any]:
        command = [node, SCRIPT, scenes, address, proto, *tls]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stderr) == (0, "")
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    return run


def test_v2(pod: LocalPod, see: See) -> None:
    scenes = "unary,many,large,stream,deadline,cancel,error,metadata,keepalive,gzip"
    seen = see(scenes, pod.address)
    assert seen == {
        "unary": True,
        "many": 200,
        "large": True,
        "stream": ["OK", "ok 1", "model 'nobody' is not registered", "ok 3"],
        "deadline": "DEADLINE_EXCEEDED",
        "cancel": ["CANCELLED", True],
        "error": ["NOT_FOUND", "model 'grün 100 %' is not registered"],
        "metadata": [True, "pod-1", True, "pod-1"],
        "keepalive": "OK",
        "gzip": True,
    }


def test_mutual_tls(secure_pod: LocalPod, see: See, authority: Authority) -> None:
    shown, address = authority.issue("client", name="client"), f"localhost:{secure_pod.grpc_port}"
    seen = see("unary,many,large,stream", address, authority.ca, *shown)
    assert (seen["unary"], seen["many"], seen["large"], seen["stream"][0]) == (True, 200, True, "OK")
    for refused in ((), (authority.ca,)):
        assert see("unavailable", address, *refused)["unavailable"] == "UNAVAILABLE"


async def test_no_call_is_lost_when_a_server_drains(node: str) -> None:
    """RFC 9113 §6.8: streams above the last one that GOAWAY names were not processed, and are made again elsewhere."""
    first, second = Handled(), Handled()
    async with serving("h2", second) as (_, other), serving("h2", first) as (leaving, address):
        script = await asyncio.create_subprocess_exec(
            *(node, SCRIPT, "drain", f"{address},{other}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert script.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            assert await script.stderr.readline() == b"calling\n"
            while not first.answered:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await leaving.stop(5)
            while second.answered < 200:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            said, _ = await script.communicate(b"")
    told = json.loads(said)["drain"]
    assert (told["failed"], script.returncode) == ([], 0)
    assert told["calls"] == first.answered + second.answered
