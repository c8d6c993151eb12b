"""The bench of swaps runs: books exact at the end, loss by fragmentation within its goal (issue: at most 3 %)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.swap", "--swaps", "1000", "--seeds", "1", "--largest-mb", "2"]
    said = subprocess.run([*command, "--json", figures], capture_output=True, text=True, check=True)
    told = json.loads(figures.read_text())
    assert all(f"| {case} |" in said.stdout for case in told["overhead"])
    assert all(row["slots_made"] == 4 for row in told["overhead"].values())
    row = told["fragmentation"]["1"]
    assert row["refused_percent"] > 0
    assert row["lost_percent"] <= 3
    assert row["link_s"] > 0
