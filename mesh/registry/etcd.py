"""The registry on etcd v3.

A change is applied exactly once although its transaction may be sent several times. It carries a key of its own beside
the prefix's keys, a receipt, which must be as it was when the transaction was first sent:

    if <expectations> and the receipt is unchanged    then <writes>, receipt := applied    else read the receipt

An attempt that finds the receipt changed knows that an earlier one was applied, and at which revision. When it is
unchanged the expectations do not hold; then, so that no copy of the transaction that is still under way can be applied
when they hold again, the receipt is voided before that is said:

    if the receipt is unchanged    then receipt := void    else read the receipt

Once a change has been answered, its late copies find the receipt changed and only read. Receipts are bound to the
session's lease, used by one change at a time, and never watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

from mesh.registry.base import Change, Commit, Deleted, Entry, LeaseLost, RegistryError, Snapshot
from mesh.registry.etcd_client import ATTEMPT_S, EtcdClient
from mesh.registry.etcd_endpoint import Login, Tls
from protos import etcd_pb2 as pb

log = logging.getLogger(__name__)

PORT: Final = 2379
RECEIPTS_TTL_S: Final = 60.0
"""Of the lease that holds the receipts of commits; only how long they outlive a crashed process."""


_APPLIED: Final = b"applied"
_VOID: Final = b"void"


@dataclass(slots=True)
class _Receipt:
    key: bytes
    revision: int = 0
    """When it was last marked; 0: never."""


class EtcdSession:
    """A lease with its keeper (`base.Session`), and the receipts of the changes made through it."""

    def __init__(self, client: EtcdClient, prefix: bytes, lease: int, ttl_s: float) -> None:
        self.lease = lease
        self._client = client
        self._prefix = prefix
        self._receipts: list[_Receipt] = []
        self._receipts_made = 0
        self._keeper = asyncio.create_task(self._keep_alive(ttl_s), name=f"lease {lease:x}")

    @property
    def ended(self) -> bool:
        return self._keeper.done()

    async def put(self, key: str, value: bytes) -> None:
        await self.apply((), [_put(self._prefix + _encode(key), value, self.lease)])

    async def delete(self, key: str) -> None:
        name = self._prefix + _encode(key)
        ours = pb.Compare(key=name, target=pb.Compare.LEASE, result=pb.Compare.EQUAL, lease=self.lease)
        with contextlib.suppress(LeaseLost):  # the key is gone with it
            await self.apply([ours], [_delete(name)])

    async def lost(self) -> None:
        await asyncio.wait([self._keeper])
        if not self._keeper.cancelled():
            self._keeper.result()  # a bug in the keeper is not a loss

    async def close(self) -> None:
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        with contextlib.suppress(RegistryError):  # the TTL ends it, or has
            await self._client.revoke(self.lease, budget_s=ATTEMPT_S)

    async def apply(self, expect: Iterable[pb.Compare], writes: Iterable[pb.RequestOp]) -> int | None:
        """Apply exactly once; the revision, or None when an expectation does not hold.

        Raises:
            LeaseLost: the last attempt found no lease.
            RegistryError: unknown whether it was applied.
        """
        if self._receipts:
            receipt = self._receipts.pop()
        else:
            receipt = _Receipt(self._prefix + b"\0%x/%x" % (self.lease, self._receipts_made))
            self._receipts_made += 1
        mark = await self._mark(receipt, _APPLIED, expect, writes) or await self._mark(receipt, _VOID)
        self._receipts.append(receipt)  # only now: one whose change is unaccounted for is never used again
        return receipt.revision if mark == _APPLIED else None

    async def _mark(
        self, receipt: _Receipt, mark: bytes, expect: Iterable[pb.Compare] = (), writes: Iterable[pb.RequestOp] = ()
    ) -> bytes | None:
        """Mark the receipt and write, if all is as expected; the mark that it has got by this or an earlier attempt."""
        answer = await self._client.transact(
            pb.TxnRequest(
                compare=[*expect, _at(receipt.key, receipt.revision)],
                success=[*writes, _put(receipt.key, mark, self.lease)],
                failure=[pb.RequestOp(request_range=pb.RangeRequest(key=receipt.key))],
            )
        )
        if answer.succeeded:
            receipt.revision = answer.header.revision
            return mark
        found = answer.responses[0].response_range.kvs
        if not found and receipt.revision:
            raise LeaseLost(f"etcd: lease {self.lease:x} has taken its receipts along")
        if not found or found[0].mod_revision == receipt.revision:
            return None
        receipt.revision = found[0].mod_revision
        return found[0].value

    async def _keep_alive(self, ttl_s: float) -> None:
        """Renew three times per TTL; return when etcd has ended the lease, or may have while it was out of reach."""
        # Counted from the answer: from the question, attempts in an outage would use up what the last one has won.
        expires_s = time.monotonic() + ttl_s
        while time.monotonic() < expires_s:
            await asyncio.sleep(ttl_s / 3)
            try:
                ttl_s = await self._client.renew(self.lease, budget_s=expires_s - time.monotonic())
                expires_s = time.monotonic() + ttl_s
            except LeaseLost:
                break
            except RegistryError as error:
                log.warning("lease %x not renewed, %.1f s left: %s", self.lease, expires_s - time.monotonic(), error)
        log.warning("lease %x lost", self.lease)


class EtcdRegistry:
    """One prefix of an etcd cluster (`base.Registry`)."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        assert prefix.endswith("/")
        self._client = client
        self._prefix = _encode(prefix)
        # From U+0001 to the prefix's end: what starts with U+0000 is ours.
        self._range = self._prefix + b"\x01", self._prefix[:-1] + b"0"
        self._own: EtcdSession | None = None
        self._own_lock = asyncio.Lock()

    async def snapshot(self) -> Snapshot:
        revision, found = await self._client.range(*self._range)
        return Snapshot(revision, [self._entry(kv) for kv in found])

    async def watch(self, after: int) -> AsyncGenerator[Sequence[Change], None]:
        async with contextlib.aclosing(self._client.watch(*self._range, after)) as batches:
            async for batch in batches:
                yield [self._change(event) for event in batch]

    async def get(self, key: str) -> Entry | None:
        kv = await self._client.get(self._prefix + _encode(key))
        return None if kv is None else self._entry(kv)

    async def commit(self, change: Commit) -> int | None:
        expect = [_at(self._prefix + _encode(key), revision) for key, revision in change.expect.items()]
        writes = [_put(self._prefix + _encode(key), value) for key, value in change.put.items()]
        writes += [_delete(self._prefix + _encode(key)) for key in change.delete]
        if not writes:
            answer = await self._client.transact(pb.TxnRequest(compare=expect))
            return answer.header.revision if answer.succeeded else None
        session = await self._own_session()
        try:
            return await session.apply(expect, writes)
        except LeaseLost as error:
            raise RegistryError(f"unknown whether the change was applied: {error}") from error

    async def open_session(self, ttl_s: float) -> EtcdSession:
        lease, granted_s = await self._client.grant(math.ceil(ttl_s))
        return EtcdSession(self._client, self._prefix, lease, granted_s)

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()
        await self._client.close()

    async def _own_session(self) -> EtcdSession:
        async with self._own_lock:
            if self._own is None or self._own.ended:
                self._own = await self.open_session(RECEIPTS_TTL_S)
            return self._own

    def _entry(self, kv: pb.KeyValue) -> Entry:
        return Entry(self._key(kv), kv.value, kv.mod_revision, kv.create_revision)

    def _change(self, event: pb.Event) -> Change:
        if event.type == pb.Event.DELETE:
            return Deleted(self._key(event.kv), event.kv.mod_revision)
        return self._entry(event.kv)

    def _key(self, kv: pb.KeyValue) -> str:
        return kv.key[len(self._prefix) :].decode("utf-8", "surrogateescape")


