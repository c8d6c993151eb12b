"""What became of requests and copies on one pod. Metrics, benches and the demo read this one struct."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from placement.records import Tier


@dataclass(slots=True)
class Stats:
    """Counters since start. Every attempt to place a request, which is a call of `Engine.route`, adds one to one of the
    first five; `Engine.served` adds hits."""

    hits: int = 0
    """Served here at once."""
    joins: int = 0
    """Waited for a load that was already under way here."""
    loads: int = 0
    """Started a load here."""
    forwards: int = 0
    """Sent to another pod."""
    refusals: int = 0
    """No pod could serve it, or this one was asked for what it does not have."""
    retries: int = 0
    """Attempts beyond a request's first; included above."""
    loads_finished: int = 0
    """The loader gave a model, even if its copy had to go at once."""
    loads_failed: int = 0
    """Copies that came to FAILED: at the estimate, in the load, or because they turned out larger than the room."""
    loads_overdue: int = 0
    """Loads that were not finished in time."""
    evictions: int = 0
    """LOADED copies given up for room; those of removed models are not counted."""
    moved_bytes: Counter[tuple[Tier | None, Tier]] = field(default_factory=Counter)
    """By where they came from (None: the store) and where they went."""
