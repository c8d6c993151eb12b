"""The bench of eviction policies runs, reads a log, and says what it promises to say."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.policies import ALL_FIT, OFFLINE, Case, Run, markdown, rows


def test_figures_and_plot(tmp_path: Path) -> None:
    log, figures, plot = tmp_path / "log.csv.gz", tmp_path / "figures.json", tmp_path / "plot.svg"
    with gzip.open(log, "wt") as lines:
        lines.write("time_s,model,tenant\n")
        lines.writelines(f"{number * 20},m{number * number % 37},t\n" for number in range(400))
    command = [sys.executable, "-m", "bench.policies", "--policies", "slo_density", "--seeds", "1", "--hours", "0.05"]
    chosen = ["--only", "one pod, memory for 10%", "--trace", str(log), "--json", str(figures)]
    said = subprocess.run([*command, *chosen], capture_output=True, text=True, check=True)
    runs = [json.loads(line) for line in figures.read_text().splitlines()]
    assert {run["policy"] for run in runs} == {ALL_FIT, "lru", "slo_density", OFFLINE}
    assert {run["case"]["trace"] for run in runs} == {"maf", "log", "maf-disk"}
    assert "| slo_density |" in said.stdout
    assert "| case | lru | slo_density | offline |" in said.stdout
    fewest = {run["case"]["trace"]: run["loads"] for run in runs if run["policy"] == ALL_FIT}
    assert any(run["loads"] > fewest[run["case"]["trace"]] for run in runs)
    subprocess.run([sys.executable, "-m", "bench.policies_plot", figures, plot], check=True)
    assert "<svg" in plot.read_text()


def test_excess_is_over_the_same_requests_with_memory_for_all() -> None:
    case = Case("maf", 1, 0.1)

    def run(policy: str, seed: int, late_pct: float, p99_ms: float) -> Run:
        return Run(case, policy, seed, 100, 5.0, late_pct, 3.0, p99_ms, 1.0, 7)

    runs = [run(ALL_FIT, 0, 1, 10), run(ALL_FIT, 1, 2, 10), run("lru", 0, 3, 100), run("lru", 1, 6, 100)]
    runs += [run("gdsf", 1, 3, 60), run("gdsf", 0, 3, 90)]
    gdsf = rows(runs)[-1]
    assert (gdsf.excess_pct, gdsf.excess_saved_seeds) == (1.5, (0.0, 0.75))
    assert gdsf.excess_saved == pytest.approx(0.5)
    assert gdsf.p99_saved == pytest.approx(0.25)
    assert "| gdsf | 5.00 % | 3.00 % | 1.50 % | 50% (0% to 75%) | 75 ms | 25% | 1 GB |" in markdown(case, rows(runs))
