"""Threads that run models."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from placement.link import RANK, is_oldest_turn
from placement.records import Priority

T = TypeVar("T")


class Measured(Protocol):
    """Is told how long a run took."""

    def measured(self, elapsed_s: float) -> None: ...


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

    def __len__(self) -> int:
        return self._waiting.qsize()


class Workers:
    """Threads whose results cross to the loop in batches: one wake-up for all that are ready."""

    def __init__(self, threads: int, loop: asyncio.AbstractEventLoop, name: str = "run") -> None:
        self._loop = loop
        self._queue = _Queue()
        self._done: deque[tuple[Job[Any], Any, BaseException | None]] = deque()
        self._waking = False
        self._at_work = [False] * threads
        self._threads = [
            threading.Thread(target=self._run, args=(n,), name=f"{name}-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_queueing(self) -> bool:
        """Whether work waits for a thread."""
        return len(self._queue) > 0

    @property
    def idle(self) -> int:
        """Threads that would begin at once what is submitted now."""
        return max(self._at_work.count(False) - len(self._queue), 0)

    def submit(self, work: Callable[[], T], pace: Measured, priority: Priority = Priority.NORMAL) -> Job[T]:
        """Have a thread do it; the job's future gets the result."""
        job: Job[T] = Job(work, pace, self.future())
        self.put(job, priority)
        return job

    def future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()

    def put(self, job: Job[Any], priority: Priority) -> None:
        self._queue.put(job, priority)

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

    def _run(self, number: int) -> None:
        while (job := self._queue.get()) is not None:
            if not _took(job.state):
                continue
            self._at_work[number] = True
            result, error = None, None
            started = time.perf_counter()
            try:
                result = job.work()
            except BaseException as raised:
                error = raised
            job.pace.measured(time.perf_counter() - started)
            self._at_work[number] = False
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
