"""The figures of `bench.policies --json` as a picture: `python -m bench.policies_plot FIGURES.json PICTURE.svg`.

By capacity, for one pod: late requests beyond those that are late with memory for all models, and p99.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.policies import ALL_FIT, OFFLINE, TRACES, Case, Row, Run, read, rows

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "lru": {"color": "#555555", "linewidth": 2},
    "slo_density": {"color": "#1b6ca8", "linewidth": 2.4, "zorder": 3},
    OFFLINE: {"color": "black", "linestyle": "--", "linewidth": 1.2},
    "lru2": {"color": "#c9a227"},
    "lfu": {"color": "#7fb069"},
    "sieve": {"color": "#d1495b"},
    "s3fifo": {"color": "#e59b8b"},
    "gdsf": {"color": "#8a6fb0"},
}


def draw(tables: dict[Case, list[Row]]) -> Figure:
    """A row of panels per trace; logarithmic axes."""
    mpl.rcParams |= {"svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    shown = [case for case in tables if case.pods == 1]
    traces = [trace for trace in TRACES if any(case.trace == trace for case in shown)]
    figure = Figure(figsize=(8, 2.6 * len(traces) + 0.5), layout="constrained")
    panels = figure.subplots(len(traces), 2, squeeze=False)
    for trace, (late, tail) in zip(traces, panels, strict=True):
        cases = [case for case in shown if case.trace == trace]
        for axes, value, title in (
            (late, "excess_pct", "late beyond all fit, % of requests"),
            (tail, "p99_ms", "p99, ms"),
        ):
            for policy, style in _STYLES.items():
                points = [
                    (100 * case.share, getattr(row, value))
                    for case in cases
                    for row in tables[case]
                    if row.policy == policy
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=policy, **style)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks([100 * case.share for case in cases])
            axes.xaxis.set_major_formatter("{x:g} %")
            axes.grid(linewidth=0.3)
            axes.set_title(f"{TRACES[trace]}: {title}", loc="left", fontsize=8)
        all_fit = [row.p99_ms for case in cases for row in tables[case] if row.policy == ALL_FIT]
        tail.axhline(all_fit[0], color="#bbbbbb", linewidth=1)
    for axes in panels[-1]:
        axes.set_xlabel("memory, of the bytes of all models")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m bench.policies_plot FIGURES.json PICTURE.svg", file=sys.stderr)
        return 2
    by_case: dict[Case, list[Run]] = {}
    for run in read(Path(sys.argv[1])):
        by_case.setdefault(run.case, []).append(run)
    draw({case: rows(runs) for case, runs in by_case.items()}).savefig(sys.argv[2], metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
