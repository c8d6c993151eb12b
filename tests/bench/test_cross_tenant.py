"""The bench of batches across tenants runs, and joint runs of small networks take less than one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "bench.cross_tenant",
        "--networks",
        "64-128-10",
        "--tenants",
        "64",
        "--rounds",
        "1",
    ]
    said = subprocess.run([*command, "--json", figures], capture_output=True, text=True, check=True)
    rows = json.loads(figures.read_text())
    assert [(row["in_flight"], row["way"]) for row in rows] == [
        (in_flight, way) for in_flight in (16, 64) for way in ("torch modules, one by one", "one by one", "jointly")
    ]
    assert all(f"| {row['way']} | {row['request_us']:.2f} |" in said.stdout for row in rows)
    assert rows[0]["faster"] == rows[1]["than_one_by_one"] == 1
