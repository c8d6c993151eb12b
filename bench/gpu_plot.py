"""The figures of `bench.gpu_campaign` as a picture: bars, with matplotlib if it is there, else as SVG by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_BAR, _ROW, _LEFT, _WIDTH = "#1b6ca8", 18, 190, 760
Panel = tuple[str, list[tuple[str, float]]]


def panels(figures: dict[str, Any]) -> list[Panel]:
    """Title and named values of each; what was not measured is left out."""
    found: list[Panel] = []
    speeds = figures.get("link", {}).get("gb_per_s", {})
    rows = [(f"{int(size) / 1e6:,.1f} MB {way}", row[way]) for size, row in speeds.items() for way in row]
    found.append(("Pinned copies, GB/s", rows))
    swaps = {name: row for name, row in figures.get("swap", {}).items() if isinstance(row, dict)}
    found.append(
        ("Swap-in, share of a bare pinned copy's speed", [(name, row["of_bare"]) for name, row in swaps.items()])
    )
    points = figures.get("density", {}).get("points", [])
    found.append(("Device memory used, GB", [(f"{count} models", used / 1e9) for count, used in points]))
    beside = figures.get("interference", {})
    names = [name for name in beside if name.endswith("_ms")]
    found.append(("Latency of a warm model, ms", [(name.removesuffix("_ms"), beside[name]) for name in names]))
    tenants = {name: row for name, row in figures.get("cross_tenant", {}).items() if isinstance(row, dict)}
    rates = [
        (f"{name} {way.removesuffix('_per_s')}", rate)
        for name, row in tenants.items()
        for way, rate in row.items()
        if way.endswith("_per_s")
    ]
    found.append(("Requests per second across tenants", rates))
    return [panel for panel in found if panel[1]]


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(figures: dict[str, Any], out: Path) -> Path:
    """The picture's path."""
    shown = panels(figures)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        path = out / "figures.svg"
        path.write_text(svg(shown))
        return path
    mpl.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    heights = [len(rows) + 1 for _, rows in shown]
    figure = Figure(figsize=(8, 0.22 * sum(heights) + 0.5 * len(shown) + 0.5), layout="constrained")
    all_axes = figure.subplots(max(len(shown), 1), 1, squeeze=False, height_ratios=heights or None)
    for axes, (title, rows) in zip(all_axes.flat, shown, strict=False):
        axes.barh([name for name, _ in rows][::-1], [value for _, value in rows][::-1], color=_BAR)
        for n, (_, value) in enumerate(rows[::-1]):
            axes.annotate(_told(value), (value, n), (3, 0), textcoords="offset points", va="center")
        axes.set_title(title, loc="left", fontsize=9)
    path = out / "figures.png"
    figure.savefig(path, dpi=150)
    return path


def svg(shown: list[Panel]) -> str:
    """All panels below each other."""
    parts: list[str] = []
    y = 10
    for title, rows in shown:
        y += _ROW
        parts.append(f'<text x="5" y="{y}" font-weight="bold">{escape(title)}</text>')
        most = max(value for _, value in rows) or 1.0
        for name, value in rows:
            y += _ROW
            length = (_WIDTH - _LEFT - 80) * value / most
            parts.append(f'<text x="{_LEFT - 5}" y="{y}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{_LEFT}" y="{y - 11}" width="{length:.1f}" height="13" fill="{_BAR}"/>')
            parts.append(f'<text x="{_LEFT + length + 4:.1f}" y="{y}">{_told(value)}</text>')
        y += _ROW // 2
    size = f'width="{_WIDTH}" height="{y + 10}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
