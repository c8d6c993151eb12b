"""Calls on their way through a pod: a stream of a client's connection here, and one to the pod that serves it.

A message that comes in several frames is sent on as it comes, and so is the response; whichever side is slower holds
the other one back. Until the response begins, what came of the request is kept, so that it can still go elsewhere.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final, Protocol, cast

from mesh.errors import Code, PodUnavailable
from mesh.h2_client import as_mesh_error, call_fields
from mesh.h2_peers import Link, Peer
from mesh.http2.exchange import Exchange
from mesh.http2.grpc import RequestHead, ResponseHead, fields_of, timeout_field
from mesh.http2.hpack_encoder import literal
from mesh.http2.server import RESPONSE, ServerConnection
from mesh.http2.streams import Stream
from mesh.rpc import HOLDER, Begun, Onward, Relay, Told
from mesh.wire import PartialPeek
from placement.messages import Forward, Hop

_OK: Final = Code.OK  # looked up once: on the enum that takes 0.2 us
_BLOCK: Final = "h2_relay.block"
_TIMELY: Final = 0.01
"""While no more than this share of a deadline is over, it is passed on as it came, so that few header blocks differ;
this pod keeps it exactly."""
_WAITING_BYTES: Final = 256 << 10
"""While more than this waits for one side, the other gets no credit."""
_SMALL: Final = 1_024
_FULL: Final = 16_384
"""Pieces that are smaller than the one wait for others, until there is as much as the other."""


class Inbound(Protocol):
    """The connection that a call came on."""

    connection: ServerConnection

    def wake(self) -> None: ...

    def fail(self, stream: Stream, error: Exception, call: None) -> None: ...

    def expire(self, stream: Stream) -> None:
        """The deadline has passed: cancel what is under way, and say so."""

    def take_back(self, stream: Stream, message: bytes | None, begun: Begun | None) -> None:
        """The handler has to see to the call after all; `message` None: it has not all come yet."""


class Passage(Exchange):
    """One call on its way. As a sink it takes the pieces of its request."""

    __slots__ = (
        *("inbound", "link", "model_id", "names", "peer", "pod_id", "relay", "request", "since_s", "small", "stream"),
        "upstream",
    )
    keeps = True

    names: PartialPeek | None
    """Reads along which model a message in pieces names; None: the headers say so."""
    small: bytearray
    upstream: Stream
    """The other pod's."""

    def __init__(
        self, inbound: Inbound, stream: Stream, relay: Relay, onward: Onward, request: bytes | None, deadline: float
    ) -> None:
        super().__init__(deadline)
        self.inbound = inbound
        self.stream = stream
        """The client's."""
        self.relay = relay
        self.model_id, self.pod_id, peer, _ = onward
        self.peer: Peer = peer
        self.link: Link = peer.link
        self.request = request
        """None: it comes in pieces, which the stream keeps."""
        self.since_s = perf_counter()

    # The outcome

    def end(self, status: int, text: str) -> None:
        elapsed_s = perf_counter() - self.since_s
        if status or self.message is None:
            self.status, self.text = status, text
            self._failed(elapsed_s)
            return
        self.relay.ended(self.pod_id, _OK, elapsed_s, reached=True)
        stream, connection = self.stream, self.inbound.connection
        stream.owner = None
        if self.request is None:
            connection.drop(stream)
        if stream.started:
            connection.status(stream, 0, "")
        else:
            connection.reply(stream, _answer_block(self.head, self.pod_id), self.message)
        self.inbound.wake()

    def _failed(self, elapsed_s: float) -> None:
        """The pod refused, or is lost; where another try may help and is possible, the handler makes it."""
        is_final = self.stream.started
        error = None if self.unprocessed and not is_final else as_mesh_error(self, self.peer.address)
        is_reached = not isinstance(error, PodUnavailable)
        if error is not None and (is_final or not error.try_elsewhere):
            self.relay.ended(self.pod_id, error.code, elapsed_s, reached=is_reached)
            self.inbound.fail(self.stream, error, None)
            self.inbound.wake()
        else:
            self.relay.ended(self.pod_id, None, elapsed_s, reached=is_reached)
            self._give_back((self.model_id, Forward(self.pod_id, Hop.HIT_ONLY), error))

    def late(self) -> None:
        self.inbound.expire(self.stream)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.relay.ended(self.pod_id, Code.CANCELLED, perf_counter() - self.since_s, reached=True)
        self.link.cancel(self.upstream)

    def _give_back(self, begun: Begun | None) -> None:
        stream, request, connection = self.stream, self.request, self.inbound.connection
        if request is None:
            stream.sink = None
            connection.release(stream)
            if stream.need < 0:
                request = connection.gathered(stream)
        self.inbound.take_back(stream, request, begun)

    # The request, in pieces

    def feed(self, piece: bytes | memoryview) -> None:
        assert isinstance(piece, bytes)
        names, stream = self.names, self.stream
        if names is not None and not (names.feed(piece) and (stream.need or names.complete)):
            # It is malformed, or names another model after all: that takes a look at the whole.
            self.relay.ended(self.pod_id, None, 0.0, reached=True)
            self.link.cancel(self.upstream)
            self._give_back(None)
            return
        if self.small or len(piece) < _SMALL:
            self.small += piece
            if stream.need and len(self.small) < _FULL:
                return
            piece, self.small = bytes(self.small), bytearray()
        self.link.connection.send(self.upstream, piece)
        stream.held = self.upstream.queued > _WAITING_BYTES
        self.link.wake()

    def finish(self) -> None:
        """The client has said all."""
        self.link.connection.finish(self.upstream, None)
        self.link.wake()

    def room_upstream(self) -> None:
        """Some of the request has left."""
        if self.upstream.queued <= _WAITING_BYTES:
            self.inbound.connection.release(self.stream)
            self.inbound.wake()

    # The response, in pieces

    def opening(self, stream: Stream, piece: bytes) -> None:
        """From now on the response is the client's, and the request cannot go elsewhere."""
        client, connection = self.stream, self.inbound.connection
        if client.sink is not None:
            return  # an answer before the end of the question is rare enough to be put together
        self.request = self.message = b""
        connection.drop(client)
        self.link.connection.drop(stream)
        connection.start(client, _answer_block(self.head, self.pod_id))
        client.on_room = self._room_downstream
        stream.sink = _Response(self)
        self.respond(b"\0" + (len(piece) + stream.need).to_bytes(4, "big") + piece)

    def respond(self, piece: bytes | memoryview) -> None:
        """The next piece of the response."""
        client, connection = self.stream, self.inbound.connection
        if connection.streams.get(client.id) is client:
            connection.send(client, piece)
            self.upstream.held = client.queued > _WAITING_BYTES
            self.inbound.wake()
        else:  # the client did not take what it was sent
            self.cancel()

    def _room_downstream(self) -> None:
        if self.stream.queued <= _WAITING_BYTES:
            self.link.connection.release(self.upstream)
            self.link.wake()


