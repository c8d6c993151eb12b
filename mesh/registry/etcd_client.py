"""A thin asyncio client of etcd's v3 API on grpc.aio: the calls that the registry needs, kept going.

Every call here may be repeated without harm, so every call is repeated while the store is unreachable, slow or between
leaders: reads and lease calls by nature, transactions because the caller guards them (mesh.registry.etcd).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from mesh.registry.base import Compacted, LeaseLost, RegistryError
from protos import etcd_pb2 as pb

log = logging.getLogger(__name__)

ATTEMPT_S: Final = 1.5
"""One attempt of a call. A healthy store answers in milliseconds; a hung member should cost no more than this."""
BUDGET_S: Final = 10.0
"""All attempts of a call: longer than an election, a leader's restart and a reconnect together."""
SUSPECT_S: Final = 10.0
"""How long a member that let an attempt time out is asked last: until pings have ended its connection, if it hangs."""
PAGE: Final = 1_000
"""Keys per Range."""
REAUTHENTICATIONS: Final = 3
"""Per call: a token can be refused once for age and once more by a member that has not applied its login yet."""

_OPTIONS: Final = (
    ("grpc.lb_policy_name", "round_robin"),  # one name may stand for all members (a headless service)
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),  # 30 s by default: too long for a pod with a new address
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # despite its name, the time that one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # A hung member is noticed by pings alone. etcd closes connections that ping more often than every 5 s
    # (--grpc-keepalive-min-time), and grpc stops pinging an idle stream unless told that it may go on.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", 2_000),
)
_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # by a server that stops
        grpc.StatusCode.INTERNAL,  # a stream reset by a server that stops
        grpc.StatusCode.UNKNOWN,  # etcd's own context errors
    }
)
_TOKEN_REFUSED: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")
"""etcd api/v3rpc/rpctypes/error.go; the two latter come as INVALID_ARGUMENT."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM texts; without `ca` the system's roots are trusted."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None
    """Expected in the server's certificate instead of the endpoint's own name."""


@dataclass(frozen=True, slots=True)
class Login:
    user: str
    password: str = field(repr=False)


class EtcdError(RegistryError):
    """etcd's status, for the few callers that tell one from another."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"etcd: {error.details() or 'no reason given'} ({error.code().name})")
        self.code = error.code()


@dataclass(frozen=True, slots=True)
class _Method(Generic[Q, R]):
    path: str
    request: type[Q]
    response: type[R]


_RANGE: Final = _Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
_TXN: Final = _Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
_COMPACT: Final = _Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
_GRANT: Final = _Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
_REVOKE: Final = _Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
_LOGIN: Final = _Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)
# Both are streams of requests in etcd, and both read one request and its half-close well: it is how etcd's own JSON
# gateway calls them. One request per stream spares the client a writing side to look after.
_KEEP_ALIVE: Final = _Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse)
_WATCH: Final = _Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)


class _Endpoint:
    """One address, its channel, and whether it deserves the next call."""

    def __init__(self, host: str, port: int, tls: Tls | None) -> None:
        try:
            version = ip_address(host).version
            target = f"ipv4:{host}:{port}" if version == 4 else f"ipv6:[{host}]:{port}"
        except ValueError:
            target = f"dns:///{host}:{port}"
        if tls is None:
            self.channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            name = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            self.channel = grpc.aio.secure_channel(target, credentials, options=(*_OPTIONS, *name))
        self.suspect_until_s = 0.0
        self._stubs: dict[str, Any] = {}

    def stub(self, method: _Method[Any, Any]) -> Any:
        stub = self._stubs.get(method.path)
        if stub is None:
            kind = self.channel.unary_stream if method is _WATCH else self.channel.unary_unary
            stub = self._stubs[method.path] = kind(
                method.path, method.request.SerializeToString, method.response.FromString
            )
        return stub

    def demerits(self, now_s: float) -> tuple[bool, bool]:
        ready = self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
        return not ready, now_s < self.suspect_until_s


