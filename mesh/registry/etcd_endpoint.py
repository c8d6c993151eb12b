"""One etcd member: its channel, the calls it knows, and what its errors mean. See `etcd_client`."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from mesh.registry.base import Compacted, LeaseLost, RegistryError
from protos import etcd_pb2 as pb

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
TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # by a server that stops
        grpc.StatusCode.INTERNAL,  # a stream reset by a server that stops
        grpc.StatusCode.UNKNOWN,  # etcd's own context errors
    }
)
TOKEN_REFUSALS: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")
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
class Method(Generic[Q, R]):
    path: str
    request: type[Q]
    response: type[R]


RANGE: Final = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
TXN: Final = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT: Final = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
GRANT: Final = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE: Final = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
LOGIN: Final = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)
# Both are streams of requests in etcd, and both read one request and its half-close well: it is how etcd's own JSON
# gateway calls them. One request per stream spares the client a writing side to look after.
KEEP_ALIVE: Final = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse)
WATCH: Final = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)


class Endpoint:
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

    def stub(self, method: Method[Any, Any]) -> Any:
        stub = self._stubs.get(method.path)
        if stub is None:
            kind = self.channel.unary_stream if method is WATCH else self.channel.unary_unary
            stub = self._stubs[method.path] = kind(
                method.path, method.request.SerializeToString, method.response.FromString
            )
        return stub

    def demerits(self, now_s: float) -> tuple[bool, bool]:
        ready = self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
        return not ready, now_s < self.suspect_until_s


def metadata_with(token: str) -> tuple[tuple[str, str], ...]:
    # hasleader: a member cut off from the others refuses at once and ends its streams, instead of staying silent.
    leader = ("hasleader", "true")
    return (leader, ("token", token)) if token else (leader,)


def token_refused(error: grpc.aio.AioRpcError) -> bool:
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or any(reason in details for reason in TOKEN_REFUSALS)


def translated(error: grpc.aio.AioRpcError) -> RegistryError:
    details = error.details() or ""
    if error.code() is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(f"etcd: {details}")
    if error.code() is grpc.StatusCode.NOT_FOUND and "lease not found" in details:
        return LeaseLost(f"etcd: {details}")
    return EtcdError(error)