class _Response:
    """The sink of a response."""

    __slots__ = ("feed",)
    keeps = False

    def __init__(self, passage: Passage) -> None:
        self.feed = passage.respond


def pass_on(inbound: Inbound, stream: Stream, relay: Relay, message: bytes, deadline: float) -> bool:
    """Send a call on, if it can be said and done at once."""
    head: RequestHead = stream.head
    now = inbound.connection.received_at
    onward = relay.onward(head, message) if deadline > now else None
    if onward is None:
        return False
    passage = stream.owner = Passage(inbound, stream, relay, onward, message, deadline)
    block = _call_block(relay, head, onward, deadline, stream.since, now)
    passage.upstream = passage.link.call(block, message, passage)
    return True


def pass_start(inbound: Inbound, stream: Stream, relay: Relay, piece: bytes, deadline: float) -> None:
    """The same for a call of which more is to come than the first piece of its message."""
    head: RequestHead = stream.head
    now = inbound.connection.received_at
    found = relay.onward_begun(head, piece) if deadline > now else None
    if found is None:
        return
    onward, names = found
    passage = stream.owner = stream.sink = Passage(inbound, stream, relay, onward, None, deadline)
    passage.names, passage.small = names, bytearray()
    block = _call_block(relay, head, onward, deadline, stream.since, now)
    passage.upstream = passage.link.begin(block, passage, len(piece) + stream.need, piece)
    passage.upstream.on_room = passage.room_upstream


def _call_block(relay: Relay, head: RequestHead, onward: Onward, deadline: float, since: float, now: float) -> bytes:
    """The header block of a call that came at `since`."""
    _, _, peer, told = onward
    own: bytes | None = None
    is_timely = now - since <= (deadline - since) * _TIMELY
    if is_timely:
        own = head.memo.get(_BLOCK)
    if own is None:
        timeout = b"grpc-timeout", timeout_field(deadline - (since if is_timely else now))
        own = literal([*call_fields(head.path, relay.passed(head)), timeout])
        if is_timely:
            head.memo[_BLOCK] = own
    return cast(bytes, peer.block) + own + (told.memo.get(_BLOCK) or _told_block(told))


def _told_block(told: Told) -> bytes:
    block = told.memo[_BLOCK] = literal(fields_of(list(told.metadata)))
    return block


def _answer_block(head: ResponseHead | None, pod_id: str) -> bytes:
    """The block of an answer's headers: who served it, which is the pod that was asked unless it says otherwise."""
    assert head is not None
    block: bytes | None = head.memo.get(pod_id)
    if block is None:
        holder = next((value for key, value in head.metadata if key == HOLDER), pod_id)
        block = head.memo[pod_id] = literal([*RESPONSE, *fields_of([(HOLDER, holder)])])
    return block
