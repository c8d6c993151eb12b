"""The GPU campaign runs to its end where there is no GPU and no package but torch and numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BARE = """
import runpy, sys
for name in ("matplotlib", "ml_dtypes", "cachetools", "rich", "psutil", "click", "onnxruntime"):
    sys.modules[name] = None
sys.argv = ["gpu_campaign", "--small", "--out", sys.argv[1]]
runpy.run_module("bench.gpu_campaign", run_name="__main__")
"""


def test_small_form_on_a_bare_machine(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = subprocess.run([sys.executable, "-c", BARE, tmp_path], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "error" not in json.dumps(figures)
    assert figures["density"]["different_answers"] == [16, 16]
    assert figures["swap"]["1 MB"]["swaps"] > 0
    assert "Requests per second across tenants" in (tmp_path / "figures.svg").read_text()


def test_picture_with_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "bench.gpu_campaign", "--out", str(tmp_path), "--steps", "link"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing about speed" in said.stdout
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "bench.gpu_campaign", "--out", str(tmp_path), "--steps", "link,warp"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "--steps: expected some of machine, link" in said.stderr
