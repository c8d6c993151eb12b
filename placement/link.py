"""Whose turn it is on a link that many wait for: loads that wait for a slot, and later their chunks on a device's bus.

By class: priority, and what nobody waits for comes after all else. Within a class by weighted shortest remaining
processing time (Schrage 1968; weights: Smith 1956): what is left to move, over the requests that wait for it and one
more. So small loads are not held up by large ones, and what many wait for comes soon.

That alone could let a large load wait for ever. So one turn in `OLDEST_EVERY` is given to whoever has waited longest:
with n before it that have waited longer, each gets its turn within `OLDEST_EVERY * (n + 1)` turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from placement.records import Priority

OLDEST_EVERY: Final = 8
RANK: Final = {priority: rank for rank, priority in enumerate(Priority)}


class Waiting(Protocol):
    """Something that waits for the link."""

    @property
    def since_ms(self) -> int:
        """Since when it waits."""
        ...

    @property
    def remaining(self) -> float:
        """What is left to move: bytes, or estimated ms; the same unit for all."""
        ...

    @property
    def requests(self) -> int:
        """That wait for it."""
        ...

    @property
    def priority(self) -> Priority: ...

    @property
    def is_prefetch(self) -> bool:
        """Nobody waits for it."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes under way to a device, chunk by chunk."""

    model_id: str
    since_ms: int
    remaining: int
    """Bytes."""
    requests: int = 0
    priority: Priority = Priority.NORMAL
    is_prefetch: bool = False


def turn_key(waiting: Waiting) -> tuple[bool, int, float, int]:
    """The lowest goes first."""
    urgency = waiting.remaining / (1 + waiting.requests)
    return waiting.is_prefetch, RANK[waiting.priority], urgency, waiting.since_ms


def age_key(waiting: Waiting) -> int:
    """The lowest has waited longest."""
    return waiting.since_ms


def is_oldest_turn(turn: int) -> bool:
    """Whether a turn, counted from 0, belongs to whoever has waited longest."""
    return turn % OLDEST_EVERY == OLDEST_EVERY - 1


def next_turn(waiting: Iterable[W], turn: int) -> W | None:
    """Whose turn it is on a link that all of them may use. Prefetches only while there is nothing else: they hold
    nobody up, so they have no claim to the turns of the oldest either."""
    waiting = list(waiting)
    among = [each for each in waiting if not each.is_prefetch] or waiting
    return min(among, key=age_key if is_oldest_turn(turn) else turn_key, default=None)


def next_transfer(transfers: Iterable[Transfer], turn: int) -> str | None:
    """The model whose next chunk goes over the device's link."""
    chosen = next_turn(transfers, turn)
    return None if chosen is None else chosen.model_id
