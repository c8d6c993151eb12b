"""Requests to several models of a family run in one call, and each gets what its model alone would say. Authority:
mesh.company, mesh.batcher and mesh.hits; for `safetensors` torch's own answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loaders.base import InferError, Signature, Tensor, TensorSpec
from mesh import batcher
from mesh.batcher import Batcher
from mesh.company import MOST_ROWS_EACH, Company
from mesh.errors import InvalidRequest
from mesh.in_line import InLine, Pace
from mesh.resident import Resident
from mesh.settings import ModelSettings
from mesh.workers import Workers
from placement.cache import Copy
from placement.records import ModelRecord, Priority
from protos import management_pb2 as mm
from tests.mesh.pods import until
from tests.mesh.test_hits import One, answer, one, request, rows  # noqa: F401
from tests.mesh.test_metrics import scrape

TIMEOUT_S: Final = 30.0


class Fleet:
    """A family that tells which models ran together."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.wrong = False

    def infer_many(
        self, models: Sequence[Any], requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        assert all(model.has_joined for model in models)
        self.runs.append([model.number for model in models])
        if any((request["x"] == 13).any() for request in requests):
            raise InferError("thirteen among them", bad_input=True)
        return [
            {"y": request["x"] * (model.number + self.wrong)} for model, request in zip(models, requests, strict=True)
        ]


class Tenant:
    """Multiplies by its number; a request with 99 waits for `gate`."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),), "t")
    size_bytes = 1
    waits = 0
    gate = threading.Event()

    def __init__(self, number: int, family: Fleet) -> None:
        self.number = number
        self.family = family
        self.has_joined = False
        self.runs: list[list[float]] = []
        self.begun = threading.Event()

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        x = inputs["x"]
        self.runs.append(x.ravel().tolist())
        if 99 in x:
            self.begun.set()
            assert self.gate.wait(TIMEOUT_S)
        if 13 in x:
            raise InferError("thirteen", bad_input=True)
        return {"y": x * self.number}

    def join(self) -> None:
        self.has_joined = True

    def unload(self) -> None: ...


class Bench:
    """Tenants' models on one thread."""

    def __init__(self, tenants: int, **settings: Any) -> None:
        self.workers = Workers(1, asyncio.get_running_loop())
        self.batcher = Batcher(self.workers, InLine(asyncio.get_running_loop()), self.pin, self.unpin, print, print)
        self.family = Fleet()
        self.models = [Tenant(n + 1, self.family) for n in range(tenants)]
        self.copies = [Copy(ModelRecord(f"m{n}", "t", "", "", 0), since_ms=0, used_ms=0) for n in range(tenants)]
        self.residents = [Resident(model, ModelSettings(**settings)) for model in self.models]
        for resident in self.residents:
            self.batcher.meet(resident)

    def pin(self, copy: Copy) -> None:
        copy.pins += 1

    def unpin(self, copy: Copy) -> None:
        copy.pins -= 1

    def start(self, tenant: int, *values: float, priority: Priority | None = None) -> asyncio.Task[Any]:
        x = np.array(values, np.float32).reshape(-1, 1)
        copy, resident = self.copies[tenant], self.residents[tenant]
        return asyncio.create_task(self.batcher.run(copy, resident, {"x": x}, ("y",), x.nbytes, 1e9, priority))

    async def known(self) -> None:
        """Return when models may be run together."""
        company = self.residents[0].company
        assert company is not None
        while not company.tried or not all(company.tried.values()):
            await asyncio.gather(*(self.start(n, v) for n in range(len(self.models)) for v in (1, 2)))
        self.clear()

    def clear(self) -> None:
        self.family.runs.clear()
        for model in self.models:
            model.runs.clear()

    async def held(self) -> asyncio.Task[Any]:
        """A request that keeps the thread busy until the gate opens."""
        self.models[0].begun.clear()
        task = self.start(0, 99, 99)
        assert await asyncio.to_thread(self.models[0].begun.wait, TIMEOUT_S)
        self.clear()
        return task


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(Pace, "measured", lambda pace, elapsed_s: setattr(pace, "typical_s", 1.0))  # always in threads
    monkeypatch.setattr(batcher, "_enter", lambda *_: None)
    Tenant.gate.clear()
    made = Bench(5)
    async with asyncio.timeout(TIMEOUT_S):
        yield made
        Tenant.gate.set()
        await until(lambda: not any(copy.pins for copy in made.copies))
        company = made.residents[0].company
        assert company is not None
        assert not any(company.waiting.values())
        made.workers.close()


async def test_what_waits_for_a_thread_is_one_call(bench: Bench) -> None:
    await bench.known()
    await bench.held()
    before = sum(bench.batcher.joint.counts)
    waiting = [bench.start(n, *range(n + 1)) for n in range(5)] + [bench.start(3, 7)]
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    answers = [result["y"].ravel().tolist() for result in await asyncio.gather(*waiting)]
    assert answers == [[v * (n + 1) for v in range(n + 1)] for n in range(5)] + [[28]]
    assert bench.family.runs == [[1, 2, 3, 4, 5]]
    assert sum(bench.batcher.joint.counts) == before + 1


async def test_classes_are_kept_apart(bench: Bench) -> None:
    await bench.known()
    await bench.held()
    classes = [Priority.LOW, Priority.HIGH, Priority.LOW, Priority.HIGH, Priority.NORMAL]
    waiting = [bench.start(n, 1, priority=priority) for n, priority in enumerate(classes)]
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    await asyncio.gather(*waiting)
    assert sorted(bench.family.runs) == [[1, 3], [2, 4]]
    assert bench.models[4].runs == [[1]]


async def test_a_tenant_with_many_rows_is_run_alone(bench: Bench) -> None:
    await bench.known()
    await bench.held()
    waiting = [bench.start(0, 1), bench.start(1, *[1] * (MOST_ROWS_EACH + 1)), bench.start(2, 1)]
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    await asyncio.gather(*waiting)
    assert bench.family.runs == [[1, 3]]
    assert bench.models[1].runs == [[1] * (MOST_ROWS_EACH + 1)]


async def test_a_bad_request_fails_alone(bench: Bench) -> None:
    await bench.known()
    await bench.held()
    waiting = [bench.start(n, v) for n, v in ((0, 1), (1, 13), (1, 2), (2, 3))]
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    with pytest.raises(InvalidRequest):
        await waiting[1]
    assert [(await waiting[n])["y"].item() for n in (0, 2, 3)] == [1, 4, 9]


async def test_cancelled_requests_leave(bench: Bench) -> None:
    await bench.known()
    await bench.held()
    waiting = [bench.start(n, 1) for n in range(4)]
    await asyncio.sleep(0.01)
    waiting[1].cancel()
    waiting[2].cancel()
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    assert (await waiting[0])["y"].item() == 1
    assert (await waiting[3])["y"].item() == 4
    assert bench.family.runs == [[1, 4]]
    assert waiting[1].cancelled()


async def test_a_family_that_answers_otherwise_is_left_alone(bench: Bench) -> None:
    bench.family.wrong = True
    company = bench.residents[0].company
    assert company is not None
    while not bench.family.runs:
        await asyncio.gather(*(bench.start(n, v) for n in range(5) for v in (1, 2)))
    await until(lambda: not any(copy.pins for copy in bench.copies))
    await bench.held()
    bench.family.runs.clear()
    waiting = [bench.start(n, 1) for n in range(5)]
    await asyncio.sleep(0.01)
    Tenant.gate.set()
    assert [result["y"].item() for result in await asyncio.gather(*waiting)] == [1, 2, 3, 4, 5]
    assert not bench.family.runs
    assert company.tried
    assert not any(company.tried.values())


async def test_who_asks_to_be_run_one_by_one_has_no_company(bench: Bench) -> None:
    alone = Resident(Tenant(9, bench.family), ModelSettings(one_by_one=True))
    bench.batcher.meet(alone)
    assert alone.company is None


def test_a_member_that_was_fast_when_it_was_tried_enters_the_loop() -> None:
    """Its first request like that one needs no thread, unless it was found slow a moment ago; a larger one does."""
    for size_bytes, fast_s, enters in ((900, 20e-6, True), (90_000, 20e-6, False), (900, 200e-6, False)):
        pace = Pace()
        batcher._enter(pace, size_bytes, 256, fast_s)
        assert pace.in_line == enters
    slow = Pace()
    slow.measured(0.01)
    batcher._enter(slow, 900, 256, 20e-6)
    assert not slow.in_line


def test_joint_runs_that_are_slower_stop_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    company, clock = Company(Fleet()), [100.0]
    monkeypatch.setattr("mesh.company.time.perf_counter", lambda: clock[0])
    paces = [Pace() for _ in range(4)]
    for pace in paces:
        pace.typical_s = 0.001
    assert company.pays(4)
    for _ in range(9):
        company.ran(paces, 0.008)
    assert not company.pays(4)
    assert company.pays(16)  # more at once may still be faster
    clock[0] += 31
    assert company.pays(4)
    company.ran(paces, 0.002)
    assert company.pays(4)
    assert not company.pays(1)


def test_on_the_loop_only_what_stays_fast() -> None:
    company = Company(Fleet())
    assert company.most_in_line(100e-6) == 2
    paces = [Pace() for _ in range(10)]
    company.ran(paces, 100e-6)
    assert company.most_in_line(100e-6) == 20


def registered(model_id: str, path: Path, declared: object) -> mm.RegisterModelRequest:
    key = json.dumps({"parameters": {"architecture": declared}})
    info = mm.ModelInfo(type="safetensors", path=str(path), key=key)
    return mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)


