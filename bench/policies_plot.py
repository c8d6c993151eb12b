"""The figures of `bench.policies --json` as a picture: `python -m bench.policies_plot FIGURES.json PICTURE.svg`.

By capacity, for one pod: late requests beyond those that are late with memory for all models, against LRU's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.policies import OFFLINE, TRACES, Case, Row, Run, read, rows

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
    """A panel per trace."""
    mpl.rcParams |= {"svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    shown = [case for case in tables if case.pods == 1 and not case.fifo]
    traces = [trace for trace in TRACES if any(case.trace == trace for case in shown)]
    figure = Figure(figsize=(2.9 * len(traces) + 1.2, 3.4), layout="constrained")
    figure.suptitle("Late requests beyond those that are late when all models fit, LRU's = 100 %", fontsize=10)
    panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    for trace, axes in zip(traces, panels, strict=True):
        cases = [case for case in shown if case.trace == trace]
        for policy, style in _STYLES.items():
            points = [
                (100 * case.share, 100 * (1 - row.excess_saved))
                for case in cases
                for row in tables[case]
                if row.policy == policy
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=policy, **style)
        axes.set_xticks([100 * case.share for case in cases])
        axes.xaxis.set_major_formatter("{x:g} %")
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.grid(linewidth=0.3)
        axes.set_title(TRACES[trace], loc="left", fontsize=8)
        axes.set_xlabel("memory, of the bytes of all models")
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
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
