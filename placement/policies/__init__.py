"""Eviction policies. A new one is a file here and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from placement.policies.base import EvictionPolicy
from placement.policies.gdsf import Gdsf
from placement.policies.lfu import Lfu
from placement.policies.lru import Lru
from placement.policies.lru2 import Lru2
from placement.policies.s3fifo import S3Fifo
from placement.policies.sieve import Sieve
from placement.policies.slo_density import SloDensity

POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {
    "lru": Lru,
    "lru2": Lru2,
    "lfu": Lfu,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "gdsf": Gdsf,
    "slo_density": SloDensity,
}
