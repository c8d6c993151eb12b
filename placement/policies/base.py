"""Which copies to give up first. A policy orders; it does not know bytes in flight, pins or pods."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from placement.records import ModelId


class EvictionPolicy(Protocol):
    """Knows every LOADED copy of one pod."""

    def insert(self, model_id: ModelId, size_bytes: int, used_ms: int) -> None:
        """A copy was loaded; it was last used at `used_ms`, which may lie far back."""
        ...

    def touch(self, model_id: ModelId, now_ms: int) -> None:
        """A request used the copy at `now_ms`; a use before the last one changes nothing. On the path of every
        request: O(1)."""
        ...

    def remove(self, model_id: ModelId) -> None:
        """The copy is no longer a candidate; unknown ids are fine."""
        ...

    def coldest(self) -> Generator[ModelId, None, None]:
        """Candidates, first to go first. Whoever walks closes it; until then the policy must not change."""
        ...

    def oldest_used_ms(self) -> int:
        """When the first candidate was last used; 0: there is none."""
        ...
