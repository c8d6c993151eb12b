"""The etcd registry when the store, the network or a lease fails; every etcd here is a real one."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import pytest

from mesh.local_etcd import LocalEtcd, find_etcd
from mesh.registry import open_registry
from mesh.registry.base import Change, Commit, Compacted, Deleted, Entry, LeaseLost, Registry, RegistryError
from mesh.registry.etcd import EtcdRegistry, EtcdSession
from mesh.registry.etcd_client import EtcdClient
from protos import etcd_pb2 as pb
from tests.mesh.registry.proxy import Proxy

SHORT_TTL_S = 2.0
"""The least that etcd grants with its default election timeout of 1 s."""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Registry]:
    registry = open_registry(url)
    try:
        yield registry
    finally:
        await registry.close()


def endpoint(etcd: LocalEtcd) -> tuple[str, int]:
    host, _, port = etcd.url.partition(":")
    return host, int(port)


@pytest.fixture
async def registry(etcd_url: str) -> AsyncIterator[Registry]:
    async with opened(etcd_url) as registry:
        yield registry


async def until(registry: Registry, after: int, last: Change | str) -> list[Change]:
    """Changes after a revision, through that of a key."""
    seen: list[Change] = []
    async with aclosing(registry.watch(after)) as batches:
        async for batch in batches:
            seen += batch
            if any(last in (change, change.key) for change in batch):
                break
    return seen


# -- exactly once


@pytest.fixture
async def proxied(etcd: LocalEtcd, etcd_url: str) -> AsyncIterator[tuple[Proxy, Registry]]:
    async with Proxy(endpoint(etcd)[1]) as proxy, opened(etcd_url.replace(etcd.url, proxy.url)) as registry:
        await registry.commit(Commit(put={"warm": b""}))
        yield proxy, registry


async def test_a_commit_whose_answer_is_lost_is_applied_once_and_answered(
    proxied: tuple[Proxy, Registry], registry: Registry
) -> None:
    proxy, far = proxied
    start = (await registry.snapshot()).revision
    proxy.lose_answers()
    committing = asyncio.create_task(far.commit(Commit({"a": 0}, {"a": b"1"})))
    [entry] = await until(registry, start, "a")
    proxy.mend()
    assert await committing == entry.revision
    end = await registry.commit(Commit(put={"end": b""}))
    assert [change.revision for change in await until(registry, start, "end")] == [entry.revision, end]


async def test_a_lost_answer_does_not_undo_what_others_did_since(
    proxied: tuple[Proxy, Registry], registry: Registry
) -> None:
    """Created, removed by somebody else, and not created again by the attempt that follows."""
    proxy, far = proxied
    start = (await registry.snapshot()).revision
    proxy.lose_answers()
    committing = asyncio.create_task(far.commit(Commit({"a": 0}, {"a": b"1"})))
    [entry] = await until(registry, start, "a")
    assert await registry.commit(Commit({"a": entry.revision}, delete=["a"])) is not None
    proxy.mend()
    assert await committing == entry.revision
    assert await registry.get("a") is None


async def test_a_lost_request_is_not_taken_for_somebody_elses_equal_one(
    proxied: tuple[Proxy, Registry], registry: Registry
) -> None:
    proxy, far = proxied
    proxy.lose_requests()
    committing = asyncio.create_task(far.commit(Commit({"a": 0}, {"a": b"same"})))
    await proxy.lost.wait()
    assert await registry.commit(Commit({"a": 0}, {"a": b"same"})) is not None
    proxy.mend()
    assert await committing is None


class Recording(EtcdClient):
    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__([address])
        self.sent: list[pb.TxnRequest] = []

    async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        self.sent.append(transaction)
        return await super().transact(transaction)


async def test_requests_that_arrive_after_their_answers_do_nothing(etcd: LocalEtcd) -> None:
    client = Recording(endpoint(etcd))
    registry = EtcdRegistry(client, f"/late/{secrets.token_hex(8)}/")
    session = await registry.open_session(60)
    revision = await registry.commit(Commit({"a": 0}, {"a": b"1"}))
    assert revision is not None
    assert await registry.commit(Commit({"a": 0}, {"a": b"2"})) is None
    assert await registry.commit(Commit({"a": revision}, delete=["a"])) is not None
    await session.put("pod", b"old")
    await session.put("pod", b"new")
    before = await registry.snapshot()
    for _ in range(2):
        for late in tuple(client.sent):
            assert not (await client.transact(late)).succeeded
        assert await registry.snapshot() == before
    await session.put("pod", b"newer")
    assert await registry.commit(Commit({"a": 0}, {"a": b"3"})) is not None
    await session.close()
    await registry.close()


# -- the store dies and comes back


async def test_no_change_is_lost_or_doubled_when_etcd_is_killed(tmp_path: Path) -> None:
    """Two writers count up one key against each other while etcd is killed twice; a watch sees every number once."""
    async with (
        LocalEtcd(tmp_path) as etcd,
        opened(f"etcd://{etcd.url}/p") as one,
        opened(f"etcd://{etcd.url}/p") as two,
    ):
        start = (await one.snapshot()).revision
        watching = asyncio.create_task(until(two, start, "end"))
        won = 0

        async def count(registry: Registry) -> None:
            nonlocal won
            while won < 300:
                entry = await registry.get("n")
                number, revision = (int(entry.value), entry.revision) if entry else (0, 0)
                if await registry.commit(Commit({"n": revision}, {"n": b"%d" % (number + 1)})) is not None:
                    won += 1
                    if won in (100, 200):
                        etcd.kill()
                        etcd.spawn()

        await asyncio.gather(*(count(registry) for registry in (one, two, one, two)))
        await one.commit(Commit(put={"end": b""}))
        *numbers, _ = await watching
        assert [int(change.value) for change in numbers if isinstance(change, Entry)] == list(range(1, won + 1))


async def test_a_store_that_lost_its_data_asks_for_a_new_snapshot(tmp_path: Path) -> None:
    async with LocalEtcd(tmp_path) as etcd, opened(f"etcd://{etcd.url}/p") as registry:
        for _ in range(10):
            await registry.commit(Commit(put={"a": b""}))
        watching = asyncio.create_task(until(registry, (await registry.snapshot()).revision, "b"))
        etcd.kill()
        shutil.rmtree(tmp_path / "data")
        etcd.spawn()
        with pytest.raises(Compacted, match="restored or replaced"):
            await watching
        assert not (await registry.snapshot()).entries


async def test_a_store_out_of_reach_is_a_registry_error(tmp_path: Path) -> None:
    client = EtcdClient([endpoint(LocalEtcd(tmp_path))])
    with pytest.raises(RegistryError, match="UNAVAILABLE"):
        await client.renew(1, budget_s=0.1)
    await client.close()


async def test_endpoints_are_names_and_addresses_and_one_that_answers_is_enough(
    etcd: LocalEtcd, tmp_path: Path
) -> None:
    dead = LocalEtcd(tmp_path).url
    async with opened(f"etcd://{dead},{etcd.url.replace('127.0.0.1', 'localhost')}/names") as registry:
        for _ in range(4):
            await registry.snapshot()


# -- leases


async def test_keys_expire_when_their_pod_stops_renewing_and_not_before(etcd: LocalEtcd) -> None:
    client = EtcdClient([endpoint(etcd)])
    prefix = f"/expire/{secrets.token_hex(8)}/"
    registry = EtcdRegistry(client, prefix)
    session = await registry.open_session(SHORT_TTL_S)
    await session.put("pods/renewing", b"")
    lease, _ = await client.grant(int(SHORT_TTL_S))
    put = pb.RequestOp(request_put=pb.PutRequest(key=f"{prefix}pods/crashed".encode(), lease=lease))
    answer = await client.transact(pb.TxnRequest(success=[put]))

    [gone] = await until(registry, answer.header.revision, "pods/crashed")
    assert isinstance(gone, Deleted)
    with pytest.raises(LeaseLost):
        await client.renew(lease)
    assert [entry.key for entry in (await registry.snapshot()).entries] == ["pods/renewing"]
    await session.close()
    await registry.close()


async def test_a_revoked_lease_is_noticed(etcd: LocalEtcd, registry: Registry) -> None:
    session = await registry.open_session(SHORT_TTL_S)
    assert isinstance(session, EtcdSession)
    client = EtcdClient([endpoint(etcd)])
    await client.revoke(session.lease)
    await session.lost()
    await client.close()


async def test_an_outage_longer_than_the_ttl_loses_the_session_and_a_new_one_takes_over(tmp_path: Path) -> None:
    async with LocalEtcd(tmp_path) as etcd, opened(f"etcd://{etcd.url}/p") as registry:
        old = await registry.open_session(SHORT_TTL_S)
        await old.put("pods/a", b"old")
        await old.put("pods/forgotten", b"old")
        after = (await registry.snapshot()).revision
        etcd.kill()
        await old.lost()
        etcd.spawn()
        new = await registry.open_session(SHORT_TTL_S)
        await new.put("pods/a", b"new")
        *_, gone = await until(registry, after, "pods/forgotten")  # etcd gives leases their full TTL after a restart
        assert isinstance(gone, Deleted)
        assert [entry.value for entry in (await registry.snapshot()).entries] == [b"new"]
        await old.close()
        await new.close()


# -- three members


@asynccontextmanager
async def cluster() -> AsyncIterator[Sequence[LocalEtcd]]:
    members = [LocalEtcd() for _ in range(3)]
    initial = ",".join(f"m{n}={member.peer_url}" for n, member in enumerate(members))
    async with AsyncExitStack() as stack:
        for n, member in enumerate(members):
            member.arguments += ["--name", f"m{n}", "--initial-cluster", initial]
            stack.callback(member.stop)
            member.spawn()
        for member in members:
            await asyncio.to_thread(member.wait_until_healthy)
        yield members


async def test_a_hung_or_dead_member_of_three_is_worked_around() -> None:
    async with cluster() as members, opened(f"etcd://{','.join(member.url for member in members)}/p") as registry:
        watching = asyncio.create_task(until(registry, (await registry.snapshot()).revision, "end"))
        revision = 0

        async def count_to(end: int) -> None:
            nonlocal revision
            entry = await registry.get("n")
            for number in range(int(entry.value) + 1 if entry else 1, end):
                committed = await registry.commit(Commit({"n": revision}, {"n": b"%d" % number}))
                assert committed is not None
                revision = committed

        await count_to(100)
        members[0].pause()
        await count_to(200)
        members[0].resume()
        members[1].kill()
        await count_to(300)
        members[1].spawn()
        members[2].kill()
        await count_to(400)
        await registry.commit(Commit(put={"end": b""}))
        *numbers, _ = await watching
        assert [int(change.value) for change in numbers if isinstance(change, Entry)] == list(range(1, 400))


# -- who may


def etcdctl(etcd: LocalEtcd, *words: str) -> None:
    command = [str(Path(find_etcd()).with_name("etcdctl")), "--endpoints", etcd.url, *words]
    subprocess.run(command, check=True, capture_output=True)


async def test_a_login_is_renewed_when_its_token_is_forgotten(tmp_path: Path) -> None:
    async with LocalEtcd(tmp_path) as etcd:
        for words in (
            "user add root:secret",
            "user grant-role root root",
            "role add mesh",
            "role grant-permission mesh --prefix=true readwrite /mesh/",
            "user add pod:p@ss",
            "user grant-role pod mesh",
            "auth enable",
        ):
            etcdctl(etcd, *words.split())
        async with opened(f"etcd://pod:p%40ss@{etcd.url}/mesh") as registry:
            session = await registry.open_session(60)
            await session.put("pods/a", b"")
            watching = asyncio.create_task(until(registry, (await registry.snapshot()).revision, "b"))
            etcd.kill()  # forgets all tokens, as their age does
            etcd.spawn()
            revision = await registry.commit(Commit(put={"b": b""}))
            assert await watching == [Entry("b", b"", revision or 0, revision or 0)]
            await session.put("pods/a", b"again")
            await session.close()
            assert await registry.get("pods/a") is None
        async with opened(f"etcd://pod:p%40ss@{etcd.url}/elsewhere") as registry:
            with pytest.raises(RegistryError, match="permission denied"):
                await registry.snapshot()
            with pytest.raises(RegistryError, match="permission denied"):
                await until(registry, 1, "a")
        async with opened(f"etcd://pod:wrong@{etcd.url}/mesh") as registry:
            with pytest.raises(RegistryError, match="invalid user ID or password"):
                await registry.snapshot()


def certificates(folder: Path) -> None:
    """ca.pem, and server.pem and client.pem signed by it, each with its .key."""

    def make(name: str, *words: str) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
        command = ["openssl", "req", "-x509", *key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}", *words]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)

    make("ca")
    for name in ("server", "client"):
        make(name, "-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:etcd.test")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")
async def test_tls_with_client_certificates_and_a_server_name(tmp_path: Path) -> None:
    certificates(tmp_path)
    etcd = LocalEtcd()
    etcd.arguments += [f"--listen-client-urls=https://{etcd.url}", f"--advertise-client-urls=https://{etcd.url}"]
    etcd.arguments += [f"--cert-file={tmp_path}/server.pem", f"--key-file={tmp_path}/server.key"]
    etcd.arguments += [f"--trusted-ca-file={tmp_path}/ca.pem", "--client-cert-auth"]
    parameters = f"ca={tmp_path}/ca.pem&cert={tmp_path}/client.pem&key={tmp_path}/client.key&server_name=etcd.test"
    async with etcd, opened(f"etcds://{etcd.url}/p?{parameters}") as registry:
        revision = await registry.commit(Commit({"a": 0}, {"a": b"1"}))
        assert revision is not None
        assert await until(registry, revision - 1, "a") == [Entry("a", b"1", revision, revision)]
