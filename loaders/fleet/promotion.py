"""Which models get a session of their own, with weights that are prepacked.

As in renting or buying skis: a model is promoted once prepacking would have spared it the time that building its
session takes, and then never loses more than half. What counts is the time spared of late: after a minute it counts
half. Building is 2 ms and 1.5 ns a byte (a 2 MB perceptron 3 ms, BERT-base of 440 MB 0.6 s), in one thread that ends
with it, one model at a time.

A promoted model's prepacked copy takes the place of the mapped weights, which are let go, so the books stay right; what
a session takes besides, 85 kB and 3 kB a node, has a bound for all promoted models together, and is never more than the
model's weights. When the bound is reached, a model takes the place of those that are worth less than half as much. A
promoted model that turned cold with nobody after its place keeps it: it is the mesh that evicts.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, Protocol

log = logging.getLogger(__name__)

MAX_SESSION_BYTES: Final = 64 << 20
"""What sessions of promoted models may take beside weights."""
WORTHWHILE: Final = 0.1
"""Part of a run's time that prepacking must spare: less is within what timing told at preparation."""
_HALF_LIFE_S: Final = 60.0
_BUILD_S: Final = 2e-3
_BUILD_S_PER_BYTE: Final = 1.5e-9


def build_s(size_bytes: int) -> float:
    """How long building a session takes."""
    return _BUILD_S + _BUILD_S_PER_BYTE * size_bytes


class Worth:
    """Seconds that prepacking spares, or would, of late. Written without a lock: a run that is lost does no harm."""

    __slots__ = ("_at_s", "_sum_s")

    def __init__(self) -> None:
        self._sum_s = self._at_s = 0.0

    def add(self, spared_s: float, now_s: float) -> float:
        """The sum, with this."""
        self._sum_s = self.at(now_s) + spared_s
        self._at_s = now_s
        return self._sum_s

    def at(self, now_s: float) -> float:
        """The sum now."""
        return float(self._sum_s * 0.5 ** ((now_s - self._at_s) / _HALF_LIFE_S))


class Promotable(Protocol):
    """A model that may get a session of its own."""

    @property
    def worth(self) -> Worth: ...

    @property
    def session_bytes(self) -> int:
        """What its session takes beside weights."""
        ...

    def promote(self) -> bool:
        """Build the session; False: the model was unloaded meanwhile."""
        ...

    def demote(self) -> None:
        """Back to the shared session; nothing if the model was unloaded."""
        ...


class Promotions:
    """The models that have a session of their own. A process has one of these."""

    def __init__(self, max_bytes: int = MAX_SESSION_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._promoted: dict[Promotable, int] = {}
        self.building: threading.Thread | None = None

    def consider(self, model: Promotable) -> None:
        """The model is worth its building."""
        if self.building is not None or not self._lock.acquire(blocking=False):
            return  # its next run asks again
        try:
            if self.building is None and (losers := self._losers(model)) is not None:
                self.building = threading.Thread(target=self._build, args=(model, losers), name="promote", daemon=True)
                self.building.start()
        finally:
            self._lock.release()

    def forget(self, model: Promotable) -> None:
        """It is being unloaded."""
        with self._lock:
            self._promoted.pop(model, None)

    @property
    def count(self) -> int:
        return len(self._promoted)

    @property
    def session_bytes(self) -> int:
        """What their sessions take beside weights."""
        with self._lock:
            return sum(self._promoted.values())

    def _losers(self, model: Promotable) -> list[Promotable] | None:
        """Whose places it takes; None: it gets none."""
        now_s, losers = time.perf_counter(), list[Promotable]()
        taken = sum(self._promoted.values()) + model.session_bytes
        worth = {other: other.worth.at(now_s) for other in self._promoted}
        for other in sorted(worth, key=worth.__getitem__):
            if taken <= self._max_bytes or worth[other] > model.worth.at(now_s) / 2:
                break
            losers.append(other)
            taken -= self._promoted[other]
        return losers if taken <= self._max_bytes else None

    def _build(self, model: Promotable, losers: list[Promotable]) -> None:
        try:
            for loser in losers:
                self.forget(loser)
                loser.demote()
            with self._lock:
                self._promoted[model] = model.session_bytes
            if not model.promote():
                self.forget(model)
        except Exception:
            log.exception("a session of its own cannot be built for a model, which keeps the shared one")
            self.forget(model)
        finally:
            self.building = None


promotions: Final = Promotions()
"""Of this process."""
