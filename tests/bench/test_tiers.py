"""The bench of memory tiers runs, and tiers spare loads from the store (decision 7)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.tiers", "--seeds", "2", "--models", "60", "--minutes", "0.5"]
    said = subprocess.run([*command, "--json", figures], capture_output=True, text=True, check=True)
    cases = json.loads(figures.read_text())
    assert all(f"| {case} |" in said.stdout for case in cases)
    store_gb = {case: row["store_gb"] for case, row in cases.items()}
    assert store_gb["host 10 %, exclusive"] < store_gb["host 10 %, inclusive"] <= store_gb["device alone"]
    assert store_gb["disk 60 %"] < store_gb["device alone"]
