"""Where to load a model, and which holder to forward to. Pure functions of what the pod sees.

Loading: filter, then price every pod in milliseconds, then let a hash choose among those about as good as the best. The
hash (rendezvous hashing, Thaler and Ravishankar 1998) depends on model and pod only, so pods that decide at the same
moment about the same model agree, and models that are placed in one burst do not all go to one pod.

What loading on a pod is expected to cost:

    queue    until the load has its turn there, with what was sent there and is not told of yet
    load     from the nearest tier of the pod that has the bytes, else from the store
    evict    z (1 + z/2a) H/a for a full pod, where z is the reload time of what must go and a how long its coldest copy
             was not used: a copy that is used every a will be asked for again with odds P = H/(H+a) in the time H, its
             reload sends away another like it (P + P^2 + ... = H/a), and delays who comes meanwhile (z^2/2a; delayed
             hits, Atre et al. 2020)
    balance  room that is taken, against the pod with the most: worth up to a load and `BALANCE_MS`
    spread   a copy on the same node or in the same zone: it would be lost with the other
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b
from random import Random
from typing import Final

from placement.labels import NODE, ZONE, missing, parse
from placement.records import ModelId, PodId, PodRecord, Tier

NEAR_BEST: Final = 0.75
"""Of pods that differ in room only, those with at least this share of the best one's are as good."""
BALANCE_MS: Final = 400.0
MOVE_MS: Final = 10.0
"""What an eviction and a reload cost beside the load: the unload, the registry, requests that look for the copy."""
REUSE_MS: Final = 60_000.0
"""H: how long a new copy should be of use to be worth the eviction of another."""
SPREAD_MS: Final[Mapping[str, float]] = {NODE: 4_000.0, ZONE: 2_000.0}

_STORE: Final = (50, 100_000)
"""Fixed ms and bytes per ms of a pod that has not loaded yet, and of the tiers."""
_TIERS: Final = {Tier.DEVICE: (0, 10_000_000), Tier.HOST: (1, 10_000_000), Tier.DISK: (10, 1_000_000)}

_MASK: Final = (1 << 64) - 1

Assumed = Mapping[PodId, tuple[int, int]]
"""What was sent to a pod to load since its record of a revision: that revision, and bytes."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to be loaded on one more pod."""

    model_id: ModelId
    size_bytes: int
    """As believed; 0: not known."""
    must_fit_bytes: int = 0
    """As measured; a smaller pod cannot hold it."""
    requires: str = ""
    """Labels that a pod must have."""
    held: Mapping[PodId, Tier] = field(default_factory=dict)
    """Pods that have the bytes in a lower tier."""
    places: frozenset[tuple[str, str]] = frozenset()
    """Nodes and zones of the copies that there are: labels."""
    givers: frozenset[PodId] | None = None
    """Its tenant is at its limit: pods with enough of its copies to give up. None: it is not."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What speaks for and against loading a model on a pod."""

    pod_id: PodId
    ok: bool
    reasons: tuple[str, ...]
    parts_ms: Mapping[str, float]
    """What it would cost, by the names above; empty if it cannot be."""
    total_ms: float = 0.0


def choose_target(
    wanted: Wanted,
    pods: Iterable[PodRecord],
    *,
    assumed: Assumed,
    exclude: Container[PodId],
    now_ms: int,
) -> PodId | None:
    """The pod to load on; None: none can."""
    fit = [
        pod
        for pod in pods
        if not pod.draining
        and pod.capacity_bytes - pod.kept_bytes >= wanted.must_fit_bytes
        and pod.pod_id not in exclude
        and not (wanted.requires and missing(wanted.requires, pod.labels))
        and (wanted.givers is None or pod.pod_id in wanted.givers)
    ]
    if not fit:
        return None
    prices = _prices(wanted, fit, assumed, now_ms)
    near = _near_best(prices, _totals(wanted, prices))
    return near[0] if len(near) == 1 else max(near, key=partial(affinity, wanted.model_id))


def verdicts(
    wanted: Wanted,
    pods: Sequence[PodRecord],
    *,
    assumed: Assumed,
    exclude: Mapping[PodId, str],
    now_ms: int,
) -> list[Verdict]:
    """What `choose_target` thinks of each pod, the chosen one first; `exclude` tells why."""
    against = {pod.pod_id: _against(wanted, pod, exclude.get(pod.pod_id)) for pod in pods}
    fit = [pod for pod in pods if not against[pod.pod_id]]
    prices = _prices(wanted, fit, assumed, now_ms)
    totals_ms = _totals(wanted, prices)
    near = frozenset(_near_best(prices, totals_ms) if fit else ())
    found: list[Verdict] = []
    for pod, (_, _, *parts_ms), total_ms in zip(fit, prices, totals_ms, strict=True):
        parts = dict(zip(PARTS, [*parts_ms, total_ms - sum(parts_ms)], strict=True))
        found.append(Verdict(pod.pod_id, True, tuple(_reasons(wanted, pod, parts, now_ms)), parts, total_ms))

    def order(verdict: Verdict) -> tuple[bool, float, PodId]:
        pod_id = verdict.pod_id
        return pod_id not in near, -affinity(wanted.model_id, pod_id) if pod_id in near else verdict.total_ms, pod_id

    rejected = [Verdict(pod_id, False, tuple(reasons), {}) for pod_id, reasons in against.items() if reasons]
    return sorted(found, key=order) + rejected


def choose_holder(holders: Sequence[PodId], in_flight: Mapping[PodId, int], rng: Random) -> PodId:
    """Of two holders drawn at random, the one this pod has fewer requests in flight to (power of two choices,
    Mitzenmacher 2001)."""
    if len(holders) == 1:
        return holders[0]
    first, second = rng.sample(holders, 2)
    return second if in_flight.get(second, 0) < in_flight.get(first, 0) else first


