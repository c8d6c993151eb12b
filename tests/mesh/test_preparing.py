"""Pods that prepare (`loaders.prepare`): the first load is the model as it was written, at once; the form that was made
meanwhile takes its place, and no request is lost. Authority: docs/ARCHITECTURE.md, "Preparation"."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.prepare import FORMS, PREPARERS, Preparer
from mesh.preparing import Preparing
from placement.records import ModelRecord
from protos import management_pb2 as mm
from tests.loaders.preparers import FORM
from tests.mesh.pods import ROW, TIMEOUT_S, Loads, Mesh, request_for, running, until
from tests.mesh.test_metrics import scrape


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparer for synthetic models, which have none of their own."""
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer("tests.loaders.preparers:copy", FORM, ("numpy",)))
    monkeypatch.setitem(FORMS, FORM, "tests.loaders.preparers:CopiedLoader")


def written(folder: Path, text: str = '{"size_bytes": 5000}') -> Path:
    path = folder / "model.synthetic.json"
    path.write_text(text)
    return path


def jobs(path: Path) -> int:
    told = path.with_name("jobs")
    return len(told.read_text().split()) if told.exists() else 0


async def register(mesh: Mesh, model_id: str, path: Path, pod_id: str = "a", *, load: bool = True) -> None:
    info = mm.ModelInfo(type="synthetic", path=str(path), key="")
    request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)
    await mesh.clients[pod_id].call("registerModel", request)


async def served_prepared(mesh: Mesh, model_id: str, pod_id: str = "a") -> None:
    """Return when the model's copy on a pod is a prepared one: it is as large as the file, and not as it says."""

    def is_prepared() -> bool:
        copy = mesh.pods[pod_id].engine.cache.copies.get(model_id)
        return mesh.holders(model_id) == [pod_id] and copy is not None and copy.size_bytes == 20

    await until(is_prepared)


async def test_the_prepared_form_takes_the_place_of_the_first_load(tmp_path: Path, loads: Loads) -> None:
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        path, stop = written(tmp_path), asyncio.Event()
        await register(mesh, "m", path)
        assert mesh.pods["a"].engine.cache.copies["m"].size_bytes == 5000
        served = 0

        async def keep_asking() -> None:
            nonlocal served
            while not stop.is_set():
                answer = await mesh.clients["a"].call("ModelInfer", request_for("m"))
                assert answer.raw_output_contents == [ROW]
                served += 1

        async with asyncio.TaskGroup() as clients:
            for _ in range(4):
                clients.create_task(keep_asking())
            await served_prepared(mesh, "m")
            before = served
            await until(lambda: served > before + 20)
            stop.set()
        assert (jobs(path), loads.count("m")) == (1, 2)
        seen = await scrape(mesh, "a")
        assert seen["densemesh_preparations_total", "synthetic,prepared"] == 1
        assert seen["densemesh_preparation_seconds_total", "synthetic"] > 0


async def test_another_pod_and_a_restart_take_what_is_there(tmp_path: Path, loads: Loads) -> None:
    settings = {"prepare": True, "cache_dir": str(tmp_path / "cache")}
    path = written(tmp_path)
    async with running("a", loads, **settings) as mesh:
        await register(mesh, "m", path)
        await served_prepared(mesh, "m")
        before = mesh.pods["a"].engine.cache.copies["m"].used_ms
        await mesh.infer("m")
        assert mesh.pods["a"].engine.cache.copies["m"].used_ms >= before
        await register(mesh, "same-bytes", path)
        await served_prepared(mesh, "same-bytes")
        assert loads.count("same-bytes") == 1
    async with running("b", loads, **settings) as mesh:
        await register(mesh, "m", path, "b")
        await served_prepared(mesh, "m", "b")
        assert loads.count("m") == 3
    assert jobs(path) == 1


