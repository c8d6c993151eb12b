"""`max_concurrency`: a model runs so often at once at most, and others have the threads meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from loaders.base import Tensor
from loaders.synthetic import SyntheticModel
from mesh.in_line import Pace
from mesh.limited import Limited
from mesh.workers import Workers
from protos import management_pb2 as mm
from tests.mesh.pods import Loads, running


async def test_a_model_runs_so_often_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    infer, lock, two = SyntheticModel.infer, threading.Lock(), threading.Barrier(2)
    at_once, most = 0, 0

    def watched(model: SyntheticModel, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        two.wait(30)  # there are two each time
        try:
            return infer(model, inputs, outputs)
        finally:
            with lock:
                at_once -= 1

    async with running("a", Loads()) as mesh:
        key = '{"max_concurrency": 2, "one_by_one": true}'
        info = mm.ModelInfo(type="synthetic", key=key)
        request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
        await mesh.clients["a"].call("registerModel", request)
        await mesh.register("other", load=True)
        monkeypatch.setattr(SyntheticModel, "infer", watched)
        await asyncio.gather(*(mesh.infer("m") for _ in range(12)))
        assert most == 2
        monkeypatch.setattr(SyntheticModel, "infer", infer)
        assert await mesh.infer("other") == "a"


async def test_what_was_withdrawn_leaves_its_place_to_others() -> None:
    workers = Workers(2, asyncio.get_running_loop())
    limited = Limited(workers, 1)
    begin = threading.Event()

    def job(work: Any) -> Any:
        return limited.submit(work, Pace())

    first, second, third = job(lambda: begin.wait(30)), job(lambda: "second"), job(lambda: "third")
    assert limited.idle == 0
    assert second.withdraw()
    assert not second.withdraw()
    begin.set()
    assert await first.future
    assert await third.future == "third"
    assert not second.future.done()
    assert limited.idle > 0
    workers.close()
