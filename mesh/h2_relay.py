"""Calls on their way through a pod: a stream of a client's connection here, and one to the pod that serves it."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Final, Protocol

from mesh.errors import Code, MeshError, PodUnavailable
from mesh.h2_client import H2Client, as_mesh_error, call_fields
from mesh.h2_peers import Link
from mesh.http2.client import Exchange
from mesh.http2.grpc import fields_of, timeout_field
from mesh.http2.hpack_encoder import literal
from mesh.http2.streams import Stream
from mesh.rpc import HOLDER, Call, Metadata, Relay, Unary

_KEPT_BLOCKS: Final = 4_096
_BLOCK: Final = "h2_relay.block"
_TIMELY: Final = 0.01
"""While no more than this share of a deadline is over, it is passed on as it came, so that few header blocks differ;
this pod keeps it exactly."""

_told: Final[dict[Metadata, bytes]] = {}
"""Blocks of what pods tell each other, which is the same for all requests to a model."""


class Inbound(Protocol):
    """The connection that a call came on."""

    def answer(self, stream: Stream, call: Call, response: bytes) -> None: ...

    def refuse(self, stream: Stream, call: Call, error: MeshError) -> None: ...

    def expire(self, stream: Stream) -> None:
        """The deadline has passed: cancel what is under way, and say so."""

    def handle(self, stream: Stream, handler: Unary, call: Call, message: bytes) -> None:
        """Run the handler after all."""


class Passage(Exchange):
    """One call on its way."""

    __slots__ = (
        *("address", "call", "handler", "inbound", "link", "message_in", "pod_id", "relay", "since_s", "stream"),
        "upstream",
    )

    def __init__(
        self,
        inbound: Inbound,
        stream: Stream,
        handler: Unary,
        call: Call,
        message: bytes,
        relay: Relay,
        pod_id: str,
        address: str,
        link: Link,
    ) -> None:
        super().__init__(call.deadline)
        self.inbound = inbound
        self.stream = stream
        self.handler = handler
        """Takes over if the pod does not answer."""
        self.call = call
        self.message_in = message
        self.relay = relay
        self.pod_id = pod_id
        self.address = address
        self.link = link
        self.since_s = perf_counter()
        self.upstream: Stream

    def end(self, status: int, text: str) -> None:
        relay, call, inbound, stream = self.relay, self.call, self.inbound, self.stream
        elapsed_s = perf_counter() - self.since_s
        if status == 0 and self.message is not None:
            relay.ended(self.pod_id, Code.OK, elapsed_s, reached=True)
            call.reply_metadata[HOLDER] = self._holder()
            inbound.answer(stream, call, self.message)
            return
        self.status, self.text = status, text
        error = None if self.unprocessed else as_mesh_error(self, self.address)
        if error is not None and not error.try_elsewhere:
            relay.ended(self.pod_id, error.code, elapsed_s, reached=True)
            inbound.refuse(stream, call, error)
            return
        relay.ended(self.pod_id, None, elapsed_s, reached=not isinstance(error, PodUnavailable))
        assert call.begun is not None
        call.begun = replace(call.begun, error=error)
        inbound.handle(stream, self.handler, call, self.message_in)

    def late(self) -> None:
        self.inbound.expire(self.stream)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.relay.ended(self.pod_id, Code.CANCELLED, perf_counter() - self.since_s, reached=True)
        self.link.cancel(self.upstream)

    def _holder(self) -> str:
        """The pod that served it: the one that was asked, unless it says otherwise."""
        for key, value in self.headers:
            if key == HOLDER and isinstance(value, str):
                return value
        return self.pod_id


def pass_on(
    inbound: Inbound, stream: Stream, handler: Unary, relay: Relay, call: Call, message: bytes, now: float
) -> bool:
    """Send a call on if it can be said and done at once."""
    onward = relay.onward(call, message)
    if onward is None:
        return False
    pod_id, address, told = onward
    assert isinstance(relay.client, H2Client)
    peer = relay.client.peer(address)
    link = None if peer is None else peer.link
    if peer is None or link is None:
        return False
    passage = stream.owner = Passage(inbound, stream, handler, call, message, relay, pod_id, address, link)
    relay.started(pod_id)
    block = b"".join((peer.block, _call_block(relay, call, stream.since, now), _told_block(told)))
    passage.upstream = link.call(block, message, passage)
    return True


def _call_block(relay: Relay, call: Call, since: float, now: float) -> bytes:
    """The header fields of a call that came at `since`, with its deadline."""
    timeout_s = call.deadline - since
    if now - since <= timeout_s * _TIMELY:
        block: bytes | None = call.memo.get(_BLOCK)
        if block is not None:
            return block
        now = since
    fields = call_fields(call.method, relay.passed(call))
    made = literal([*fields, (b"grpc-timeout", timeout_field(call.deadline - now))])
    if now == since:
        call.memo[_BLOCK] = made
    return made


def _told_block(told: Metadata) -> bytes:
    block = _told.get(told)
    if block is None:
        if len(_told) >= _KEPT_BLOCKS:
            _told.clear()
        block = _told[told] = literal(fields_of(list(told)))
    return block