async def test_what_cannot_be_prepared_is_served_as_it_is(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer("tests.loaders.preparers:refuse", FORM, ("numpy",)))
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        await register(mesh, "m", path := written(tmp_path))
        await until(lambda: jobs(path) == 1)
        await register(mesh, "same-bytes", path)
        assert await mesh.infer("m") == await mesh.infer("same-bytes") == "a"
        (tmp_path / "other").mkdir()
        await register(mesh, "other-bytes", last := written(tmp_path / "other", '{"size_bytes": 6000}'))
        await until(lambda: jobs(last) == 1)
        assert jobs(path) == 1
        assert [loads.count(model_id) for model_id in ("m", "same-bytes", "other-bytes")] == [1, 1, 1]
        assert (await scrape(mesh, "a"))["densemesh_preparations_total", "synthetic,refused"] >= 1


async def test_nothing_is_prepared_unasked(tmp_path: Path, loads: Loads) -> None:
    path = written(tmp_path)
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        await register(mesh, "m", path, load=False)
    async with running("a", loads, prepare=False, cache_dir=str(tmp_path / "cache")) as mesh:
        await register(mesh, "m", path)
    assert jobs(path) == 0
    assert not (tmp_path / "cache").exists()


async def test_a_model_that_was_given_up_meanwhile_is_not_brought_back(tmp_path: Path, loads: Loads) -> None:
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        path = written(tmp_path)
        await register(mesh, "m", path)
        await mesh.unregister("m")
        await until(lambda: not mesh.pods["a"].engine.cache.copies)
        await register(mesh, "next", written(tmp_path, '{"size_bytes":  5001}'))
        await until(lambda: loads.count("next") == 2)
        assert loads.count("m") == 1


async def test_a_damaged_form_is_dropped_and_made_again(tmp_path: Path, loads: Loads) -> None:
    settings = {"prepare": True, "cache_dir": str(tmp_path / "cache")}
    path = written(tmp_path)
    async with running("a", loads, **settings) as mesh:
        await register(mesh, "m", path)
        await served_prepared(mesh, "m")
    (form,) = (tmp_path / "cache" / "prepared").glob("*/files/copy")
    form.write_bytes(b"damaged".ljust(20))
    async with running("a", loads, **settings) as mesh:
        await register(mesh, "m", path)
        await served_prepared(mesh, "m")
        assert await mesh.infer("m") == "a"
    assert jobs(path) == 2
    assert form.read_bytes() == path.read_bytes()


async def test_a_pod_stops_in_the_middle_of_a_job(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer("tests.loaders.preparers:hang", FORM, ("numpy",)))
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        await register(mesh, "m", path := written(tmp_path))
        await until(lambda: jobs(path) == 1)
        assert await mesh.infer("m") == "a"
    assert not list((tmp_path / "cache" / "prepared").glob("*.partial"))


async def test_explain_tells_the_form_and_why_there_is_none(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_better, ended = Preparing.has_better, asyncio.Queue[str]()

    async def watched(self: Preparing, model: ModelRecord, is_wanted: Callable[[], bool]) -> bool:
        found = await has_better(self, model, is_wanted)
        ended.put_nowait(model.model_id)
        return found

    monkeypatch.setattr(Preparing, "has_better", watched)
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:

        async def told(model_id: str) -> str:
            answer = await mesh.clients["a"].call("Explain", mm.ExplainRequest(model_id=model_id))
            return str(answer.reasons[-1])

        await register(mesh, "m", written(tmp_path))
        await served_prepared(mesh, "m")
        assert await told("m") == f"here it is served in a prepared form: {FORM}"
        monkeypatch.setitem(PREPARERS, "synthetic", Preparer("tests.loaders.preparers:refuse", FORM, ("numpy",)))
        await register(mesh, "plain", written(tmp_path, '{"size_bytes": 6000}'))
        async with asyncio.timeout(TIMEOUT_S):
            while await ended.get() != "plain":
                pass
        assert await told("plain") == "here it is served as it was written, not prepared: nothing has a copy"
