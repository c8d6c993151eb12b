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
from typing import Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from mesh.registry.base import Compacted, LeaseLost, RegistryError
from mesh.registry.etcd_endpoint import (
    COMPACT,
    GRANT,
    KEEP_ALIVE,
    LOGIN,
    RANGE,
    REVOKE,
    TOKEN_REFUSALS,
    TRANSIENT,
    TXN,
    WATCH,
    Endpoint,
    EtcdError,
    Login,
    Method,
    Tls,
    metadata_with,
    token_refused,
    translated,
)
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

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


class EtcdClient:
    """Safe to use from many tasks of the event loop it was made in.

    Every method raises `RegistryError` when the store refuses or `BUDGET_S` is over, unless it says otherwise.
    """

    def __init__(
        self, endpoints: Sequence[tuple[str, int]], tls: Tls | None = None, login: Login | None = None
    ) -> None:
        self._endpoints = [Endpoint(host, port, tls) for host, port in endpoints]
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
            page = await self._call(RANGE, request)
            revision = revision or page.header.revision
            found += page.kvs
            if not page.more:
                return revision, found
            key = page.kvs[-1].key + b"\0"

    async def get(self, key: bytes) -> pb.KeyValue | None:
        found = await self._call(RANGE, pb.RangeRequest(key=key))
        return found.kvs[0] if found.kvs else None

    async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        """Apply at least once: a transaction must be such that its repetition can be told from its first success."""
        return await self._call(TXN, transaction)

    async def compact(self, revision: int) -> None:
        await self._call(COMPACT, pb.CompactionRequest(revision=revision))

    # -- leases

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A new lease: its ID, and the TTL that etcd made of the one asked for (at least 1.5 election timeouts)."""
        # Our own ID, because a repeated grant without one leaves a lease that nobody knows.
        lease = self._random.getrandbits(62) + 1
        try:
            granted = await self._call(GRANT, pb.LeaseGrantRequest(ID=lease, TTL=ttl_s))
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
        renewed = await self._call(KEEP_ALIVE, pb.LeaseKeepAliveRequest(ID=lease), budget_s)
        if renewed.TTL <= 0:
            raise LeaseLost(f"etcd: lease {lease:x} has expired")
        return renewed.TTL

    async def revoke(self, lease: int, budget_s: float = BUDGET_S) -> None:
        """End the lease and delete its keys.

        Raises:
            LeaseLost: it has ended already.
        """
        await self._call(REVOKE, pb.LeaseRevokeRequest(ID=lease), budget_s)

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
            call = self._pick().stub(WATCH)(pb.WatchRequest(create_request=create), metadata=metadata_with(token))
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
            if any(refusal in reason for refusal in ("permission denied", *TOKEN_REFUSALS)):
                refusals += 1
                self._forget(token)  # etcd 3.5.1 calls a watch's expired token "permission denied"
                if refusals > REAUTHENTICATIONS:
                    raise RegistryError(f"etcd: {reason}")
            log.info("watch broke off (%s), resuming after revision %d", reason, after)
            await asyncio.sleep(next(pauses))

    async def _verify_reached(self, revision: int, key: bytes) -> None:
        # A member may lag behind what another has told us; the quorum may not.
        now = (await self._call(RANGE, pb.RangeRequest(key=key, count_only=True))).header.revision
        if now < revision:
            raise Compacted(f"etcd: the store is at revision {now}, before {revision}: restored or replaced")

    # -- every call

    async def _call(self, method: Method[Q, R], request: Q, budget_s: float = BUDGET_S) -> R:
        deadline_s = time.monotonic() + budget_s
        attempt_s, reauthentications, pauses = ATTEMPT_S, 0, self._pauses()
        while True:
            token = "" if method is LOGIN else await self._authenticate()
            endpoint = self._pick()
            left_s = deadline_s - time.monotonic()
            try:
                response: R = await endpoint.stub(method)(
                    request, timeout=min(attempt_s, left_s), metadata=metadata_with(token)
                )
                return response
            except grpc.aio.AioRpcError as error:
                if token and token_refused(error) and reauthentications < REAUTHENTICATIONS:
                    reauthentications += 1
                    self._forget(token)
                elif error.code() not in TRANSIENT or left_s < ATTEMPT_S:
                    raise translated(error) from error
                elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    endpoint.suspect_until_s = time.monotonic() + SUSPECT_S
                    attempt_s += ATTEMPT_S  # or a store that is merely slow would never get to answer
            await asyncio.sleep(next(pauses))

    def _pick(self) -> Endpoint:
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
                self._token = (await self._call(LOGIN, request)).token
            return self._token

    def _forget(self, token: str) -> None:
        """Log in again before the next call, unless another task already has."""
        if self._token == token:
            self._token = ""
