"""When a model runs on the event loop.

Handing work to a thread and back costs 40 to 70 us alone, many times what a small model takes. So a model that was
measured to be fast, with requests of that size, runs in line. The loop is never blocked by such runs for longer than
TURN_S and one run in a turn, and a model that becomes slow is back in the threads after five runs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

from mesh.workers import Measured

T = TypeVar("T")

FAST_S: Final = 200e-6
"""A run below this is fast."""
SLOW_S: Final = 1e-3
"""A run above this weighs twice as much as one above FAST_S; a few may be the system's doing."""
TURN_S: Final = 2e-3
"""Time for runs in line in one turn of the loop, or in this time if turns are shorter; what comes after it goes to the
threads."""
_ENTER: Final = 8
_MOST: Final = 16
_PENALTY: Final = -64
"""As many fast runs in threads, and _ENTER more, bring a model back in line;"""
_BAR_S: Final = 1.0
"""or one alone after this time, which doubles up to"""
_MOST_BAR_S: Final = 64.0


class Pace:
    """How fast a model was with requests of one order of magnitude. Written by the loop and the threads without a lock:
    a count that is lost does no harm."""

    __slots__ = (
        *("_bar_s", "_barred_until_s", "_may_enter", "_ran"),
        *("busy_s", "in_line", "model_id", "runs", "score", "typical_s"),
    )

    def __init__(self, model_id: str = "", ran: list[Pace] | None = None, *, may_enter: bool = True) -> None:
        """`ran` gets it when it was measured for the first time since its counts were taken."""
        self.model_id = model_id
        self._ran = ran
        self._may_enter = may_enter
        self.runs = 0
        """This and the next: since they were taken."""
        self.busy_s = 0.0
        self.score = 0
        self.in_line = False
        self.typical_s = 0.0
        """A run's time, of late."""
        self._bar_s = _BAR_S
        self._barred_until_s = math.inf

    def enter(self) -> None:
        """Run on the loop from now on, unless that is ruled out."""
        self.in_line, self.score = self._may_enter, _ENTER

    def may_try(self) -> bool:
        """Whether it may enter because a run is expected to be fast: it was not measured, or not for a while."""
        if self.score and self._barred_until_s == math.inf:
            self._barred_until_s = time.perf_counter() + self._bar_s
        return not self.score or time.perf_counter() > self._barred_until_s

    def measured(self, elapsed_s: float) -> None:
        """Fast runs count up, slow ones down twice: any run may have waited for the interpreter lock."""
        self.shared(elapsed_s)
        self.typical_s += (elapsed_s - self.typical_s) / 8 if self.typical_s else elapsed_s
        if elapsed_s < FAST_S:
            if self.score < _MOST:
                self.score += 1
            if not self.in_line and (self.score >= _ENTER or time.perf_counter() > self._barred_until_s):
                self.enter()
        else:
            self.score = max(self.score - (2 if elapsed_s < SLOW_S else 4), _PENALTY)
            if self.in_line and self.score < 0:
                self._leave()

    def shared(self, elapsed_s: float) -> None:
        """The model was run, and this was its part of the time; how fast it is alone, that does not tell."""
        if not self.runs and self._ran is not None:
            self._ran.append(self)
        self.runs += 1
        self.busy_s += elapsed_s

    def _leave(self) -> None:
        """Back to the threads. Where they are busy a fast model does not look like one, so one fast run brings it
        back after a while, and after a longer while each time."""
        self.in_line, self.score = False, _PENALTY
        self._barred_until_s = time.perf_counter() + self._bar_s
        self._bar_s = min(2 * self._bar_s, _MOST_BAR_S)


class InLine:
    """Runs on the event loop, and what they cost it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._paces: dict[str, dict[int, Pace]] = {}
        self._kept_out: set[str] = set()
        self._ran: list[Pace] = []
        self._turn_s = 0.0
        self._turning = False
        self.runs = 0
        """Runs on the loop."""
        self.longest_run_s = 0.0
        self.longest_turn_s = 0.0
        """The most that runs took of one turn of the loop, or of TURN_S."""

    def pace(self, model_id: str, size_bytes: int) -> Pace:
        """Of a model with requests of about this size."""
        paces = self._paces.get(model_id)
        if paces is None:
            paces = self._paces[model_id] = {}
        magnitude = size_bytes.bit_length()
        pace = paces.get(magnitude)
        if pace is None:
            pace = paces[magnitude] = Pace(model_id, self._ran, may_enter=model_id not in self._kept_out)
        return pace

    def together(self, model_id: str, size_bytes: int, count: int) -> tuple[int, Pace]:
        """How many of so many requests of this size may run as one in line, 0: not even one; and the pace of that.

        Twice as many are tried unmeasured where that is sure to be fast.
        """
        pace = self.pace(model_id, size_bytes)
        if not pace.in_line:
            return 0, pace
        most = 1
        while most < count:
            larger = self.pace(model_id, 2 * most * size_bytes)
            if not larger.in_line:
                if pace.typical_s > FAST_S / 2 or not larger.may_try():
                    break
                larger.enter()
                larger.typical_s = 2 * pace.typical_s
            pace, most = larger, 2 * most
        return min(most, count), pace

    def take_runs(self) -> dict[str, tuple[int, float]]:
        """By model, the runs since the last call, on the loop and in threads, and how long they took, ms."""
        ran = self._ran[:]
        del self._ran[: len(ran)]
        taken: dict[str, tuple[int, float]] = {}
        for pace in ran:
            runs, busy_ms = taken.get(pace.model_id, (0, 0.0))
            if pace.runs:
                taken[pace.model_id] = runs + pace.runs, busy_ms + pace.busy_s * 1e3
                pace.runs, pace.busy_s = 0, 0.0
        return taken

    def keep_out(self, model_id: str) -> None:
        """However fast the model is: it waits for another process, which may hang."""
        self._kept_out.add(model_id)

    def forget(self, model_id: str) -> None:
        """The model is not in memory any more; another may come under its name."""
        self._paces.pop(model_id, None)
        self._kept_out.discard(model_id)

    @property
    def has_time(self) -> bool:
        """Whether this turn of the loop has time for another run."""
        return self._turn_s < TURN_S

    def run(self, pace: Measured, work: Callable[[], T]) -> T:
        """Run now; whatever the work raises is raised."""
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.ran(pace, time.perf_counter() - started)

    def ran(self, pace: Measured, elapsed_s: float) -> None:
        """A run was made on the loop."""
        if not self._turning:
            self._turning = True
            self._loop.call_later(TURN_S, self._next_turn)  # call_soon, at every turn, would cost as much as a run
        pace.measured(elapsed_s)
        self.runs += 1
        self._turn_s += elapsed_s
        if elapsed_s > self.longest_run_s:
            self.longest_run_s = elapsed_s

    def _next_turn(self) -> None:
        self.longest_turn_s = max(self.longest_turn_s, self._turn_s)
        self._turn_s = 0.0
        self._turning = False