class EtcdClient:
    """Safe to use from many tasks of the event loop it was made in.

    Every method raises `RegistryError` when the store refuses or `BUDGET_S` is over, unless it says otherwise.
    """

    def __init__(
        self, endpoints: Sequence[tuple[str, int]], tls: Tls | None = None, login: Login | None = None
    ) -> None:
        self._endpoints = [_Endpoint(host, port, tls) for host, port in endpoints]
        self._turn = 0
        self._login = login
        self._token = ""
        self._login_lock = asyncio.Lock()
        self._random = random.Random()  # seeded by the system: clients must not back off in step

    async def close(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.channel.close()

    # -- keys

    async def range(self, key: bytes, end: bytes) -> tuple[int, list[pb.KeyValue]]:
        """All keys in [key, end) at one revision, read in pages.

        Raises:
            Compacted: the revision was compacted between two pages.
        """
        revision, found = 0, list[pb.KeyValue]()
        while True:
            request = pb.RangeRequest(key=key, range_end=end, limit=PAGE, revision=revision)
            page = await self._call(_RANGE, request)
            revision = revision or page.header.revision
            found += page.kvs
            if not page.more:
                return revision, found
            key = page.kvs[-1].key + b"\0"

    async def get(self, key: bytes) -> pb.KeyValue | None:
        found = await self._call(_RANGE, pb.RangeRequest(key=key))
        return found.kvs[0] if found.kvs else None

    async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        """Apply at least once: a transaction must be such that its repetition can be told from its first success."""
        return await self._call(_TXN, transaction)

    async def compact(self, revision: int) -> None:
        await self._call(_COMPACT, pb.CompactionRequest(revision=revision))

    # -- leases

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A new lease: its ID, and the TTL that etcd made of the one asked for (at least 1.5 election timeouts)."""
        # Our own ID, because a repeated grant without one leaves a lease that nobody knows.
        lease = self._random.getrandbits(62) + 1
        try:
            granted = await self._call(_GRANT, pb.LeaseGrantRequest(ID=lease, TTL=ttl_s))
        except EtcdError as error:
            if error.code is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return lease, await self.renew(lease)  # "lease already exists": an earlier attempt had succeeded
        return lease, granted.TTL

    async def renew(self, lease: int, budget_s: float = BUDGET_S) -> int:
        """The TTL that the lease has again, in seconds.

        Raises:
            LeaseLost
        """
        renewed = await self._call(_KEEP_ALIVE, pb.LeaseKeepAliveRequest(ID=lease), budget_s)
        if renewed.TTL <= 0:
            raise LeaseLost(f"etcd: lease {lease:x} has expired")
        return renewed.TTL

    async def revoke(self, lease: int, budget_s: float = BUDGET_S) -> None:
        """End the lease and delete its keys.

        Raises:
            LeaseLost: it has ended already.
        """
        await self._call(_REVOKE, pb.LeaseRevokeRequest(ID=lease), budget_s)

    # -- watch

    async def watch(self, key: bytes, end: bytes, after: int) -> AsyncGenerator[Sequence[pb.Event], None]:
        """Changes of the keys in [key, end) after a revision, each batch ending with a whole revision.

        Raises:
            Compacted: they are no longer known, or the store is older than `after` (restored or replaced).
        """
        refusals, pauses = 0, self._pauses()
        while True:
            token = await self._authenticate()
            create = pb.WatchCreateRequest(
                key=key, range_end=end, start_revision=after + 1, progress_notify=True, fragment=True
            )
            call = self._pick().stub(_WATCH)(pb.WatchRequest(create_request=create), metadata=_metadata(token))
            try:
                reason, fragments = "the stream ended", list[pb.Event]()
                async for response in call:
                    if response.compact_revision:
                        raise Compacted(f"etcd: changes before revision {response.compact_revision} are compacted")
                    if response.canceled:
                        reason = response.cancel_reason
                        break
                    if response.created:
                        refusals, pauses = 0, self._pauses()
                        if response.header.revision < after:
                            await self._verify_reached(after, key)
                        continue
                    fragments += response.events
                    if response.fragment:
                        continue  # the rest of this batch, perhaps of this very revision, follows
                    if fragments:
                        # Not the header's revision: a watch that catches up gets batches from before it.
                        after = fragments[-1].kv.mod_revision
                        batch, fragments = fragments, []
                        yield batch
                    else:
                        after = max(after, response.header.revision)  # a progress notification
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            finally:
                call.cancel()
            if any(refusal in reason for refusal in ("permission denied", *_TOKEN_REFUSED)):
                refusals += 1
                self._forget(token)  # etcd 3.5.1 calls a watch's expired token "permission denied"
                if refusals > REAUTHENTICATIONS:
                    raise RegistryError(f"etcd: {reason}")
            log.info("watch broke off (%s), resuming after revision %d", reason, after)
            await asyncio.sleep(next(pauses))

    async def _verify_reached(self, revision: int, key: bytes) -> None:
        # A member may lag behind what another has told us; the quorum may not.
        now = (await self._call(_RANGE, pb.RangeRequest(key=key, count_only=True))).header.revision
        if now < revision:
            raise Compacted(f"etcd: the store is at revision {now}, before {revision}: restored or replaced")

    # -- every call

    async def _call(self, method: _Method[Q, R], request: Q, budget_s: float = BUDGET_S) -> R:
        deadline_s = time.monotonic() + budget_s
        attempt_s, reauthentications, pauses = ATTEMPT_S, 0, self._pauses()
        while True:
            token = "" if method is _LOGIN else await self._authenticate()
            endpoint = self._pick()
            left_s = deadline_s - time.monotonic()
            try:
                response: R = await endpoint.stub(method)(
                    request, timeout=min(attempt_s, left_s), metadata=_metadata(token)
                )
                return response
            except grpc.aio.AioRpcError as error:
                if token and _token_refused(error) and reauthentications < REAUTHENTICATIONS:
                    reauthentications += 1
                    self._forget(token)
                elif error.code() not in _TRANSIENT or left_s < ATTEMPT_S:
                    raise _translated(error) from error
                elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    endpoint.suspect_until_s = time.monotonic() + SUSPECT_S
                    attempt_s += ATTEMPT_S  # or a store that is merely slow would never get to answer
            await asyncio.sleep(next(pauses))

    def _pick(self) -> _Endpoint:
        """Round robin over the connected members without a recent timeout, then over the next best."""
        self._turn = (self._turn + 1) % len(self._endpoints)
        now_s = time.monotonic()
        order = self._endpoints[self._turn :] + self._endpoints[: self._turn]
        return min(order, key=lambda endpoint: endpoint.demerits(now_s))

    def _pauses(self) -> Iterator[float]:
        """Seconds between attempts: from 50 ms doubling to 1 s, each times 0.5 to 1.5."""
        pause_s = 0.05
        while True:
            yield pause_s * (0.5 + self._random.random())
            pause_s = min(2 * pause_s, 1.0)

    async def _authenticate(self) -> str:
        if self._login is None:
            return ""
        async with self._login_lock:
            if not self._token:
                request = pb.AuthenticateRequest(name=self._login.user, password=self._login.password)
                self._token = (await self._call(_LOGIN, request)).token
            return self._token

    def _forget(self, token: str) -> None:
        """Log in again before the next call, unless another task already has."""
        if self._token == token:
            self._token = ""


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    # hasleader: a member cut off from the others refuses at once and ends its streams, instead of staying silent.
    leader = ("hasleader", "true")
    return (leader, ("token", token)) if token else (leader,)


def _token_refused(error: grpc.aio.AioRpcError) -> bool:
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or any(reason in details for reason in _TOKEN_REFUSED)


def _translated(error: grpc.aio.AioRpcError) -> RegistryError:
    details = error.details() or ""
    if error.code() is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(f"etcd: {details}")
    if error.code() is grpc.StatusCode.NOT_FOUND and "lease not found" in details:
        return LeaseLost(f"etcd: {details}")
    return EtcdError(error)
