"""What one pod may do: the settings of its engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class HostMode(StrEnum):
    """What the host's memory is to the device's."""

    EXCLUSIVE = "exclusive"
    """It holds what the device does not: a host smaller than the device is worth having."""
    INCLUSIVE = "inclusive"
    """It holds what is loaded from it too: giving up on the device costs no copy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pod."""

    capacity_bytes: int
    host_bytes: int = 0
    """Host memory for models that are not loaded; 0: there is no such tier."""
    disk_bytes: int = 0
    """Local disk for models' files; 0: there is no such tier."""
    host_mode: HostMode = HostMode.EXCLUSIVE
    labels: str = ""
    """What kind of pod it is, and where (`placement.labels`)."""
    run_threads: int = 1
    """Requests that run at once."""
    load_slots: int = 2
    """Loads under way at once, evictions they wait for included."""
    load_timeout_ms: int = 90_000
    """How long a loader may work on a model, once there is room (ModelMesh's built-in runtimes: 90 s)."""
    max_overdue: int = 8
    """Loads that may be longer at work than that; more keep their slots."""
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
    ask_patience_ms: int = 10_000
    """How long a copy that was asked for elsewhere may take to show."""
    queue_patience_ms: int = 10_000
    """How long a queued copy looks for room in vain before that is the answer."""
    slo_ms: int = 100
    """Within what requests should be answered for models that were registered without a word on it."""
