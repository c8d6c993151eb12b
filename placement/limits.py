"""What one pod may do: the settings of its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pod."""

    capacity_bytes: int
    labels: str = ""
    """What kind of pod it is, and where (`placement.labels`)."""
    load_slots: int = 2
    """Loads under way at once, evictions they wait for included."""
    failure_expiry_ms: int = 60_000
    """How long a failed load is remembered."""
    retryable_expiry_ms: int = 5_000
    """The same for failures whose loader says that they may pass."""
    load_tries: int = 3
    """Pods on which a load may fail before a request gives up."""
    suspect_ms: int = 2_000
    """How long a peer that could not be reached is avoided."""
    room_patience_ms: int = 2_000
    """How long a copy that turned out larger than estimated may wait for its room before it is given up."""
    queue_patience_ms: int = 10_000
    """How long a copy may be queued before finding no room for it is the answer."""
    slo_ms: int = 100
    """Within what requests should be answered for models that were registered without a word on it."""
