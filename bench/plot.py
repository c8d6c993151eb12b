"""The table of `bench.dataplane --json` as a picture: `python -m bench.plot FIGURES.json PICTURE.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

PANELS: Final = ("291 B 8x8", "291 B 64x1", "MLP 8x8", "600 KB 4x4")
_OURS, _OTHERS = "#1b6ca8", "#8a8a8a"
_BLANK: Final = {"facecolor": "white", "linewidth": 0, "pad": 0.5}


def draw(told: dict[str, Any]) -> Figure:
    """One panel per case on a logarithmic axis; servers above, proxies below."""
    mpl.rcParams |= {"svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    names = sorted(told["table"], key=lambda name: name in told["proxies"])[::-1]
    labels = [f"{told['versions'][name]}{' (proxy)' if name in told['proxies'] else ''}" for name in names]
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle("Server CPU per request, microseconds (connections x streams)", fontsize=10)
    for axes, case in zip(figure.subplots(2, 2, sharey=True).flat, PANELS, strict=True):
        shown = {n: told["table"][name][case]["cpu_us"] for n, name in enumerate(names) if case in told["table"][name]}
        for n, value in shown.items():
            colour = _OURS if names[n].startswith("densemesh") else _OTHERS
            axes.plot(value, n, "o", color=colour, markersize=5)
            text = f"{value:,.{0 if value >= 100 else 1}f}"
            axes.annotate(text, (value, n), (5, 0), textcoords="offset points", va="center", color=colour, bbox=_BLANK)
        axes.set_xscale("log")
        axes.set_xlim(min(shown.values()) / 1.5, max(shown.values()) * 3)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_yticks(range(len(names)), labels)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(case, loc="left", fontsize=9)
    return figure


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m bench.plot FIGURES.json PICTURE.svg", file=sys.stderr)
        return 2
    draw(json.loads(Path(sys.argv[1]).read_text())).savefig(sys.argv[2], metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
