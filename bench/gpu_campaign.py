"""Everything about memory that only a GPU can tell, in one go: `python -m bench.gpu_campaign --out DIRECTORY`

Needs one NVIDIA GPU, torch and numpy, no network; takes under nine minutes. Weights are made on the GPU from seeds.
Without a GPU the same code runs in its small form on host memory, which says that it works, and nothing about speed.
A step that fails is told in the figures, and the others go on. Writes figures.json and figures.png (.svg without
matplotlib).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from bench.gpu_plot import draw
from bench.gpu_rig import cuda, has_gpu
from bench.gpu_scale import FULL, SMALL
from bench.gpu_steps import STEPS

LIMIT_S: Final = 480.0
"""No step begins after that."""
GOALS: Final = (
    ("swap", "220 MB", "of_bare", ">=", 0.8),
    ("swap", "1 GB", "of_bare", ">=", 0.9),
    ("density", None, "slope_of_weights", "<=", 1.02),
    ("fragmentation", None, "lost_percent", "<=", 3.0),
    ("interference", None, "inflation_p99", "<=", 1.1),
)


def run(names: list[str], small: bool) -> dict[str, Any]:
    """The figures by step; `error` in those that failed."""
    begun = time.perf_counter()
    figures: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat()}
    for name in names:
        started = time.perf_counter()
        if started - begun > LIMIT_S:
            figures[name] = {"error": f"left out: {started - begun:.0f} s were over"}
            continue
        try:
            figures[name] = STEPS[name](SMALL if small else FULL)
        except Exception as error:  # a campaign has one chance: what can still be measured is
            figures[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        gc.collect()
        if has_gpu():
            cuda.empty_cache()
        figures[name]["took_s"] = time.perf_counter() - started
        print(f"{name}: {json.dumps(figures[name], default=str)}", flush=True)
    return figures


def judged(figures: dict[str, Any]) -> list[str]:
    """The goals that were measured, each in a line."""
    lines = []
    for step, case, name, sign, goal in GOALS:
        row = figures.get(step, {})
        found = (row.get(case, {}) if case else row).get(name)
        if found is not None:
            met = found >= goal if sign == ">=" else found <= goal
            lines.append(f"{step} {case or ''} {name} {found:.3f}, goal {sign} {goal}: {'met' if met else 'missed'}")
    changed = {
        (step, case): count
        for step, rows in (("swap", figures.get("swap", {})), ("fragmentation", {"": figures.get("fragmentation", {})}))
        for case, row in rows.items()
        if isinstance(row, dict)
        for count in [sum(row.get("allocations", {}).values())]
        if row.get("allocations")
    }
    return [*lines, *(f"allocations of {step} {case}: {count}, goal 0" for (step, case), count in changed.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for figures and picture")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of them, by name")
    parser.add_argument("--small", action="store_true", help="the small form, on a GPU too")
    asked = parser.parse_args()
    names = asked.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, not {', '.join(unknown)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    small = asked.small or not has_gpu()
    if not has_gpu():
        torch.set_num_threads(1)
    figures = run(names, small)
    (asked.out / "figures.json").write_text(json.dumps(figures, indent=1, default=str) + "\n")
    print("the small form: these figures say nothing about speed" if small else "\n".join(judged(figures)))
    print(draw(figures, asked.out))
    return 1 if any("error" in row for row in figures.values() if isinstance(row, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
