"""Where to load a model, and which holder to forward to. Pure functions of what the pod sees.

Loading: filter, then order by free room, then by coldness, then let a hash choose among those about as good as the
best. The hash (rendezvous hashing, Thaler and Ravishankar 1998) depends on model and pod only, so pods that decide at
the same moment about the same model agree, and models that are placed in one burst do not all go to one pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from random import Random
from typing import Final, NamedTuple

from placement.records import ModelId, PodId, PodRecord

NEAR_BEST: Final = 0.75
"""A pod with at least this share of the best pod's room (or coldness) is as good as the best."""


class Candidate(NamedTuple):
    """A pod that may load the model."""

    pod_id: PodId
    free_bytes: int
    idle_ms: int
    """How long ago its coldest copy was last used; 0: it has nothing to evict."""


def candidates(
    pods: Iterable[PodRecord],
    *,
    must_fit_bytes: int,
    assumed_bytes: Mapping[PodId, int],
    exclude: Iterable[PodId],
    now_ms: int,
) -> list[Candidate]:
    """The pods that could hold the model at all: big enough, not draining, not excluded."""
    excluded = frozenset(exclude)
    return [
        Candidate(
            pod_id=pod.pod_id,
            free_bytes=pod.capacity_bytes - pod.used_bytes - assumed_bytes.get(pod.pod_id, 0),
            idle_ms=max(0, now_ms - pod.oldest_used_ms) if pod.oldest_used_ms else 0,
        )
        for pod in pods
        if not pod.draining and pod.capacity_bytes >= must_fit_bytes and pod.pod_id not in excluded
    ]


def choose_target(model_id: ModelId, size_bytes: int, among: Sequence[Candidate]) -> PodId | None:
    """The pod to load on; None: there is no candidate.

    1. Pods with free room for it: those with the most.
    2. Else all are full: those whose coldest copy has been idle longest.
    """
    if not among:
        return None
    roomy = [c for c in among if c.free_bytes >= max(1, size_bytes)]
    if roomy:
        most = max(c.free_bytes for c in roomy)
        near = [c for c in roomy if c.free_bytes >= most * NEAR_BEST]
    else:
        longest = max(c.idle_ms for c in among)
        near = [c for c in among if c.idle_ms >= longest * NEAR_BEST]
    return max(near, key=lambda c: _affinity(model_id, c.pod_id)).pod_id


def choose_holder(holders: Sequence[PodId], in_flight: Mapping[PodId, int], rng: Random) -> PodId:
    """Of two holders drawn at random, the one this pod has fewer requests in flight to (power of two choices,
    Mitzenmacher 2001)."""
    if len(holders) == 1:
        return holders[0]
    first, second = rng.sample(holders, 2)
    return second if in_flight.get(second, 0) < in_flight.get(first, 0) else first


def _affinity(model_id: ModelId, pod_id: PodId) -> bytes:
    return blake2b(f"{pod_id}\0{model_id}".encode(), digest_size=8).digest()
