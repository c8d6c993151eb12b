"""Eviction policies. A new one is a file here and a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from placement.policies.base import EvictionPolicy
from placement.policies.lru import Lru

POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {"lru": Lru}
