"""The bench of placement's growth runs, and says what it promises to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures_and_plot(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    command = [sys.executable, "-m", "bench.placement_scale", "--models", "2000,4000", "--pods", "10"]
    said = subprocess.run([*command, "--json", figures, "--plot", plot], capture_output=True, text=True, check=True)
    rows = json.loads(figures.read_text())
    assert [row["models"] for row in rows] == [2000, 4000]
    assert all(row[name] > 0 for row in rows for name in ("hit_us", "forward_us", "miss_us", "step_us", "tick_us"))
    assert "| 4,000 x 10 |" in said.stdout
    assert "<svg" in plot.read_text()
