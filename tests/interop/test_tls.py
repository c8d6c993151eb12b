"""TLS and mutual TLS, both front ends. Authority: issue 3; gRPC over HTTP/2 and RFC 9113 §3.2 and §9.2 (ALPN, TLS 1.2
or later); Kubernetes' way with secrets: files change, nobody is told."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.errors import PodUnavailable
from mesh.frontends import FRONTENDS, open_client
from mesh.h2_server import H2Server
from mesh.http2.frames import PREFACE
from mesh.http2.limits import Limits
from mesh.loop import new_event_loop
from mesh.rpc import Client
from mesh.tls import Tls, TlsError, TlsFiles
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S, Handled, disconnected, serving

SOON_S = 10.0
BIG = bytes(5 << 20)

Opened = Callable[[str, Tls | None], Client]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Opens clients of pods, and closes them."""
    clients = []

    def open_one(kind: str, tls: Tls | None) -> Client:
        clients.append(open_client(kind, tls=tls))
        return clients[-1]

    yield open_one
    for client in clients:
        await client.close()


async def echo(client: Client, address: str, message: bytes = b"hello") -> bytes:
    answer, _ = await client.call(address, "/test/echo", message, (), asyncio.get_running_loop().time() + SOON_S)
    return answer


def grpcio_credentials(ca: str, certificate: tuple[str, str] | None = None) -> grpc.ChannelCredentials:
    chain, key = map(Path.read_bytes, map(Path, certificate)) if certificate else (None, None)
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, chain)


def grpcio_echo(address: str, credentials: grpc.ChannelCredentials | None) -> bytes | grpc.StatusCode:
    """What grpcio's synchronous client gets."""
    options = [("grpc.max_receive_message_length", -1)]
    with (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address)
    ) as channel:
        try:
            answer: bytes = channel.unary_unary("/test/echo")(BIG, timeout=SOON_S)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()
            return status
        return answer


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_who_is_trusted_is_served(frontend: str, mutual: bool, authority: Authority, opened: Opened) -> None:
    tls = Tls(authority.files(mutual=mutual))
    shown = authority.issue("client", name="client") if mutual else None
    async with serving(frontend, Handled(), tls) as (_, address):
        for kind in FRONTENDS:
            client = opened(kind, tls)
            assert await echo(client, address, BIG) == BIG
            assert await echo(client, address.replace("127.0.0.1", "localhost")) == b"hello"
        assert await asyncio.to_thread(grpcio_echo, address, grpcio_credentials(authority.ca, shown)) == BIG
        async with grpc.aio.secure_channel(address, grpcio_credentials(authority.ca, shown)) as channel:
            call = channel.stream_stream("/test/stream")(iter([b"a", b"b"]), timeout=SOON_S)
            assert [message async for message in call] == [b"1:a", b"2:b", b"end"]


