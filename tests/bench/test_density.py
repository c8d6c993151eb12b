"""The bench of density runs: mapped weights are most of what a pod takes, and threads do not grow with models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.density", "--share", "40", "--settle", "1.2"]
    subprocess.run([*command, "--json", figures], capture_output=True, text=True, check=True)
    rows = json.loads(figures.read_text())
    shared = [row for row in rows if row["pod"] == "shared"]
    assert [row["models"] for row in shared] == [25, 30]
    assert shared[-1]["weights_bytes"] < shared[-1]["resident_bytes"] < 1.3 * shared[-1]["weights_bytes"]
    assert shared[-1]["private_bytes"] < shared[-1]["resident_bytes"] / 5
    assert shared[1]["threads"] <= shared[0]["threads"] + 2  # a pool's next thread, not one for each of five models