async def test_models_of_a_pod_that_are_asked_in_one_turn(
    one: One,  # noqa: F811
    tmp_path: Path,
) -> None:
    """End to end: a turn's requests to six tenants are one call; ids, rows and a tenant's mistakes stay its own."""
    declared = {"input": {"name": "x", "shape": [-1, 8]}, "layers": [{"linear": "0"}, "tanh", {"linear": "2"}]}
    modules = []
    for seed in range(6):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        path = tmp_path / f"{seed}.safetensors"
        save_file(module.state_dict(), path)
        modules.append(module)
        await one.mesh.clients["a"].call("registerModel", registered(f"t{seed}", path, declared))
        await one.known(request(f"t{seed}", {"x": rows(1)}))
    company = one.driver.resident("t0").company
    assert company is not None
    assert all(one.driver.resident(f"t{n}").company is company for n in range(6))

    for pace in (pace for paces in one.driver.in_line._paces.values() for pace in paces.values()):
        pace.typical_s = 10e-6

    await one.together(*(request(f"t{n}", {"x": rows(1)}) for n in range(6)))
    await until(lambda: bool(company.tried) and all(company.tried.values()))
    given = [rows(1) for _ in range(9)]
    asked = [request(f"t{n % 6}", {"x": x}, id=f"{n}") for n, x in enumerate(given)]
    before = sum(one.driver.batcher.joint.counts)
    answers = await one.together(*asked, request("t0", {"x": rows(1, 7)}))
    assert sum(one.driver.batcher.joint.counts) == before + 1
    for n, (said, x) in enumerate(zip(answers, given, strict=False)):
        assert not isinstance(said, str)
        assert (said.id, said.model_name) == (f"{n}", f"t{n % 6}")
        expected = modules[n % 6](torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(answer(said), expected, rtol=1e-4, atol=1e-5)
    assert str(answers[9]).startswith("INVALID_ARGUMENT")
    seen = await scrape(one.mesh, "a")
    assert seen["densemesh_joint_run_models_count", ""] == before + 1
