"""What goes into the engine and what comes out: events, actions, and the ways a request can go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from placement.cache import Copy
from placement.records import CopyRecord, ModelId, ModelRecord, PodId, Priority, Tier, VModelRecord

# Events: what happened. `Engine.step` takes one and returns actions.


@dataclass(frozen=True, slots=True)
class CopyWanted:
    """Somebody needs the model here."""

    model_id: ModelId
    last_used_ms: int
    """Where it enters the eviction order; Unix ms."""
    priority: Priority | None = None
    """Of the request; None: the model's."""
    is_prefetch: bool = False
    """Nobody waits for it."""


@dataclass(frozen=True, slots=True)
class SizeEstimated:
    model_id: ModelId
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFinished:
    model_id: ModelId
    size_bytes: int
    """Measured."""
    kept: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes that lie in the tiers it was asked to fill; at most what it was told there. Left out: nothing does."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The estimate or the load failed; nothing is left in memory."""

    model_id: ModelId
    error: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class UnloadFinished:
    model_id: ModelId
    kept: bool = False
    """It lies in the tier in which it was to be kept."""


@dataclass(frozen=True, slots=True)
class Demoted:
    """The copy down has ended; nothing was dropped yet."""

    model_id: ModelId
    target: Tier
    kept: bool
    """It lies there now."""


@dataclass(frozen=True, slots=True)
class HeldDropped:
    """The bytes in that tier are free."""

    model_id: ModelId
    tier: Tier


@dataclass(frozen=True, slots=True)
class HeldLost:
    """The tier does not have the model any more: others took its room (a disk cache is a node's), or it was damaged."""

    model_id: ModelId
    tier: Tier


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """A load, or a run, found less memory than the books say: give up the coldest others, about so many bytes."""

    model_id: ModelId
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CopyUnwanted:
    """The copy here is of no use: the model was removed or registered anew with other contents, or somebody asked for
    it to be given up (RepositoryModelUnload)."""

    model_id: ModelId


Runs = Mapping[ModelId, tuple[int, float]]
"""By model: how often it ran here, and how long that took together, ms."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; about once a second."""

    runs: Runs = field(default_factory=dict)
    """Since the last tick."""


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The pod is going away: nothing new is loaded here."""


Event = (
    CopyWanted
    | SizeEstimated
    | LoadFinished
    | LoadFailed
    | UnloadFinished
    | Demoted
    | HeldDropped
    | HeldLost
    | MemoryShort
    | CopyUnwanted
    | Tick
    | DrainStarted
)

# Actions: what the shell must do. Each answers with an event, or with none.


@dataclass(frozen=True, slots=True)
class EstimateSize:
    """Answer: SizeEstimated or LoadFailed."""

    model: ModelRecord


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Answer: LoadFinished or LoadFailed."""

    model: ModelRecord
    source: Tier | None = None
    """Where to read it; None: from the store."""
    keep: Mapping[Tier, int] = field(default_factory=dict)
    """Tiers in which to leave a copy, and how many bytes it may take there."""


@dataclass(frozen=True, slots=True)
class StartUnload:
    """Nobody uses the copy. Answer: UnloadFinished."""

    model_id: ModelId
    keep: Tier | None = None
    """Where to copy it first; if that fails, it is given up without."""


@dataclass(frozen=True, slots=True)
class Demote:
    """Copy what one tier holds into a lower one. Answer: Demoted."""

    model_id: ModelId
    source: Tier
    target: Tier


@dataclass(frozen=True, slots=True)
class DropHeld:
    """Nobody reads it. Answer: HeldDropped."""

    model_id: ModelId
    tier: Tier


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the registry of this copy."""

    copy: CopyRecord


@dataclass(frozen=True, slots=True)
class Unpublish:
    """Take this copy out of the registry."""

    model_id: ModelId


@dataclass(frozen=True, slots=True)
class Wake:
    """The copy left the in-flight states: whoever waits may look again."""

    model_id: ModelId


@dataclass(frozen=True, slots=True)
class EnsureLoaded:
    """Leader: a vmodel's target must be loaded somewhere."""

    model_id: ModelId


@dataclass(frozen=True, slots=True)
class SettleVModel:
    """Leader: replace `old` by `new` if it still stands."""

    old: VModelRecord
    new: VModelRecord


@dataclass(frozen=True, slots=True)
class LoadOn:
    """Another copy is wanted, on that pod. If it cannot be had there, nobody is told: whoever wanted it will see that
    it is not there, and want it again."""

    model_id: ModelId
    pod_id: PodId
    used_ms: int = 0
    """Where it enters the eviction order; Unix ms; 0: now."""


Action = (
    EstimateSize
    | StartLoad
    | StartUnload
    | Demote
    | DropHeld
    | Publish
    | Unpublish
    | Wake
    | EnsureLoaded
    | SettleVModel
    | LoadOn
)

# Routes: where a request goes.


class Hop(Enum):
    """Who sent the request. Two hops at most: what a pod forwarded is never forwarded again."""

    CLIENT = "client"
    HIT_ONLY = "hit"
    """From a pod that believes a copy to be here: serve or join, never load."""
    LOAD_HERE = "load"
    """From a pod that chose this one to load on."""


class Serve(NamedTuple):  # as Forward, made for every request: a frozen dataclass takes three times as long
    copy: Copy


@dataclass(frozen=True, slots=True)
class Join:
    """On its way here: wait for it."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class LoadHere:
    """Step `CopyWanted`, then join."""


class Forward(NamedTuple):
    pod_id: PodId
    hop: Hop


class Why(Enum):
    """Why a request is refused."""

    UNKNOWN_MODEL = "unknown model"
    NOT_HERE = "not here"
    LOAD_FAILED = "load failed"
    LOAD_FAILED_FOR_NOW = "load failed for now"
    NO_ROOM = "no room"
    NO_POD = "no pod"
    STOPPED = "stopped"


STOPPED: Final = "stopped by its registration (placement.stopped)"


@dataclass(frozen=True, slots=True)
class Refuse:
    why: Why
    detail: str = ""


Route = Serve | Join | LoadHere | Forward | Refuse
