"""The demo, small: it succeeds, leaves nothing behind, and notices one wrong answer."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.demo import Settings, parse, run, serve
from bench.jobs import ROOT
from bench.tenants import train

SMALL = Settings(models=6, seconds=1.5, pods=2, torch=False, seed=7)


def _descendants(ancestor: int) -> set[int]:
    """Pids of its children, theirs, and so on (proc(5): the parent is the second field after the command)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), {ancestor}
    while new := {pid for pid, parent in parents.items() if parent in new}:
        found |= new
    return found


async def test_every_answer_is_compared_and_nothing_is_left_running(tmp_path: Path) -> None:
    before, output = _descendants(os.getpid()), io.StringIO()
    status = await run(SMALL, tmp_path, Console(file=output, width=120))
    told = output.getvalue()
    assert status == 0, told
    assert "every answer was the model's own" in told
    assert _descendants(os.getpid()) <= before


async def test_a_wrong_expectation_fails_the_demo(tmp_path: Path) -> None:
    """One tenant's own predictions are altered, and only its answers differ."""
    tenants = await train(tmp_path, 2, seed=7, torch=False, on_tenant=lambda tenant: None)
    with np.load(tenants[0].answers) as kept:
        altered = {**kept, "probabilities": kept["probabilities"] + np.float32(0.01)}
    np.savez(tenants[0].answers, **altered)
    output = io.StringIO()
    status = await serve(SMALL, tenants, tmp_path, Console(file=output, width=120))
    told = output.getvalue()
    assert status == 1, told
    assert f"{tenants[0].model_id} (" in told
    assert "a probability is off by 0.01" in told
    assert f"{tenants[1].model_id} (" not in told


def test_an_interrupt_ends_it_cleanly(tmp_path: Path) -> None:
    """Ctrl-C during the training: status 130, a sentence, no files."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "bench.demo", "--models", "500"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with demo:
        assert demo.stdout is not None
        first = demo.stdout.readline()  # of fifty tenants trained
        jobs = _descendants(demo.pid)
        demo.send_signal(signal.SIGINT)
        told = first + demo.stdout.read()
    assert demo.returncode == 130, told
    assert "interrupted" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
    assert jobs
    assert not [pid for pid in jobs if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("arguments", [["--models", "0"], ["--pods", "0"], ["--seconds", "0"], ["--seed", "-1"]])
def test_impossible_settings_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
