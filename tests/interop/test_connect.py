"""@connectrpc/connect-node with its gRPC transport, on Node's own HTTP/2. Authority: issue 3; gRPC over HTTP/2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from grpc_tools import protoc

from mesh.local_cluster import LocalPod
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S

SCRIPT = str(Path(__file__).with_name("connect.mjs"))


@pytest.fixture(scope="session")
def descriptors(proto: str) -> str:
    written = proto.replace(".proto", ".binpb")
    assert protoc.main(["protoc", f"-I{Path(proto).parent}", f"--descriptor_set_out={written}", proto]) == 0
    return written


def see(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "large": True,
        "streamed": ["ok 1", "model 'nobody' is not registered", "ok 3"],
        "late": "DeadlineExceeded",
        "cancelled": "Canceled",
        "error": ["NotFound", "model 'grün 100 %' is not registered"],
    }


def test_plain(pod: LocalPod, node: str, descriptors: str) -> None:
    see(node, SCRIPT, pod.address, descriptors)


@pytest.mark.parametrize("secure_pod", ["h2"], indirect=True)
def test_mutual_tls(secure_pod: LocalPod, node: str, descriptors: str, authority: Authority) -> None:
    shown = authority.issue("client", name="client")
    see(node, SCRIPT, f"localhost:{secure_pod.grpc_port}", descriptors, authority.ca, *shown)