@pytest.fixture
def by_the_readme(tmp_path: Path) -> TlsFiles:
    """What the README's commands make."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"^openssl (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, shell=True, check=True, capture_output=True, cwd=tmp_path)
    return TlsFiles(cert=f"{tmp_path}/tls.crt", key=f"{tmp_path}/tls.key", client_ca=f"{tmp_path}/ca.crt")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_the_readmes_certificates(by_the_readme: TlsFiles, opened: Opened) -> None:
    tls = Tls(by_the_readme)
    async with serving("h2", Handled(), tls) as (_, address):
        for kind in FRONTENDS:
            assert await echo(opened(kind, tls), address) == b"hello"


@pytest.mark.parametrize("kind", FRONTENDS)
@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_who_is_not_is_refused_at_once_and_told(
    frontend: str, kind: str, authority: Authority, stranger: Authority, opened: Opened
) -> None:
    files = authority.files(mutual=True)
    no_certificate = TlsFiles(ca=authority.ca)
    wrong_certificate = TlsFiles(ca=authority.ca, **dict(zip(("cert", "key"), stranger.issue(), strict=True)))
    wrong_authority = TlsFiles(cert=files.cert, key=files.key, ca=stranger.ca)
    wrong_name = TlsFiles(cert=files.cert, key=files.key, ca=authority.ca, name="elsewhere")
    async with serving(frontend, Handled(), Tls(files)) as (_, address):
        for wrong, says in (
            (no_certificate, "may be expected"),
            (wrong_certificate, "may be expected"),
            (wrong_authority, "certificate is not accepted"),
            (wrong_name, "elsewhere"),
            (None, "may be expected"),
        ):
            client = opened(kind, Tls(wrong) if wrong else None)
            with pytest.raises(PodUnavailable) as refused:
                async with asyncio.timeout(SOON_S / 2):
                    await echo(client, address)
            assert kind != "h2" or says in str(refused.value)
        assert await asyncio.to_thread(grpcio_echo, address, None) is grpc.StatusCode.UNAVAILABLE
        assert await echo(opened(kind, Tls(files)), address) == b"hello"


@pytest.mark.parametrize("kind", FRONTENDS)
@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_tls_spoken_to_a_port_without(frontend: str, kind: str, authority: Authority, opened: Opened) -> None:
    async with serving(frontend, Handled()) as (_, address):
        with pytest.raises(PodUnavailable) as refused:
            async with asyncio.timeout(SOON_S / 2):
                await echo(opened(kind, Tls(authority.files(mutual=False))), address)
        assert kind != "h2" or "does not speak TLS" in str(refused.value)
        assert await echo(opened(kind, None), address) == b"hello"


def replace(paths: TlsFiles, by: TlsFiles, *only: str) -> None:
    """As a mounted secret is replaced."""
    for field in only or ("cert", "key", "client_ca", "ca"):
        Path(getattr(paths, field)).write_bytes(Path(getattr(by, field)).read_bytes())


@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_certificates_are_replaced_without_a_restart(
    frontend: str, authority: Authority, stranger: Authority, opened: Opened, tmp_path: Path
) -> None:
    before, others = authority.files(mutual=True), stranger.files(mutual=True)
    files, after = Authority(tmp_path / "mounted").files(mutual=True), Tls(others)
    replace(files, before)
    tls = Tls(files)
    async with serving(frontend, Handled(), tls) as (_, address):
        clients = {kind: opened(kind, tls) for kind in FRONTENDS}
        assert [await echo(client, address) for client in clients.values()] == [b"hello"] * 2
        assert not tls.reload()
        replace(files, others, "cert")
        with pytest.raises(TlsError, match="is not the key of"):  # one file is new, the other not yet
            tls.reload()
        assert await echo(opened(frontend, Tls(before)), address) == b"hello"
        replace(files, others)
        assert tls.reload()
        for kind, client in clients.items():
            assert await echo(client, address) == b"hello"  # on its old connection, or on a new one
            assert await echo(opened(kind, after), address) == b"hello"
            assert await echo(opened(kind, tls), address) == b"hello"
            for part in (Tls(before), Tls(TlsFiles(cert=before.cert, key=before.key, ca=others.ca))):
                with pytest.raises(PodUnavailable):
                    await echo(opened(kind, part), address)


async def knocked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What a peer says until it has closed the connection."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, new_event_loop])
def test_what_is_no_handshake_leaves_nothing_behind(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """On both event loops, whose TLS are two."""

    async def knock(port: int, said: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        await knocked(reader, writer)

    async def talk() -> None:
        tls = Tls(authority.files(mutual=True))
        server = H2Server(max_message_bytes=1 << 20, default_timeout_s=10.0, tls=tls, limits=Limits(handshake_s=0.2))
        port = server.listen("127.0.0.1:0")
        await server.start(Handled().handlers())
        silent, half_a_hello = b"", bytes.fromhex("16030100ff0100")
        spoken = (PREFACE, b"GET / HTTP/1.1\r\n\r\n", bytes(100), half_a_hello, silent)
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(knock(port, said) for said in spoken for _ in range(5)))
        await disconnected(port)
        client = open_client("h2", tls=tls)
        assert await echo(client, f"127.0.0.1:{port}") == b"hello"
        await client.close()
        await server.stop(0)
        await disconnected(port)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(talk())
    assert not caplog.records


@pytest.mark.parametrize("protocols", [None, ["http/1.1"]])
async def test_alpn_is_required(protocols: list[str] | None, authority: Authority) -> None:
    """RFC 9113 §3.2: h2, or the connection ends."""
    context = ssl.create_default_context(cafile=authority.ca)
    if protocols:
        context.set_alpn_protocols(protocols)
    async with serving("h2", Handled(), Tls(authority.files(mutual=False))) as (_, address):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        assert not await knocked(reader, writer)
        await disconnected(int(port))


@pytest.mark.parametrize(
    ("version", "ciphers", "served"),
    [
        (ssl.TLSVersion.TLSv1_3, "DEFAULT", True),
        (ssl.TLSVersion.TLSv1_2, "DEFAULT", True),
        (ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384", False),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-SHA384", False),
    ],
)
async def test_what_http2_forbids_of_tls_1_2(
    version: ssl.TLSVersion, ciphers: str, served: bool, authority: Authority
) -> None:
    """RFC 9113 §9.2.2 and appendix A: no cipher without an ephemeral key and AEAD."""
    context = ssl.create_default_context(cafile=authority.ca)
    context.set_alpn_protocols(["h2"])
    context.maximum_version = version
    context.set_ciphers(ciphers)
    async with serving("h2", Handled(), Tls(authority.files(mutual=False))) as (_, address):
        host, port = address.split(":")
        try:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        except OSError:
            assert not served
        else:
            assert served
            writer.write(b"not HTTP")
            await knocked(reader, writer)
        await disconnected(int(port))


async def test_our_client_requires_it_as_well(authority: Authority, opened: Opened) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await knocked(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PodUnavailable, match="it does not speak HTTP/2 over TLS"):
            await echo(opened("h2", Tls(TlsFiles(ca=authority.ca))), f"127.0.0.1:{port}")
        await disconnected(port)
