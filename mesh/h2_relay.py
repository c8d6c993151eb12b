"""Calls on their way through a pod: a stream of a client's connection here, and one to the pod that serves it."""

from __future__ import annotations

from time import perf_counter
from typing import Final, Protocol

from mesh.errors import Code, MeshError, PodUnavailable
from mesh.h2_client import H2Client, as_mesh_error, call_fields
from mesh.h2_peers import Link
from mesh.http2.client import Exchange
from mesh.http2.grpc import Pair, fields_of, timeout_field
from mesh.http2.hpack_encoder import literal
from mesh.http2.streams import Stream
from mesh.rpc import HOLDER, Call, Metadata, Relay, Unary

_OK: Final = Code.OK  # looked up once: on the enum that takes 0.2 us
_KEPT_BLOCKS: Final = 4_096
_BLOCK: Final = "h2_relay.block"
_TIMELY: Final = 0.01
"""While no more than this share of a deadline is over, it is passed on as it came, so that few header blocks differ;
this pod keeps it exactly."""

_told: Final[dict[Metadata, bytes]] = {}
"""Blocks of what pods tell each other, which is the same for all requests to a model."""


class Inbound(Protocol):
    """The connection that a call came on."""

    def answer(self, stream: Stream, headers: tuple[tuple[str, str], ...], response: bytes) -> None: ...

    def refuse(self, stream: Stream, call: Call, error: MeshError) -> None: ...

    def expire(self, stream: Stream) -> None:
        """The deadline has passed: cancel what is under way, and say so."""

    def handle(self, stream: Stream, handler: Unary, call: Call, message: bytes) -> None:
        """Run the handler after all."""


class Passage(Exchange):
    """One call on its way."""

    __slots__ = (
        *("address", "call", "handler", "inbound", "link", "pod_id", "relay", "request", "since_s", "stream"),
        "upstream",
    )

    inbound: Inbound
    stream: Stream
    """The client's."""
    call: Call
    request: bytes
    handler: Unary
    """Takes over if the pod does not answer."""
    relay: Relay
    pod_id: str
    address: str
    link: Link
    upstream: Stream
    since_s: float

    def end(self, status: int, text: str) -> None:
        elapsed_s = perf_counter() - self.since_s
        if status == 0 and self.message is not None:
            self.relay.ended(self.pod_id, _OK, elapsed_s, reached=True)
            self.inbound.answer(self.stream, _answered(self.headers, self.pod_id), self.message)
        else:
            self.status, self.text = status, text
            self._failed(elapsed_s)

    def _failed(self, elapsed_s: float) -> None:
        """The pod refused, or is lost; where another try may help, the handler makes it."""
        call = self.call
        error = None if self.unprocessed else as_mesh_error(self, self.address)
        if error is not None and not error.try_elsewhere:
            self.relay.ended(self.pod_id, error.code, elapsed_s, reached=True)
            self.inbound.refuse(self.stream, call, error)
            return
        self.relay.ended(self.pod_id, None, elapsed_s, reached=not isinstance(error, PodUnavailable))
        assert call.begun is not None
        call.begun = *call.begun[:2], error
        self.inbound.handle(self.stream, self.handler, call, self.request)

    def late(self) -> None:
        self.inbound.expire(self.stream)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.relay.ended(self.pod_id, Code.CANCELLED, perf_counter() - self.since_s, reached=True)
        self.link.cancel(self.upstream)


def pass_on(
    inbound: Inbound, stream: Stream, handler: Unary, relay: Relay, call: Call, message: bytes, now: float
) -> bool:
    """Send a call on if it can be said and done at once."""
    onward = relay.onward(call, message)
    if onward is None:
        return False
    pod_id, address, told = onward
    assert isinstance(relay.client, H2Client)
    peer = relay.client.ready(address)
    if peer is None:
        return False
    assert peer.link is not None
    passage = stream.owner = Passage(call.deadline)
    passage.inbound, passage.stream, passage.call, passage.request = inbound, stream, call, message
    passage.handler, passage.relay, passage.pod_id, passage.address = handler, relay, pod_id, address
    link = passage.link = peer.link
    passage.since_s = perf_counter()
    relay.started(pod_id)
    block = peer.block + _call_block(relay, call, stream.since, now) + (_told.get(told) or _told_block(told))
    passage.upstream = link.call(block, message, passage)
    return True


def _call_block(relay: Relay, call: Call, since: float, now: float) -> bytes:
    """The header fields of a call that came at `since`, with its deadline."""
    timely = now - since <= (call.deadline - since) * _TIMELY
    if timely:
        block: bytes | None = call.memo.get(_BLOCK)
        if block is not None:
            return block
    timeout = b"grpc-timeout", timeout_field(call.deadline - (since if timely else now))
    made = literal([*call_fields(call.method, relay.passed(call)), timeout])
    if timely:
        call.memo[_BLOCK] = made
    return made


def _told_block(told: Metadata) -> bytes:
    if len(_told) >= _KEPT_BLOCKS:
        _told.clear()
    block = _told[told] = literal(fields_of(list(told)))
    return block


def _answered(headers: tuple[Pair, ...], pod_id: str) -> tuple[tuple[str, str], ...]:
    """What the client is told: who served it, which is the pod that was asked unless it says otherwise."""
    for pair in headers:
        if pair[0] == HOLDER:
            return (pair,)  # type: ignore[return-value]
    return ((HOLDER, pod_id),)