def _encode(key: str) -> bytes:
    assert key.lstrip("\0") == key != "", "keys are not empty and do not start with U+0000"
    return key.encode("utf-8", "surrogateescape")


def _at(key: bytes, revision: int) -> pb.Compare:
    # etcd compares an absent key as one of revision 0 (server/etcdserver/apply.go, applyCompare).
    return pb.Compare(key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision)


def _put(key: bytes, value: bytes, lease: int = 0) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def _delete(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


@dataclass(frozen=True, slots=True)
class Address:
    """What an etcd URL says (`mesh.registry.open_registry` has the grammar)."""

    endpoints: tuple[tuple[str, int], ...]
    prefix: str
    login: Login | None = None
    secure: bool = False
    parameters: tuple[tuple[str, str], ...] = ()


def parse(url: str) -> Address:
    """Take a URL apart. By hand, because urllib's parser knows one host only.

    Raises:
        ValueError: one sentence that says what was expected.
    """
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    user, colon, password = userinfo.partition(":")
    if at and not (user and colon):
        raise ValueError(f"expected user:password before the @ of an {scheme}:// URL")
    known = ("ca", "cert", "key", "server_name") if scheme == "etcds" else ()
    parameters = parse_qsl(query, keep_blank_values=True)
    names = {name for name, _ in parameters}
    if not names <= set(known) or len(names) < len(parameters):
        expected = f"each of {', '.join(known)} once at most" if known else "no parameters (etcds:// has TLS)"
        raise ValueError(f"expected {expected} after the ? of an {scheme}:// URL")
    if ("cert" in names) != ("key" in names):
        raise ValueError("expected cert and key together in an etcds:// URL")
    return Address(
        endpoints=tuple(_endpoint(host) for host in hosts.split(",")),
        prefix="/" + "".join(f"{unquote(part)}/" for part in path.split("/") if part),
        login=Login(unquote(user), unquote(password)) if at else None,
        secure=scheme == "etcds",
        parameters=tuple(parameters),
    )


def _endpoint(text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        well_formed = bool(bracket) and port[:1] in ("", ":")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        well_formed = True
    port = port or str(PORT)
    if not (well_formed and host and port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"expected host, host:port or [IPv6 address]:port between commas, not {text!r}")
    return host, int(port)


def open_url(url: str) -> EtcdRegistry:
    """Raises ValueError (the URL) and OSError (a file it names)."""
    address = parse(url)
    tls = None
    if address.secure:
        given = dict(address.parameters)
        ca, certificate, key = (
            Path(given[name]).read_bytes() if name in given else None for name in ("ca", "cert", "key")
        )
        tls = Tls(ca, certificate, key, given.get("server_name"))
    return EtcdRegistry(EtcdClient(address.endpoints, tls, address.login), address.prefix)
