"""Calls to other pods over `mesh.http2`, messages as raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Final

from mesh.errors import MeshError, PodUnavailable, answer_of
from mesh.h2_peers import Peer
from mesh.h2_protocol import TICK_S
from mesh.http2.exchange import Exchange
from mesh.http2.grpc import fields_of
from mesh.http2.hpack import Field
from mesh.rpc import Metadata
from mesh.tls import Tls

_TRIES: Final = 3
"""Of a call that the peer never processed."""
_FAREWELL_S: Final = 0.5
"""For peers to take the last bytes."""


class H2Client:
    """Implements `mesh.rpc.Client`."""

    def __init__(self, *, tls: Tls | None = None, rng: Random | None = None) -> None:
        """`tls`: for all that is no Unix socket; `rng` draws the backoff's jitter."""
        self._tls = tls
        self._rng = rng or Random()
        self._peers: dict[str, Peer] = {}
        self._forgotten: list[Peer] = []
        """Peers whose last calls are under way: they may hang like any other."""
        self._ticking: asyncio.TimerHandle | None = None

    async def call(
        self, address: str, method: str, message: bytes, metadata: Metadata, deadline: float
    ) -> tuple[bytes, Mapping[str, str]]:
        if not address:
            raise PodUnavailable("the pod has no address")
        loop = asyncio.get_running_loop()
        if self._ticking is None:
            self._ticking = loop.call_later(TICK_S, self._tick)
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = Peer(address, self._tls, self._rng)
        fields: list[Field] = [*peer.fields, *call_fields(method, metadata)]
        for left in range(_TRIES - 1, -1, -1):
            exchange = await peer.exchange(fields, message, deadline)
            if not (exchange.unprocessed and left):
                break
        if exchange.status == 0 and exchange.message is not None:
            return exchange.message, {key: value for key, value in exchange.headers if isinstance(value, str)}
        raise as_mesh_error(exchange, address)

    def ready(self, address: str) -> Peer | None:
        """The peer, if there is a connection (`Peer.link`) on which it can be called at once: what `h2_relay` needs."""
        peer = self._peers.get(address)
        return peer if peer is not None and peer.link is not None and peer.link.connection.ready else None

    async def forget(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.forget()
            self._forgotten.append(peer)

    async def close(self) -> None:
        peers = [*self._peers.values(), *self._forgotten]
        self._peers.clear()
        self._forgotten.clear()
        for peer in peers:
            peer.close()
        await asyncio.sleep(0)  # transports tell that they are closed in the next turn of the loop; TLS asks the peer
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _FAREWELL_S
        while not all(peer.ended for peer in peers):
            if loop.time() > give_up_at:
                for peer in peers:
                    peer.abort()
            await asyncio.sleep(0.005)
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _tick(self) -> None:
        self._forgotten = [peer for peer in self._forgotten if not peer.ended]
        for peer in (*self._peers.values(), *self._forgotten):
            peer.tick()
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)


def call_fields(method: str, metadata: Metadata) -> list[Field]:
    """A call's header fields after those of the peer (`Peer.fields`) and before its deadline."""
    return [
        (b":path", method.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *fields_of(list(metadata)),
    ]


def as_mesh_error(exchange: Exchange, address: str) -> MeshError:
    """The peer's answer as an error of ours."""
    trailers = {key: value for key, value in exchange.trailers or exchange.headers if isinstance(value, str)}
    pushback = trailers.get("grpc-retry-pushback-ms", "")
    return answer_of(
        exchange.status,
        trailers.get("densemesh-reason", ""),
        exchange.text,
        address=address,
        retry_after_ms=int(pushback) if pushback.isdigit() else None,
    )
