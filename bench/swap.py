"""What do swaps cost beside their copies, and what do they leave unusable? `python -m bench.swap [--json FILE]`

Overhead: the time of a swap (drop one model, promote another) without bytes, and beside copies of real bytes from one
slab of memory to another, which empty the processor's caches. The comparator is a bare memmove of as many bytes after
each swap.

Fragmentation: models of many sizes on a device that is not there (`FakeDevice`: no bytes, a virtual clock), as large as
an H200; a random one is brought in, whichever were used longest ago go until it fits. Lost are the bytes that are free
when a model that would fit into them is refused.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from bench.fleets import Seeded, encoder, fine_tunes, mlp
from loaders.memory.buffers import BUFFER_BYTES
from loaders.memory.device import Move
from loaders.memory.fake import FakeDevice
from loaders.memory.host import HostDevice, anonymous
from loaders.memory.store import Store
from loaders.memory.tier import NoRoom

MIB: Final = 1 << 20
GIB: Final = 1 << 30
BERT: Final = encoder(12, 768)

CASES: Final[dict[str, tuple[list[Any], tuple[str, ...]]]] = {
    "10 KB, 4 tensors": (mlp(32, 64, 10), ()),
    "1 MB, 6 tensors": (mlp(480, 480, 64, 10), ()),
    "20 MB, 40 tensors": (mlp(*[360] * 40), ()),
    "220 MB, 194 tensors": (BERT, ()),
    "220 MB, all but the last layer shared": (BERT, tuple(name for name, *_ in BERT if not name.startswith("11."))),
    "220 MB, every second layer shared": (
        BERT,
        tuple(name for name, *_ in BERT if name.partition(".")[0] in {"0", "2", "4", "6", "8", "10"}),
    ),
}
"""Architecture and the tensors its models have in common."""


class Timed(HostDevice):
    """Adds up how long copies up take."""

    copy_s = 0.0

    def up(self, moves: Sequence[Move]) -> Any:
        begun = time.perf_counter()
        copying = super().up(moves)
        self.copy_s += time.perf_counter() - begun
        return copying


class Bare:
    """Copies of as many bytes, between random places of buffers as large as the tiers."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._rng = random.Random(2)
        self._source, self._held = anonymous(8 * size_bytes)
        self._target, self._kept = anonymous(4 * size_bytes)
        ctypes.memset(self._source, 1, 8 * size_bytes)
        ctypes.memset(self._target, 1, 4 * size_bytes)

    def copy_s(self) -> float:
        target = self._target + self._rng.randrange(4) * self._size_bytes
        source = self._source + self._rng.randrange(8) * self._size_bytes
        begun = time.perf_counter()
        ctypes.memmove(target, source, self._size_bytes)
        return time.perf_counter() - begun


def swapped(store: Store, models: Sequence[Seeded], swaps: int) -> Iterator[float]:
    """Seconds of each of some random swaps among eight models, four of which fit."""
    for n, model in enumerate(models):
        store.fill(n, model)
    rng, here = random.Random(1), list(range(4))
    for n in here:
        store.promote(n)
    for _ in range(swaps):
        comes = rng.choice([n for n in range(8) if n not in here])
        goes = here.pop(rng.randrange(4))
        begun = time.perf_counter()
        store.drop(goes, store.device)
        store.promote(comes)
        yield time.perf_counter() - begun
        here.append(comes)


def overhead(architecture: list[Any], shared: tuple[str, ...], swaps: int) -> dict[str, float]:
    models = fine_tunes(architecture, 8, shared)
    size_bytes = models[0].contents.layout.size_bytes
    sizes = 4 * size_bytes, 8 * size_bytes + 2 * BUFFER_BYTES
    engine_s = list(swapped(Store(FakeDevice(*sizes, moves_bytes=False)), models, swaps))
    device = Timed(*sizes)
    store = Store(device)
    moved_bytes = sum(place.size_bytes for place in models[0].contents.layout.places if place.name not in set(shared))
    bare = Bare(moved_bytes)
    swap_s, beside_s, bare_s = [], [], []
    before_s = 0.0
    for took_s in swapped(store, models, swaps):
        swap_s.append(took_s)
        beside_s.append(took_s - (device.copy_s - before_s))
        bare_s.append(bare.copy_s())
        before_s = device.copy_s
    return {
        "model_bytes": size_bytes,
        "moved_bytes": moved_bytes,
        "engine_us": median(engine_s) * 1e6,
        "overhead_us": median(beside_s[1:]) * 1e6,
        "swap_ms": median(swap_s) * 1e3,
        "memmove_ms": median(bare_s) * 1e3,
        "of_memmove": median(bare_s) / median(swap_s),
        "slots_made": store.slots.made,
    }


@dataclass
class Swapping:
    """Random swaps of a mixed fleet between two tiers, whichever were used longest ago going."""

    store: Store
    models: Mapping[int, Seeded]
    used: OrderedDict[int, None] = field(default_factory=OrderedDict)
    lost_bytes: list[int] = field(default_factory=list)
    """Free when refused although there was enough, 0 for the other swaps."""
    took_us: list[float] = field(default_factory=list)
    brought_bytes: int = 0

    def bring(self, key: int) -> None:
        lost, took = 0, 0.0
        needed = self.models[key].contents.layout.size_bytes
        while True:
            free = self.store.device.arena.free_bytes
            begun = time.perf_counter()
            try:
                if free >= needed:
                    self.store.promote(key)
                    break
            except NoRoom:
                lost = max(lost, free)
            finally:
                took += time.perf_counter() - begun
            goes, _ = self.used.popitem(last=False)
            begun = time.perf_counter()
            self.store.drop(goes, self.store.device)
            took += time.perf_counter() - begun
        self.used[key] = None
        self.brought_bytes += needed
        self.lost_bytes.append(lost)
        self.took_us.append(took * 1e6)


