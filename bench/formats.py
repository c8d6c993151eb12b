"""What does each format cost, against its framework by hand? And with `--sizes`: what do models take, and what was
expected of them? `python -m bench.formats [--kinds NAME,...]`

Each kind of model of `bench.zoo` that is installed is trained, saved, and measured by a job of its own: `bench.timed`
(one model, of size `--size`) or `bench.sizes` (all five sizes).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.jobs import Job, JobError, result_of
from bench.zoo import SIZES, ZOO, Kind
from loaders import LOADERS
from loaders.base import Artifact
from loaders.sizing import Sizing, keys_of

_WITHIN: Final = (1.10, 1.25, 1.50)


async def times(kinds: Mapping[str, Kind], size: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """One row for each kind."""
    told = []
    for name, kind in kinds.items():
        path = made(folder, name, kind, size)
        told.append(await result_of("bench.timed", name, str(path), str(seconds), str(folder / "prepared")))
        _say(f"{name} measured")
    return told


async def sizes(kinds: Mapping[str, Kind], folder: Path, count: int = SIZES) -> list[dict[str, Any]]:
    """One row for each model, in an order that mixes the kinds; `learned` is what would have been expected then."""
    told: list[dict[str, Any]] = []
    for name, kind in kinds.items():
        paths = [made(folder, name, kind, size) for size in range(count)]
        async with Job("bench.sizes", name, *map(str, paths)) as job:
            told += [{"kind": name, **line} async for line in job.lines()]
        _say(f"{name} measured")
    told.sort(key=lambda row: (int(row["size"]), row["kind"]))
    sizing = Sizing()
    for row in told:
        kind = ZOO[row["kind"]]
        expected_bytes, told_bytes = int(row["expected"]), round(row["told"])
        keys = keys_of(kind.format, Artifact(folder / row["file"]), expected_bytes)
        row["learned"] = sizing.corrected(keys, expected_bytes)
        if told_bytes != expected_bytes:
            sizing.learn(keys, expected_bytes, told_bytes)
    return told


def made(folder: Path, name: str, kind: Kind, size: int) -> Path:
    """The file of one model."""
    path = folder / f"{name.replace(',', '').replace(' ', '-')}-{size}{kind.extension}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.make(path, size)
    return path


def times_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown; in parentheses how many times faster than by hand."""
    lines = [
        "| model | disk kB | memory kB | first ms | load ms | 1 row us | 32 rows us "
        "| prepared: kB | load ms | 1 row us | 32 rows us | largest difference |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        by_hand = row["ways"]["by hand"]
        cells = [row["kind"], f"{row['disk_bytes'] / 1e3:,.0f}", f"{row['memory_bytes'] / 1e3:,.0f}"]
        cells.append(f"{row['first_ms']:,.0f}")
        for way in ("ours", "prepared"):
            found = row["ways"].get(way)
            if way == "prepared":
                cells.append(f"{row['prepared_bytes'] / 1e3:,.0f}" if found else "")
            for figure in ("load_ms", "run_1_us", "run_32_us"):
                cells.append(f"{_short(found[figure])} ({_short(by_hand[figure] / found[figure])}x)" if found else "")
        cells.append(f"{max(way['difference'] for way in row['ways'].values()):.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def sizes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: shares of models whose bytes were expected within 10, 25 and 50 percent of the true ones."""
    lines = [
        "| models | kB | estimate within 10 / 25 / 50 % | worst | learned within 10 / 25 / 50 % | worst "
        "| measured within 10 / 25 / 50 % | worst |",
        "|---" * 8 + "|",
    ]
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        own = [row for row in rows if kind in (row["kind"], "all")]
        smallest, largest = min(row["true"] for row in own), max(row["true"] for row in own)
        cells = [f"{kind} ({len(own)})", f"{smallest / 1e3:,.0f} to {largest / 1e3:,.0f}"]
        for figure in ("expected", "learned", "told"):
            ratios = [row[figure] / max(1.0, row["true"]) for row in own]
            shares = [sum(1 / most <= ratio <= most for ratio in ratios) / len(own) for most in _WITHIN]
            cells.append(" / ".join(f"{share:.0%}" for share in shares))
            cells.append(f"{max(ratios, key=lambda ratio: max(ratio, 1 / max(ratio, 1e-9))):.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _kinds(asked: str) -> dict[str, Kind]:
    """Those asked for, or all, of those that can be made and loaded here.

    Raises:
        KeyError: there is none of that name.
    """
    kinds = {name: ZOO[name] for name in (asked.split(",") if asked else ZOO)}
    here = {name: kind for name, kind in kinds.items() if kind.format in LOADERS and kind.is_here()}
    for name in kinds.keys() - here.keys():
        _say(f"{name} is left out: it is not installed")
    return here


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="", help="names of kinds, with commas between them")
    parser.add_argument("--size", type=int, default=2, choices=range(SIZES), help="of the models that are timed")
    parser.add_argument("--seconds", type=float, default=0.2, help="measured time per figure and round")
    parser.add_argument("--sizes", action="store_true", help="measure bytes, not times")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    asked = parser.parse_args()
    try:
        kinds = _kinds(asked.kinds)
    except KeyError as error:
        parser.error(f"--kinds: unknown {error}, expected some of {', '.join(ZOO)}")
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as folder:
        try:
            if asked.sizes:
                rows = await sizes({name: kind for name, kind in kinds.items() if not kind.has_process}, Path(folder))
            else:
                rows = await times(kinds, asked.size, asked.seconds, Path(folder))
        except JobError as error:
            Console(stderr=True).print(str(error), markup=False)
            return 1
    print(sizes_table(rows) if asked.sizes else times_table(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
