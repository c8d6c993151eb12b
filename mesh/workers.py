"""Threads that run models, and when a model runs on the event loop instead.

Handing work to a thread and back costs 40 to 70 us alone, many times what a small model takes. So a model that was
measured to be fast, with requests of that size, runs in line. The loop is never blocked by such runs for longer than
TURN_S and one run in a turn, and a run longer than SLOW_S sends the model back to the threads at once.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar

from placement.link import RANK, is_oldest_turn
from placement.records import Priority

T = TypeVar("T")

FAST_S: Final = 200e-6
"""A run below this is fast."""
SLOW_S: Final = 1e-3
"""A run above this weighs four times as much as one above FAST_S; one alone may be the system's doing."""
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
        *("_bar_s", "_barred_until_s", "_best_s", "_ran"),
        *("busy_s", "in_line", "model_id", "runs", "score", "typical_s"),
    )

    def __init__(self, model_id: str = "", ran: list[Pace] | None = None) -> None:
        """`ran` gets it when it was measured for the first time since its counts were taken."""
        self.model_id = model_id
        self._ran = ran
        self.runs = 0
        """This and the next: since they were taken."""
        self.busy_s = 0.0
        self.score = 0
        self.in_line = False
        self.typical_s = 0.0
        """A run's time, of late."""
        self._best_s = math.inf
        """Of the runs since it left the line."""
        self._bar_s = _BAR_S
        self._barred_until_s = math.inf

    def enter(self) -> None:
        """Run on the loop from now on."""
        self.in_line, self.score = True, _ENTER

    def measured(self, elapsed_s: float) -> None:
        """Fast runs count up, slow ones down twice: any run may have waited for the interpreter lock."""
        if not self.runs and self._ran is not None:
            self._ran.append(self)
        self.runs += 1
        self.busy_s += elapsed_s
        self.typical_s += (elapsed_s - self.typical_s) / 8
        if elapsed_s < FAST_S:
            if self.score < _MOST:
                self.score += 1
                if self.score == _ENTER:
                    self.in_line = True
        else:
            self.score = max(self.score - (2 if elapsed_s < SLOW_S else 8), _PENALTY)
            if self.in_line and self.score < 0:
                self._leave()
        if not self.in_line:
            self._best_s = min(self._best_s, elapsed_s)
            if self._best_s < FAST_S and time.perf_counter() > self._barred_until_s:
                self.enter()

    def _leave(self) -> None:
        """Back to the threads. Where they are busy a fast model does not look like one, so it is given another chance
        after a while, and a longer while each time, if any run was fast."""
        self.in_line, self.score, self._best_s = False, _PENALTY, math.inf
        self._barred_until_s = time.perf_counter() + self._bar_s
        self._bar_s = min(2 * self._bar_s, _MOST_BAR_S)


class Measured(Protocol):
    """Is told how long a run took."""

    def measured(self, elapsed_s: float) -> None: ...


class InLine:
    """Runs on the event loop, and what they cost it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._paces: dict[str, dict[int, Pace]] = {}
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
            pace = paces[magnitude] = Pace(model_id, self._ran)
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
                if larger.score or pace.typical_s > FAST_S / 2:
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

    def forget(self, model_id: str) -> None:
        """The model is not in memory any more; another may come under its name."""
        self._paces.pop(model_id, None)

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


class Job(Generic[T]):
    """Work for a thread."""

    __slots__ = ("_on_end", "ended", "future", "pace", "state", "work")

    def __init__(self, work: Callable[[], T], pace: Measured, future: asyncio.Future[T]) -> None:
        self.work = work
        self.pace = pace
        self.future = future
        self.state = deque((None,))
        """Holds one token: whoever takes it, the thread or `withdraw`, decides whether the work is done."""
        self.ended = False
        self._on_end: Callable[[], None] | None = None

    def withdraw(self) -> bool:
        """Whether the work was taken back before a thread began it."""
        return _took(self.state)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back once the thread has ended the work."""
        self._on_end = callback

    def end(self, result: Any, error: BaseException | None) -> None:
        """On the loop: tell whoever waits."""
        self.ended = True
        if not self.future.done():
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)
        if self._on_end is not None:
            self._on_end()


class _Queue:
    """Jobs by class, and in each in order of arrival; one turn in `OLDEST_EVERY` goes to the last class that has any,
    so that it does not wait for ever."""

    def __init__(self) -> None:
        self._classes: tuple[deque[Job[Any] | None], ...] = tuple(deque() for _ in Priority)
        self._waiting: SimpleQueue[None] = SimpleQueue()
        """As many tokens as there are jobs."""
        self._turn = 0

    def put(self, job: Job[Any] | None, priority: Priority) -> None:
        self._classes[RANK[priority]].append(job)
        self._waiting.put(None)

    def get(self) -> Job[Any] | None:
        self._waiting.get()
        turn, self._turn = self._turn, self._turn + 1  # a count that is lost does no harm
        order = reversed(self._classes) if is_oldest_turn(turn) else self._classes
        while True:  # there is one for each token, but while this looks others may take it, and put another before it
            for jobs in order:
                try:
                    return jobs.popleft()
                except IndexError:
                    continue
            order = self._classes

    def empty(self) -> bool:
        return self._waiting.empty()


class Workers:
    """Threads whose results cross to the loop in batches: one wake-up for all that are ready."""

    def __init__(self, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue = _Queue()
        self._done: deque[tuple[Job[Any], Any, BaseException | None]] = deque()
        self._waking = False
        self._threads = [threading.Thread(target=self._run, name=f"run-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def is_queueing(self) -> bool:
        """Whether work waits for a thread."""
        return not self._queue.empty()

    def submit(self, work: Callable[[], T], pace: Measured, priority: Priority = Priority.NORMAL) -> Job[T]:
        """Have a thread do it; the job's future gets the result."""
        job = Job(work, pace, self._loop.create_future())
        self._queue.put(job, priority)
        return job

    def close(self) -> None:
        """Wait for what runs; what has not begun is left. Blocks."""
        while self.is_queueing:
            job = self._queue.get()
            if job is not None:
                job.withdraw()
        for _ in self._threads:
            self._queue.put(None, Priority.LOW)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if not _took(job.state):
                continue
            result, error = None, None
            started = time.perf_counter()
            try:
                result = job.work()
            except BaseException as raised:
                error = raised
            job.pace.measured(time.perf_counter() - started)
            self._done.append((job, result, error))
            del job, result, error
            if not self._waking:
                self._waking = True
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._waking = False  # before the first look: what is appended from now on wakes the loop again
        while self._done:
            job, result, error = self._done.popleft()
            job.end(result, error)


def _took(token: deque[None]) -> bool:
    """Take the one token; deque.pop is atomic."""
    try:
        token.pop()
    except IndexError:
        return False
    return True
