"""Threads that all models run in, of which one model has so many at a time at most (`max_concurrency`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from mesh.workers import Job, Measured, Workers
from placement.records import Priority

T = TypeVar("T")


class Limited:
    """A model's share of the threads; used on the loop. What is above it waits here in order of arrival."""

    def __init__(self, workers: Workers, most: int) -> None:
        self._workers = workers
        self._most = most
        self._running = 0
        self._waiting: deque[tuple[_LimitedJob[Any], Priority]] = deque()

    @property
    def idle(self) -> int:
        """As `Workers.idle`."""
        return min(self._workers.idle, self._most - self._running)

    def submit(self, work: Callable[[], T], pace: Measured, priority: Priority = Priority.NORMAL) -> Job[T]:
        """As `Workers.submit`."""
        job: _LimitedJob[T] = _LimitedJob(work, pace, self._workers.future(), self)
        self._waiting.append((job, priority))
        self._start()
        return job

    def close(self) -> None:
        """The threads are everybody's; nothing runs or waits here any more."""

    def ended(self) -> None:
        """A job that was begun has ended, or was withdrawn."""
        self._running -= 1
        self._start()

    def _start(self) -> None:
        while self._waiting and self._running < self._most:
            job, priority = self._waiting.popleft()
            if job.state:  # not withdrawn
                self._running += 1
                job.is_started = True
                self._workers.put(job, priority)


class _LimitedJob(Job[T]):
    __slots__ = ("_limited", "is_started")

    def __init__(self, work: Callable[[], T], pace: Measured, future: Any, limited: Limited) -> None:
        super().__init__(work, pace, future)
        self._limited = limited
        self.is_started = False

    def withdraw(self) -> bool:
        taken = super().withdraw()
        if taken and self.is_started:
            self._limited.ended()
        return taken

    def end(self, result: Any, error: BaseException | None) -> None:
        self._limited.ended()
        super().end(result, error)
