"""Models that another process has in its memory: it may hang, or lose them. Authority: `loaders.base.LoadedModel`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from loaders.base import ModelLost
from loaders.synthetic import SyntheticModel
from tests.mesh.pods import TIMEOUT_S, Loads, Mesh, request_for, running


@pytest.fixture
async def mesh(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    """Two pods whose models wait for something."""
    monkeypatch.setattr(SyntheticModel, "waits", 1)
    async with running("ab", loads) as mesh:
        yield mesh


def lose(monkeypatch: pytest.MonkeyPatch, *, began: bool, times: int = 1) -> None:
    """The next runs of any model find that it has gone."""
    infer, left = SyntheticModel.infer, [None] * times

    def lost(self, inputs, outputs):  # type: ignore[no-untyped-def]
        if left:
            left.pop()
            raise ModelLost("it was killed", began=began)
        return infer(self, inputs, outputs)

    monkeypatch.setattr(SyntheticModel, "infer", lost)


async def test_a_request_that_never_reached_the_lost_model_is_run_on_the_next_copy(
    mesh: Mesh, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.register("m", load=True)
    lose(monkeypatch, began=False)
    await mesh.infer("m")
    assert loads.count("m") == 2


async def test_a_forwarded_one_as_well(mesh: Mesh, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    await mesh.register("m", load=True)
    (holder,) = mesh.holders("m")
    await mesh.seen_by_all("m", holder)
    lose(monkeypatch, began=False)
    await mesh.infer("m", "ab".replace(holder, ""))
    assert loads.count("m") == 2


async def test_a_request_that_may_have_ended_the_model_fails_and_the_next_one_has_a_new_copy(
    mesh: Mesh, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.register("m", load=True)
    lose(monkeypatch, began=True)
    refusal = await mesh.clients["a"].refusal("ModelInfer", request_for("m"))
    assert refusal == ("INTERNAL", "it was killed")
    await mesh.infer("m")
    assert loads.count("m") == 2


async def test_a_model_that_is_lost_again_and_again_is_not_loaded_each_time(
    mesh: Mesh, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.register("m", load=True)
    (holder,) = mesh.holders("m")
    lose(monkeypatch, began=True, times=100)
    client = mesh.clients[holder]
    said = [(await client.refusal("ModelInfer", request_for("m")))[1] for _ in range(20)]
    assert said[0] == "it was killed"
    assert "it was lost 3 times within 60 s" in said[-1]  # on each pod, each of which has tried
    assert loads.count("m") <= 6


async def test_a_model_that_hangs_takes_no_threads_of_others(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    await mesh.register("m", load=True)
    await mesh.register("hung", load=True, infer_ms=1)
    (holder,) = mesh.holders("hung")
    infer, gate = SyntheticModel.infer, threading.Event()

    def hang(self, inputs, outputs):  # type: ignore[no-untyped-def]
        if self._settings.infer_ms:
            assert gate.wait(TIMEOUT_S)
        return infer(self, inputs, outputs)

    monkeypatch.setattr(SyntheticModel, "infer", hang)
    waiting = [mesh.clients[holder].start("ModelInfer", request_for("hung")) for _ in range(32)]
    try:
        for _ in range(20):  # as fast as models that come in line
            await mesh.infer("m")
        assert not any(call.done() for call in waiting)
    finally:
        gate.set()
        await asyncio.gather(*waiting)
