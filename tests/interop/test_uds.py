"""Unix sockets beside the port. Authority: issue 3; gRPC's doc/naming.md (`unix:path`, `unix:///absolute_path`)."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import grpc.aio
import pytest

from mesh.config import Config
from mesh.frontends import FRONTENDS, open_client
from mesh.pod import CannotStart, Pod
from mesh.tls import Tls
from tests.mesh.certificates import Authority
from tests.mesh.client import Client
from tests.mesh.frontends import MAX_MESSAGE, TIMEOUT_S, Handled, serving
from tests.mesh.pods import Loads, running


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "pod.sock")


def content(path: str) -> str | None:
    return Path(path).read_text() if os.path.exists(path) else None


def left_behind(path: str) -> None:
    """What a server that was killed leaves: a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)


@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_a_pod_serves_on_its_socket_in_plaintext_and_on_its_port(
    frontend: str, path: str, loads: Loads, authority: Authority
) -> None:
    left_behind(path)
    files = authority.files(mutual=True)
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.client_ca}
    async with running("a", loads, frontend=frontend, uds=path, **tls) as mesh:
        await mesh.register("m", load=True)
        assert await mesh.infer("m") == "a"
        for address in (f"unix:{path}", f"unix://{path}"):
            async with Client(address) as mesh.clients["a"]:
                assert await mesh.infer("m") == "a"
    assert content(path) is None


@pytest.mark.parametrize("kind", FRONTENDS)
@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_our_clients_talk_to_sockets_without_tls(
    frontend: str, kind: str, path: str, authority: Authority
) -> None:
    client = open_client(kind, tls=Tls(authority.files(mutual=True)))
    async with serving(frontend, Handled(), address=f"unix:{path}"):
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        answer, _ = await client.call(f"unix:{path}", "/test/echo", bytes(MAX_MESSAGE), (), deadline)
        assert answer == bytes(MAX_MESSAGE)
        await client.close()


async def refused(path: str) -> str:
    config = Config(host="127.0.0.1", grpc_port=0, metrics_port=0, uds=path)
    with pytest.raises(CannotStart) as error:
        await Pod(config).run()
    return str(error.value)


@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_a_path_that_cannot_be_used(frontend: str, path: str, tmp_path: Path) -> None:
    async with serving(frontend, Handled(), address=f"unix:{path}"):
        assert await refused(path) == f"the Unix socket {path} cannot be opened: Address already in use"
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:  # nobody has taken it from its server
            assert await channel.unary_unary("/test/echo")(b"x", timeout=TIMEOUT_S) == b"x"
    file = tmp_path / "file"
    (tmp_path / "file").write_text("precious")
    assert await refused(str(file)) == f"the Unix socket {file} cannot be opened: it exists and is no socket"
    assert content(str(file)) == "precious"
    nowhere = str(tmp_path / "no" / "where")
    assert await refused(nowhere) == f"the Unix socket {nowhere} cannot be opened: No such file or directory"


def test_a_path_may_be_so_long() -> None:
    """unix(7): sun_path has 108 bytes, the last one zero."""
    assert Config(uds="/" + "s" * 106).validate() is None
    said = Config(uds="/" + "s" * 105 + "ü").validate()
    assert said is not None
    assert said.startswith("--uds: expected a path of at most 107 bytes, found ")
