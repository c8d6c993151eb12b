"""Which copies to give up first. A policy orders; it does not know bytes in flight, pins or pods."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from placement.records import ModelId


@dataclass(frozen=True, slots=True)
class Worth:
    """What a copy takes up, and what giving it up would cost."""

    size_bytes: int
    reload_ms: float = 1.0
    """Bringing it back from the next tier that would hold it (`placement.costs`); above 0."""
    run_ms: float = 0.0
    """One request on the loaded copy."""
    slo_ms: float = 100.0
    """Within what a request should be answered; above 0."""
    waited_ms: float = 0.0
    """How long the load that brought it waited for its turn."""


class EvictionPolicy(Protocol):
    """Knows every LOADED copy of one pod, or of one of its tiers.

    What it remembers of models beyond those is bounded by a multiple of the most copies it has held.
    """

    def insert(self, model_id: ModelId, worth: Worth, used_ms: int, uses: int = 1) -> None:
        """A copy was loaded. The last of its first `uses` requests, which waited for it, came at `used_ms`, which may
        lie far back. A copy that is known already is inserted anew."""
        ...

    def revalue(self, model_id: ModelId, worth: Worth) -> None:
        """The worth of a known copy was measured anew."""
        ...

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        """A request used a known copy at `now_ms`, which never makes it colder; a use before the last one changes
        nothing. On the path of every request: O(1)."""
        ...

    def evict(self, model_id: ModelId) -> None:
        """A known copy was given up for room: `remove`, and the policy may learn from it."""
        ...

    def remove(self, model_id: ModelId) -> None:
        """The copy is no longer a candidate; unknown ids are fine."""
        ...

    def coldest(self, now_ms: int) -> Generator[ModelId, None, None]:
        """Every copy once, first to go first; asking changes nothing. Whoever walks closes it; until then the policy
        must not change."""
        ...

    def oldest_used_ms(self) -> int:
        """When the first candidate was last used; 0: there is none."""
        ...
