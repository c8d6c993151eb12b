"""An NVIDIA GPU as a device, through torch: one tensor of bytes as arena, one pinned slab, a stream of its own for each
direction.

The slab is anonymous memory registered with the driver as a whole: torch's own allocator of pinned memory would round
each block up to a power of two. Copies are asynchronous, one per move; they allocate nothing on the device. Waiting
blocks in the driver without spinning and without the interpreter lock.

**Not yet run on a GPU.** The tests of this module carry the mark `gpu`; `bench.gpu_campaign` measures it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from loaders.base import LoaderError
from loaders.memory.device import DeviceFull, DeviceLost, DeviceMemory, Move, Span, placed
from loaders.memory.host import anonymous
from loaders.memory.layout import Layout

try:
    import torch
except ImportError as missing:
    raise LoaderError("torch is not installed: pip install 'densemesh[torch]'") from missing

TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "FP8_E4M3FN": torch.float8_e4m3fn,
    "FP8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "FP8_E5M2": torch.float8_e5m2,
    "FP8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_PIECE_BYTES: Final = 1 << 30
_PAGE_BYTES: Final = 4096
_THREADS: Final = 8


class CudaCopying:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        with _lost_told():
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with _lost_told():
            self._event.synchronize()


class CudaDevice:
    """One GPU."""

    def __init__(self, arena_bytes: int, slab_bytes: int, index: int = 0) -> None:
        """
        Raises:
            LoaderError: there is no such GPU.
            DeviceFull: the memory of either cannot be had.
        """
        if index >= torch.cuda.device_count():
            raise LoaderError(f"there is no CUDA device {index}: torch finds {torch.cuda.device_count()}")
        self.arena_bytes, self.slab_bytes = arena_bytes, slab_bytes
        self._index = index
        self._lock = threading.Lock()
        with _full_told(arena_bytes):
            self.arena = torch.empty(arena_bytes, dtype=torch.uint8, device=f"cuda:{index}")
        self._address, self.slab = anonymous(slab_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pinned = torch.frombuffer(self.slab, dtype=torch.uint8) if slab_bytes else torch.empty(0)
        if slab_bytes:
            _touch(self._pinned)
            with torch.cuda.device(index):
                refused = int(torch.cuda.cudart().cudaHostRegister(self._address, slab_bytes, 0))  # type: ignore[no-untyped-call]
            if refused:
                raise DeviceFull(f"{slab_bytes} bytes of host memory cannot be pinned: CUDA error {refused}")
        self._streams = tuple(torch.cuda.Stream(index, priority=-1) for _ in range(2))  # type: ignore[no-untyped-call]

    def up(self, moves: Sequence[Move]) -> CudaCopying:
        return self._start(self._streams[0], self._pinned, self.arena, moves)

    def down(self, moves: Sequence[Move]) -> CudaCopying:
        return self._start(self._streams[1], self.arena, self._pinned, moves)

    def shift(self, moves: Sequence[Move], in_slab: bool) -> CudaCopying:
        memory = self._pinned if in_slab else self.arena
        return self._start(self._streams[0], memory, memory, moves)

    def views(self, layout: Layout, spans: Sequence[Span]) -> Mapping[str, torch.Tensor]:
        return tensor_views(self.arena, layout, spans)

    def memory(self) -> DeviceMemory:
        """
        Raises:
            DeviceLost: the driver does not answer.
        """
        with _lost_told():
            free, total = torch.cuda.mem_get_info(self._index)
        return DeviceMemory(total, total - free)

    def close(self) -> None:
        if self.slab_bytes:
            torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
        self.arena = self._pinned = torch.empty(0)
        self.slab, self.arena_bytes, self.slab_bytes = memoryview(b""), 0, 0
        torch.cuda.empty_cache()

    def _start(
        self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor, moves: Sequence[Move]
    ) -> CudaCopying:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with self._lock, _lost_told(), torch.cuda.stream(stream):
            for at, to, size_bytes in moves:
                target.narrow(0, to, size_bytes).copy_(source.narrow(0, at, size_bytes), non_blocking=True)
            event.record(stream)
        return CudaCopying(event)


def tensor_views(arena: torch.Tensor, layout: Layout, spans: Sequence[Span]) -> dict[str, torch.Tensor]:
    """The tensors of a layout over an arena of bytes; nothing is copied."""
    return {
        place.name: arena.narrow(0, at, place.size_bytes).view(TORCH_DTYPES[place.datatype]).view(place.shape)
        for place, at in placed(layout, spans)
    }


def _touch(slab: torch.Tensor) -> None:
    """Have the system find all pages, from several threads: the driver pins faster what is there."""

    def touch(start: int) -> None:
        slab[start : start + _PIECE_BYTES : _PAGE_BYTES].zero_()

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(touch, range(0, len(slab), _PIECE_BYTES)))


@contextmanager
def _full_told(size_bytes: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceFull(f"device memory of {size_bytes} bytes cannot be had: {_first_line(error)}") from error
    except RuntimeError as error:
        raise LoaderError(f"the CUDA device cannot be used: {_first_line(error)}") from error


@contextmanager
def _lost_told() -> Iterator[None]:
    """What CUDA answers to a copy of bytes that are there is no matter of the copy: the context is of no more use.

    Raises:
        DeviceLost: with CUDA's reason.
    """
    try:
        yield
    except RuntimeError as error:
        raise DeviceLost(f"the CUDA device failed: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    return str(error).partition("\n")[0]
