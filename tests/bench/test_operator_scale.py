"""The bench of the operator runs, and tells what each InferenceService costs the API server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.operator_scale", "--count", "10", "--json", str(figures)]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    told = json.loads(figures.read_text())
    assert 0 < told["first_s"] <= told["all_s"]
    assert told["calls"]["PATCH inferenceservices"] <= 4 * told["count"]
