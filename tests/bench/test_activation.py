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
