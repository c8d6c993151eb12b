"""The bench of activation runs, and an architecture that is known spares most of a session's time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.activation", "--networks", "MLP, 10 KB", "--trials", "12"]
    said = subprocess.run([*command, "--json", figures], capture_output=True, text=True, check=True)
    rows = {row["way"]: row for row in json.loads(figures.read_text())}
    assert len(rows) == 5
    assert all(f"| {way} |" in said.stdout for way in rows)
    assert rows["InferenceSession(path)"]["faster"] == 1.0
    assert rows["shared architecture"]["weights_bytes"] == 8704


def test_figures_of_torch(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-c", "import bench.activation as b; b.TORCH = {(64, 128, 10): 4}; b.main()"]
    subprocess.run([*command, "--networks", "--torch", "--json", figures], capture_output=True, check=True)
    ways = [row["way"] for row in json.loads(figures.read_text())]
    assert ways == ["torch.load + module", "safetensors.load + module", "safetensors, as pods load it"]