PARTS: Final = ("queue", "load", "evict", "spread", "balance")

_Price = tuple[PodId, int, float, float, float, float]
"""Pod, free bytes, and the parts but the last, which depends on all pods."""


def _prices(wanted: Wanted, pods: Iterable[PodRecord], assumed: Assumed, now_ms: int) -> list[_Price]:
    """What loading would cost on each of these pods. On the path of every miss: one plain loop."""
    size_bytes, held, places = wanted.size_bytes, wanted.held, wanted.places
    need_bytes = max(1, size_bytes)
    prices: list[_Price] = []
    for pod in pods:
        pod_id, bytes_per_ms = pod.pod_id, pod.load_bytes_per_ms
        fixed_ms, bytes_per_ms = (pod.load_fixed_ms, bytes_per_ms) if bytes_per_ms else _STORE
        load_ms = fixed_ms + size_bytes / bytes_per_ms
        free_bytes, queue_ms = pod.capacity_bytes - pod.used_bytes, float(pod.queue_ms)
        if pod_id in assumed:
            revision, sent_bytes = assumed[pod_id]
            if revision == pod.revision:
                free_bytes -= sent_bytes
                queue_ms += sent_bytes / bytes_per_ms
        evict_ms = spread_ms = 0.0
        if free_bytes < need_bytes:
            idle_ms = now_ms - pod.oldest_used_ms if pod.oldest_used_ms and pod.oldest_used_ms < now_ms else 0.5
            reload_ms = MOVE_MS + load_ms - max(0, free_bytes) / bytes_per_ms
            evict_ms = reload_ms * (1.0 + reload_ms / (2.0 * idle_ms)) * REUSE_MS / idle_ms
        if pod_id in held:
            fixed_ms, bytes_per_ms = _TIERS[held[pod_id]]
            load_ms = fixed_ms + size_bytes / bytes_per_ms
        if places:
            spread_ms = sum(SPREAD_MS[name] for name, value in _places(pod.labels) if (name, value) in places)
        prices.append((pod_id, free_bytes, queue_ms, load_ms, evict_ms, spread_ms))
    return prices


def _totals(wanted: Wanted, prices: Sequence[_Price]) -> list[float]:
    """With what balance adds."""
    need_bytes = max(1, wanted.size_bytes)
    most_bytes = max((price[1] for price in prices), default=0)
    return [
        queue_ms + load_ms + evict_ms + spread_ms
        + (BALANCE_MS + load_ms) * (1.0 - free_bytes / most_bytes if free_bytes >= need_bytes else 1.0)
        for _, free_bytes, queue_ms, load_ms, evict_ms, spread_ms in prices
    ]  # fmt: skip


def _near_best(prices: Sequence[_Price], totals_ms: Sequence[float]) -> list[PodId]:
    """Those about as good as the best: what a quarter of its room is worth makes no difference."""
    best_ms = min(totals_ms)
    load_ms = min(price[3] for price, total_ms in zip(prices, totals_ms, strict=True) if total_ms == best_ms)
    enough_ms = best_ms + (1.0 - NEAR_BEST) * (BALANCE_MS + load_ms)
    return [price[0] for price, total_ms in zip(prices, totals_ms, strict=True) if total_ms <= enough_ms]


def _against(wanted: Wanted, pod: PodRecord, excluded: str | None) -> list[str]:
    reasons = [] if excluded is None else [excluded]
    if pod.draining:
        reasons.append("draining")
    if pod.capacity_bytes < wanted.must_fit_bytes:
        reasons.append(f"needs {wanted.must_fit_bytes} bytes, holds {pod.capacity_bytes}")
    elif pod.capacity_bytes - pod.kept_bytes < wanted.must_fit_bytes:
        reasons.append(f"needs {wanted.must_fit_bytes} bytes, and {pod.kept_bytes} are of copies that are to be kept")
    if wanted.requires:
        reasons += [f"has no label {label}" for label in missing(wanted.requires, pod.labels)]
    if wanted.givers is not None and pod.pod_id not in wanted.givers:
        reasons.append("the tenant is at its limit (max_bytes), and has too little here to give up")
    return reasons


def _reasons(wanted: Wanted, pod: PodRecord, parts_ms: Mapping[str, float], now_ms: int) -> list[str]:
    """Where a fit pod's price comes from, in words."""
    reasons: list[str] = []
    if pod.pod_id in wanted.held:
        reasons.append(f"has the bytes in its {wanted.held[pod.pod_id]} tier")
    if parts_ms["evict"]:
        idle = f"not used for {max(0, now_ms - pod.oldest_used_ms) // 1000} s" if pod.oldest_used_ms else "in use"
        reasons.append(f"full, its coldest copy {idle}")
    if parts_ms["queue"]:
        reasons.append("loads wait")
    if parts_ms["spread"]:
        reasons.append("beside another copy")
    return reasons


@lru_cache(65_536)
def _places(labels: str) -> frozenset[tuple[str, str]]:
    """The node and zone in a pod's labels; texts that cannot be read tell none."""
    try:
        return frozenset((name, value) for name, value in parse(labels).items() if name in SPREAD_MS)
    except ValueError:
        return frozenset()


def places_of(pods: Iterable[PodRecord]) -> frozenset[tuple[str, str]]:
    """The nodes and zones of pods."""
    return frozenset(place for pod in pods for place in _places(pod.labels))


def affinity(model_id: ModelId, pod_id: PodId) -> int:
    """Rendezvous hash: ids are hashed once, a multiplication joins the two (Knuth, 6.4: Fibonacci hashing)."""
    return (_digest(model_id) ^ _digest(pod_id)) * 0x9E3779B97F4A7C15 & _MASK


@lru_cache(65_536)
def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
