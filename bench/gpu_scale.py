"""How much of everything `bench.gpu_campaign` measures: as the goals have it, or to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from bench.fleets import Told, encoder, mlp

Figures = dict[str, Any]
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Scale:
    link_bytes: tuple[int, ...]
    swapped: tuple[tuple[str, list[Told]], ...]
    small_model: list[Told]
    """What density and interference are measured with."""
    density: tuple[int, ...]
    tokens: tuple[int, int]
    seconds: float
    """Of measuring, per figure."""
    tenants: int


def wide(size_bytes: int, datatype: str) -> list[Told]:
    """Square layers of 32 MiB, about that many bytes."""
    side = 4096 if datatype == "FP16" else 256
    each = side * side * (2 if datatype == "FP16" else 4)
    return mlp(*[side] * (max(size_bytes // each, 1) + 1), datatype=datatype)


FULL: Final = Scale(
    link_bytes=tuple(64 * KIB << 2 * n for n in range(8)),
    swapped=(
        ("50 MB", wide(50_000_000, "FP16")),
        ("220 MB", encoder(12, 768)),
        ("1 GB", wide(1_000_000_000, "FP16")),
        ("4 GB", wide(4_000_000_000, "FP16")),
    ),
    small_model=encoder(12, 768),
    density=(1, 8, 16, 32, 64),
    tokens=(1, 128),
    seconds=8.0,
    tenants=64,
)
SMALL: Final = Scale(
    link_bytes=(64 * KIB, 1 * MIB),
    swapped=(("1 MB", wide(1_000_000, "FP32")), ("2 MB", encoder(2, 64, 4000, "FP32"))),
    small_model=encoder(2, 64, 1000, "FP32"),
    density=(1, 4, 8),
    tokens=(1, 16),
    seconds=0.2,
    tenants=8,
)
