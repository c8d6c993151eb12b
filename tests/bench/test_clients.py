"""`bench.clients` and `bench.held` in small. Authority: issue 3: real clients with headers that vary per call; streams
and connections that are held, with what they cost."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from bench import clients, held
from bench.callers import Plan
from bench.peers.base import message
from mesh.load_generator import LoadError


async def test_python_clients_call_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MODELS", 3)
    monkeypatch.setattr(clients, "SHAPE", (1, 2))
    names = ["grpcio", "grpc.aio", "tritonclient"]
    costs = await clients.run(names, seconds=0.1, rounds=1)
    for name in names:
        assert all(costs[name][what].cpu_us > 0 for what in ("own", "steady", "full"))
    lines = clients.markdown(costs).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]


def test_no_two_calls_have_the_same_headers(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    models = [(f"m-{n}", "") for n in range(1_000)]
    shape = {"address": "", "method": "", "connections": 1, "streams": 1, "seconds": 1}
    path.write_text(json.dumps({**shape, "messages": models}))
    calls = [next(stream) for stream in [Plan(path).calls()] for _ in range(1_000)]
    assert {model_id for model_id, *_ in calls} == {model_id for model_id, _ in models}
    assert len({metadata[1] for _, _, metadata, _ in calls}) == len({timeout_s for *_, timeout_s in calls}) == 1_000
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", metadata[1][1]) for _, _, metadata, _ in calls)


async def test_what_is_held_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(held, "_SETTLE_S", 0.1)
    monkeypatch.setattr(held, "_SPARE_S", 0.3)
    await held.run(requests=200, idle=30, seconds=0.2)
    told = capsys.readouterr().out
    assert "200 requests that wait, on 2 connections: " in told
    assert "then {'DEADLINE_EXCEEDED': 200}" in told
    assert "30 idle connections, one call made on each: " in told
    assert len(re.findall(r"(resident|proportional) .* before, .* while they wait: .* each", told)) == 4


async def test_requests_that_do_not_wait_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_SETTLE_S", 0.5)
    monkeypatch.setattr(held, "message", lambda model: message("nobody"))
    with pytest.raises(LoadError, match="the requests did not wait"):
        async with asyncio.timeout(30):
            await held.run(requests=10, idle=1, seconds=0.1)
