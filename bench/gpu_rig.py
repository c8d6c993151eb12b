"""What `bench.gpu_campaign` measures on: a GPU, or host memory in its place; models of seeds, and how they run."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

from bench.fleets import Told, fine_tunes
from loaders.memory.buffers import BUFFER_BYTES
from loaders.memory.cuda import CudaDevice, tensor_views
from loaders.memory.device import Span
from loaders.memory.host import HostDevice, anonymous
from loaders.memory.layout import Layout
from loaders.memory.process import resident_bytes
from loaders.memory.slots import Slot
from loaders.memory.store import Store
from loaders.memory.weights_index import Contents

cuda: Final[Any] = torch.cuda
HEAD_WIDTH: Final = 64


class TorchHost(HostDevice):
    """Host memory in a GPU's place, with torch tensors over it."""

    def views(self, layout: Layout, spans: Sequence[Span]) -> Mapping[str, Any]:
        return tensor_views(torch.frombuffer(self.arena, dtype=torch.uint8), layout, spans)


@dataclass(frozen=True)
class FromSeed:
    """A model whose weights are normal numbers of a seed, made where the models run."""

    contents: Contents
    seed: int
    where: str

    def verify(self) -> None:
        return None

    def read_into(self, target: memoryview, offset: int) -> None:
        made = self.run()[offset : offset + len(target)]
        torch.frombuffer(target, dtype=torch.uint8).copy_(made)

    def run(self) -> torch.Tensor:
        """All bytes, on the device."""
        drawn = torch.Generator(self.where).manual_seed(self.seed)
        dtype = torch.float16 if self.contents.layout.places[0].datatype == "FP16" else torch.float32
        count = self.contents.layout.size_bytes // dtype.itemsize
        return (torch.randn(count, generator=drawn, device=self.where, dtype=dtype) * 0.05).view(torch.uint8)


class Rig:
    """A device with its tiers, for the length of one measurement."""

    def __init__(self, arena_bytes: int, host_bytes: int) -> None:
        kind: Callable[[int, int], Any] = CudaDevice if has_gpu() else TorchHost
        self.device = kind(arena_bytes, host_bytes + 2 * BUFFER_BYTES)
        self.store = Store(self.device)

    def close(self) -> None:
        """Nothing of it is left: views of slots, in cycles, would keep the arena."""
        del self.store
        gc.collect()
        self.device.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def has_gpu() -> bool:
    return bool(cuda.is_available())


def where() -> str:
    return "cuda" if has_gpu() else "cpu"


def synchronize() -> None:
    if has_gpu():
        cuda.synchronize()


def finish() -> None:
    """Wait for what this thread has told the device to compute, and for no copies of others."""
    if has_gpu():
        cuda.current_stream().synchronize()


def used_bytes() -> int:
    """Of the GPU by all processes, as NVML has it; of this process where there is none."""
    if not has_gpu():
        return resident_bytes()
    free, total = cuda.mem_get_info()
    return int(total - free)


def free_bytes() -> int:
    """What arenas may have."""
    return int(cuda.mem_get_info()[0]) if has_gpu() else 1 << 30


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (each.strip() for each in told.splitlines()[0].split(",")), strict=False))


class BareCopy:
    """A pinned copy of that many bytes to the device and nothing else: what swaps are measured against."""

    def __init__(self, size_bytes: int, pinned: bool = True) -> None:
        self._size_bytes = size_bytes
        if has_gpu():
            self._source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._source.zero_()
            self._target = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
        else:
            (self._from, self._held), (self._to, self._kept) = anonymous(size_bytes), anonymous(size_bytes)
            ctypes.memset(self._from, 1, size_bytes)

    def seconds(self) -> float:
        synchronize()
        begun = time.perf_counter()
        if has_gpu():
            self._target.copy_(self._source, non_blocking=True)
            cuda.synchronize()
        else:
            ctypes.memmove(self._to, self._from, self._size_bytes)
        return time.perf_counter() - begun


def fleet(architecture: list[Told], count: int) -> list[FromSeed]:
    """Models of one architecture, each of a seed of its own."""
    return [FromSeed(made.contents, seed, where()) for seed, made in enumerate(fine_tunes(architecture, count))]


def encode(weights: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """`fleets.encoder` run: rows of tokens to one vector each."""
    rows = weights["embedding"][tokens] + weights["positions"][: tokens.shape[1]]
    width = rows.shape[-1]
    layer = 0
    while f"{layer}.query.weight" in weights:

        def dense(name: str, given: torch.Tensor, layer: int = layer) -> torch.Tensor:
            return given @ weights[f"{layer}.{name}.weight"] + weights[f"{layer}.{name}.bias"]

        def norm(which: str, given: torch.Tensor, layer: int = layer) -> torch.Tensor:
            weight, bias = (weights[f"{layer}.norm{which}.{part}"] for part in ("weight", "bias"))
            return functional.layer_norm(given, (width,), weight, bias)

        heads = (*rows.shape[:2], -1, HEAD_WIDTH)
        query, key, value = (dense(name, rows).view(heads).transpose(1, 2) for name in ("query", "key", "value"))
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        rows = norm("1", rows + dense("out", attended))
        rows = norm("2", rows + dense("down", functional.gelu(dense("up", rows))))
        layer += 1
    return rows.mean(1)


def runner(slot: Slot, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A run of whichever model lies in the slot: a CUDA graph captured once per slot, plain calls without a GPU."""
    if "run" not in slot.prepared:
        slot.prepared["run"] = _captured(slot, tokens) if has_gpu() else lambda: encode(slot.views, tokens)
    run: Callable[[], torch.Tensor] = slot.prepared["run"]
    return run


def _captured(slot: Slot, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(2):
            encode(slot.views, tokens)
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, capture_error_mode="thread_local"):
        answer = encode(slot.views, tokens)

    def replay() -> torch.Tensor:
        graph.replay()
        return answer

    return replay