def mixed_fleet(rng: random.Random) -> list[Seeded]:
    """Of 30 architectures, 3 MB to 3 GB; a third of them share all but their last layers."""
    models: list[Seeded] = []
    for n in range(30):
        layers, width = rng.choice([2, 4, 6, 12, 24, 32]), 64 * rng.randint(3, 24)
        if n % 3:
            told = encoder(layers, width, vocabulary=rng.choice([1000, 8000, 30_522]))
        else:
            told = mlp(*[rng.choice([256, 512, 1024, 2048, 4096]) for _ in range(layers)], 10)
        common = [name for name, *_ in told if not name.startswith(f"{layers - 1}.")] if n % 3 == 2 else []
        models += fine_tunes(told, rng.randint(20, 80), common, name=str(n))
    return models


def fragmentation(swaps: int, seed: int, arena_bytes: int) -> dict[str, float]:
    rng = random.Random(seed)
    fleet = dict(enumerate(mixed_fleet(rng)))
    in_all = sum(model.contents.layout.size_bytes for model in fleet.values())
    device = FakeDevice(arena_bytes, in_all + 2 * BUFFER_BYTES, moves_bytes=False)
    store = Store(device)
    for key, model in fleet.items():
        store.fill(key, model)
    swapping = Swapping(store, fleet)
    keys = list(fleet)
    for _ in range(swaps):
        key = rng.choice(keys)
        if key in swapping.used:
            swapping.used.move_to_end(key)
            key = rng.choice([other for other in keys if other not in swapping.used])
        swapping.bring(key)
    books_are_exact(store)
    capacity, spans = store.device.arena.capacity_bytes, [len(r.spans) for r in store.device.models.values()]
    figures = {
        "models": len(fleet),
        "fleet_gb": in_all / 1e9,
        "unique_gb": store.usage(store.host).taken_bytes / 1e9,
        "swaps": swaps,
        "link_s": device.clock.now_s,
        "swap_us": median(swapping.took_us),
        "swap_p99_us": sorted(swapping.took_us)[int(swaps * 0.99)],
        "refused_percent": 100 * sum(lost > 0 for lost in swapping.lost_bytes) / swaps,
        "lost_percent": 100 * mean(swapping.lost_bytes) / capacity,
        "lost_max_percent": 100 * max(swapping.lost_bytes) / capacity,
        "moved_within_percent": 100 * store.device.compacted_bytes / swapping.brought_bytes,
        "spans_mean": mean(spans),
        "spans_max": max(spans),
    }
    for left in list(store.device.models):
        store.drop(left, store.device)
    if store.device.arena.largest_hole_bytes != capacity:
        raise SystemExit("the empty arena is not one hole")
    return figures


def books_are_exact(store: Store) -> None:
    """No byte is counted twice, none is forgotten."""
    for tier in (store.host, store.device):
        pieces = sorted(extent for stored in tier.parts.values() for extent in stored.extents)
        apart = all(a.offset + a.size_bytes <= b.offset for a, b in pairwise(pieces))
        in_use = {part for resident in tier.models.values() for part in resident.known.parts}
        taken = sum(part.size_bytes for part in in_use)
        charged = sum(tier.charged_bytes(key) for key in tier.models)
        if not apart or not sum(p.size_bytes for p in pieces) == tier.arena.taken_bytes == taken == charged:
            raise SystemExit(f"the books of the {tier.name} are wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=10_000, help="of the mixed fleet; a hundredth for each overhead")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--largest-mb", type=int, default=1000, help="leave out larger models of real bytes")
    parser.add_argument("--arena-gib", type=int, default=130, help="of the device that is not there")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    figures: dict[str, Any] = {"overhead": {}, "fragmentation": {}}
    print(
        "| swaps of | engine us | beside copies us | swap ms | memmove ms | memmove / swap |\n|---|---|---|---|---|---|"
    )
    for case, (architecture, shared) in CASES.items():
        if fine_tunes(architecture, 1)[0].contents.layout.size_bytes > asked.largest_mb * 1e6:
            continue
        row = figures["overhead"][case] = overhead(architecture, shared, max(asked.swaps // 100, 10))
        times = f"{row['swap_ms']:.3f} | {row['memmove_ms']:.3f} | {row['of_memmove']:.2f}"
        print(f"| {case} | {row['engine_us']:.0f} | {row['overhead_us']:.0f} | {times} |")
    print(
        "\n| seed | models | GB (unique) | swap us | p99 us | refused % | lost % | at most | moved % | spans (most) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(1, asked.seeds + 1):
        row = figures["fragmentation"][seed] = fragmentation(asked.swaps, seed, asked.arena_gib * GIB)
        size = f"{row['models']} | {row['fleet_gb']:.0f} ({row['unique_gb']:.0f})"
        cost = f"{row['swap_us']:.0f} | {row['swap_p99_us']:.0f}"
        lost = f"{row['refused_percent']:.1f} | {row['lost_percent']:.2f} | {row['lost_max_percent']:.2f}"
        moved = f"{row['moved_within_percent']:.1f}"
        print(f"| {seed} | {size} | {cost} | {lost} | {moved} | {row['spans_mean']:.1f} ({row['spans_max']}) |")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
