"""`bench.storage` in small. Authority: issue 5: cold fetch against the same library alone, first output after the last
byte."""

from __future__ import annotations

import pytest

from bench import storage


async def test_fetches_and_first_answers_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "SMALL_FILES", 20)
    figures = await storage.run([1], {"free": 0.0, "paced": 1e9}, hidden=64, rounds=1)
    speeds = figures["mb_per_s"]
    files = ("1 MB", "1 MB, ETag is its MD5", "20 files of 20 kB")
    assert list(speeds) == [f"{name}, {pace}" for pace in ("free", "paced") for name in files]
    assert all(speed > 0 for found in speeds.values() for speed in found.values())
    assert set(figures["answer_ms"]) == {"fetch", "load", "run", "by hand"}
    assert "last byte to the answer" in capsys.readouterr().out
