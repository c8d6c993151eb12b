"""A device that is not there, for tests and benches: a link of a given speed on a virtual clock, and faults on demand.

The link is a token bucket: copies go one after another at `link_bytes_per_s`, up and down independently as on PCI
Express, each after `copy_latency_s`; what is idle gathers up to `burst_bytes` of credit. Waiting for a copy moves the
clock to its end, so that nothing depends on how fast the machine is. With `moves_bytes=False` no byte is moved, and
arena and slab take no memory, for books of devices larger than the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from threading import Lock
from typing import Final

from loaders.base import LoaderError, Tensor
from loaders.memory.device import CopyFailed, DeviceFull, DeviceLost, DeviceMemory, Move, Span
from loaders.memory.host import HostDevice
from loaders.memory.layout import Layout

LINK_BYTES_PER_S: Final = 50e9
MEMORY_BYTES_PER_S: Final = 2e12
"""Of copies within the device."""
COPY_LATENCY_S: Final = 8e-6


class Fault(Enum):
    """What goes wrong with a copy."""

    FAILS = "the copy ends with an error"
    LOST = "the device goes away in the middle of it"
    CORRUPT = "one byte arrives wrong, and nobody says so"


@dataclass(eq=False)
class Clock:
    """Virtual seconds."""

    now_s: float = 0.0

    def advance_to(self, moment_s: float) -> None:
        self.now_s = max(self.now_s, moment_s)


@dataclass(eq=False)
class Link:
    """One direction."""

    clock: Clock
    bytes_per_s: float
    latency_s: float
    burst_bytes: float
    free_s: float = 0.0
    """When the last copy will have ended; earlier than now: credit."""
    pending: deque[FakeCopying] = field(default_factory=deque)
    lock: Lock = field(default_factory=Lock)

    def take(self, size_bytes: int) -> float:
        """When a copy that is started now will end."""
        now_s = self.clock.now_s
        self.free_s = max(self.free_s, now_s - self.burst_bytes / self.bytes_per_s) + size_bytes / self.bytes_per_s
        return max(self.free_s, now_s) + self.latency_s


class FakeCopying:
    def __init__(self, link: Link, at_s: float, end: Callable[[], None]) -> None:
        self._link = link
        self._at_s = at_s
        self._end = end
        self._error: LoaderError | None = None

    def done(self) -> bool:
        return self._link.clock.now_s >= self._at_s

    def wait(self) -> None:
        """Moves the clock, and ends what was started before.

        Raises:
            CopyFailed, DeviceLost: as was asked for.
        """
        with self._link.lock:
            self._link.clock.advance_to(self._at_s)
            while self in self._link.pending:
                copying = self._link.pending.popleft()
                try:
                    copying._end()
                except LoaderError as error:
                    copying._error = error
        if self._error is not None:
            raise self._error


class FakeDevice(HostDevice):
    """Bytes arrive when their copy, or a later one that way, is waited for. `faults` are met by the copies to come, in
    this order; None: none."""

    def __init__(
        self,
        arena_bytes: int,
        slab_bytes: int,
        *,
        link_bytes_per_s: float = LINK_BYTES_PER_S,
        copy_latency_s: float = COPY_LATENCY_S,
        burst_bytes: float = 0.0,
        moves_bytes: bool = True,
        total_bytes: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Raises:
            DeviceFull: the arena is larger than `total_bytes`.
        """
        if total_bytes is not None and arena_bytes > total_bytes:
            raise DeviceFull(f"device memory of {arena_bytes} bytes cannot be had: there are {total_bytes}")
        super().__init__(arena_bytes if moves_bytes else 0, slab_bytes if moves_bytes else 0)
        self.arena_bytes, self.slab_bytes = arena_bytes, slab_bytes
        self.clock = clock or Clock()
        self.faults: deque[Fault | None] = deque()
        self.lost = False
        self._total_bytes = total_bytes or arena_bytes
        self._moves_bytes = moves_bytes
        self._up = Link(self.clock, link_bytes_per_s, copy_latency_s, burst_bytes)
        self._down = Link(self.clock, link_bytes_per_s, copy_latency_s, burst_bytes)
        self._within = Link(self.clock, MEMORY_BYTES_PER_S, copy_latency_s, 0.0)

    def up(self, moves: Sequence[Move]) -> FakeCopying:  # type: ignore[override]
        return self._start(self._up, moves, super().up)

    def down(self, moves: Sequence[Move]) -> FakeCopying:  # type: ignore[override]
        return self._start(self._down, moves, super().down)

    def shift(self, moves: Sequence[Move], in_slab: bool) -> FakeCopying:  # type: ignore[override]
        return self._start(self._within, moves, lambda moves: HostDevice.shift(self, moves, in_slab))

    def views(self, layout: Layout, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        return super().views(layout, spans) if self._moves_bytes else {}

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self._total_bytes, self.arena_bytes)

    def _start(self, link: Link, moves: Sequence[Move], copy: Callable[[Sequence[Move]], object]) -> FakeCopying:
        if self.lost:
            raise DeviceLost("the device is gone")
        fault = self.faults.popleft() if self.faults else None

        def end() -> None:
            if self.lost or fault is Fault.LOST:
                self.lost = True
                raise DeviceLost("the device went away in the middle of a copy")
            if fault is Fault.FAILS:
                raise CopyFailed("the copy failed")
            if self._moves_bytes:
                copy(moves)
                if fault is Fault.CORRUPT:
                    (self.slab if link is self._down else self.arena)[moves[0].target] ^= 1

        with link.lock:
            copying = FakeCopying(link, link.take(sum(move.size_bytes for move in moves)), end)
            link.pending.append(copying)
        return copying
