"""Who we are compared with: one class and one line here for each."""

from __future__ import annotations

from typing import Final

from bench.peers.base import Peer
from bench.peers.densemesh import H2, Grpcio, Hop
from bench.peers.grpc_echo import GrpcAio, GrpcCpp
from bench.peers.kserve import KServe
from bench.peers.mlserver import MLServer
from bench.peers.proxies import Envoy, Nghttpx
from bench.peers.triton import Triton

PEERS: Final[dict[str, type[Peer]]] = {
    peer.name: peer for peer in (H2, Grpcio, GrpcCpp, GrpcAio, Triton, MLServer, KServe, Hop, Nghttpx, Envoy)
}
"""By name, in the table's order; the first is what the others are compared with."""
