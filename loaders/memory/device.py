"""The port of devices: one arena of memory, one slab of host memory from which it is filled, and copies between them.

Both are allocated when the device is made and never again: no copy allocates on either side. Offsets count from the
start of arena and slab. Methods may be called from several threads; copies are started in the order of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, NamedTuple, Protocol

from loaders.base import LoaderError
from loaders.memory.layout import Layout, Place


class Move(NamedTuple):
    """Bytes to copy."""

    source: int
    target: int
    size_bytes: int


class Span(NamedTuple):
    """Where bytes of a model's run lie in an arena. A tensor is never cut."""

    run_offset: int
    offset: int
    size_bytes: int


class DeviceFull(LoaderError):
    """The memory asked for at the start is not there."""


class CopyFailed(LoaderError):
    """A copy did not arrive; the device lives, the same copy may succeed later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class DeviceLost(LoaderError):
    """The device answers no more: it is not used again by this process. Another pod may load the model."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the device itself says."""

    total_bytes: int
    used_bytes: int
    """By all processes, whatever for."""


class Copying(Protocol):
    """Copies that were started."""

    def done(self) -> bool:
        """Whether they have ended, well or not; does not block."""
        ...

    def wait(self) -> None:
        """Block, without the interpreter lock, until they have ended.

        Raises:
            CopyFailed: bytes are missing or wrong.
            DeviceLost: the device is gone.
        """
        ...


class Device(Protocol):
    """One device and its slab."""

    @property
    def arena_bytes(self) -> int: ...

    @property
    def slab_bytes(self) -> int: ...

    @property
    def slab(self) -> memoryview:
        """Writable bytes of the host; pinned, where that means something."""
        ...

    def up(self, moves: Sequence[Move]) -> Copying:
        """Start to copy from the slab into the arena. Both must stay as they are until the copies have ended.

        Raises:
            DeviceLost: the device is gone.
        """
        ...

    def down(self, moves: Sequence[Move]) -> Copying:
        """Start to copy from the arena into the slab; as `up`."""
        ...

    def shift(self, moves: Sequence[Move], in_slab: bool) -> Copying:
        """Start to copy within the arena or within the slab; no source meets a target. Errors as `up`."""
        ...

    def views(self, layout: Layout, spans: Sequence[Span]) -> Mapping[str, Any]:
        """The tensors of a layout by name, over the arena where its bytes lie: what the device's framework computes
        with (numpy arrays, torch tensors). Nothing is copied."""
        ...

    def memory(self) -> DeviceMemory: ...

    def close(self) -> None:
        """Give arena and slab back; nothing may be under way."""
        ...


DEVICES: Final[dict[str, str]] = {
    "cuda": "loaders.memory.cuda:CudaDevice",
    "host": "loaders.memory.host:HostDevice",
    "fake": "loaders.memory.fake:FakeDevice",
}
"""`module:class` by kind, imported when the first is opened; each is made of `arena_bytes` and `slab_bytes`."""


def open_device(name: str, arena_bytes: int, slab_bytes: int) -> Device:
    """A device with its memory, by its kind, or where a machine has several, `kind:index`.

    Raises:
        LoaderError: unknown kind, its framework is not installed, or there is no such device.
        DeviceFull: the memory is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES:
        raise LoaderError(f"unknown kind of device {kind!r}: expected one of {', '.join(DEVICES)}")
    module, _, made_by = DEVICES[kind].partition(":")
    opened: Callable[..., Device] = getattr(import_module(module), made_by)
    return opened(arena_bytes, slab_bytes, **({"index": int(index)} if index else {}))


def placed(layout: Layout, spans: Sequence[Span]) -> Iterator[tuple[Place, int]]:
    """Each place of a layout with its offset in the arena."""
    at = 0
    for place in layout.places:
        while at < len(spans) - 1 and place.offset >= spans[at].run_offset + spans[at].size_bytes:
            at += 1
        offset = spans[at].offset + place.offset - spans[at].run_offset if place.size_bytes else 0
        yield place, offset
