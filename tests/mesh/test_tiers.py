"""Tiers in real pods: disk below every pod, host memory and a device (`FakeDevice`, `HostDevice`) where there is one.
Authority: docs/ARCHITECTURE.md, "A load" and "Weights"; decision 7; issue 6, "Bad input gets"."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from loaders import LOADERS, Format
from loaders.base import Tensor
from loaders.memory.fake import FakeDevice, Fault
from loaders.storage.cache import Cache
from mesh.batcher import Batcher
from mesh.pod import Pod
from placement.holdings import HoldState
from placement.records import CopyStatus, Tier
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.loaders.dense_weights import ROWS, Dense, write_dense
from tests.loaders.object_server import ObjectServer, serving
from tests.loaders.weights_made import made, tensor
from tests.mesh.pods import Loads, Mesh, running, until
from tests.mesh.test_metrics import scrape
from tests.mesh.test_storage import Status, register, settings

KIB = 1 << 10
ONE = 256 * KIB
"""What a model of `write_dense` takes."""


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with serving() as server:
        for name in ("m", "n"):
            server.objects[f"{name}/model.synthetic.json"] = b'{"size_bytes": 5000}'
        yield server


def held(mesh: Mesh, model_id: str, tier: Tier, pod_id: str = "a") -> bool:
    holding = mesh.pods[pod_id].engine.copies.lower[tier].entries.get(model_id)
    return holding is not None and holding.state is HoldState.HELD


async def give_up(mesh: Mesh, model_id: str, pod_id: str = "a") -> None:
    """Have the device's copy given up, as for room."""
    await mesh.clients[pod_id].call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name=model_id))
    await until(lambda: model_id not in mesh.pods[pod_id].engine.cache.copies)


# Disk


async def test_what_was_fetched_is_held_on_disk_and_loaded_from_there_while_the_store_is_away(
    tmp_path: Path, server: ObjectServer
) -> None:
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        await register(mesh, "m", "synthetic", "m")
        assert held(mesh, "m", Tier.DISK)
        await give_up(mesh, "m")
        assert held(mesh, "m", Tier.DISK), "only the device's copy was to go"
        server.shutdown()
        server.server_close()
        assert await mesh.infer("m") == "a"
        assert server.gets("m/model.synthetic.json") == 1


async def test_a_pod_that_has_the_files_is_preferred(tmp_path: Path, server: ObjectServer) -> None:
    given: dict[str, Any] = {**settings(tmp_path, server)}
    mesh = Mesh(Loads())
    try:
        for pod_id in "abc":
            await mesh.start(pod_id, **given | {"cache_dir": str(tmp_path / pod_id)})
        await mesh.together()
        await register(mesh, "m", "synthetic", "m")
        (holder,) = mesh.holders("m")
        await mesh.clients["a"].call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="m"))
        others = [pod for pod_id, pod in mesh.pods.items() if pod_id != holder]

        def told() -> bool:
            copies = [pod.engine.view.copies("m").get(holder) for pod in others]
            return all(copy is not None and copy.status is CopyStatus.HELD for copy in copies)

        await until(told)
        assert await mesh.infer("m", others[0].pod_id) == holder
    finally:
        await mesh.close()


async def test_a_removed_model_gives_its_disk_back(tmp_path: Path, server: ObjectServer) -> None:
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        await register(mesh, "m", "synthetic", "m")
        await register(mesh, "same", "synthetic", "m")
        entries = {path for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        await mesh.unregister("m")
        await until(lambda: "m" not in mesh.pods["a"].engine.copies.lower[Tier.DISK].entries)
        assert {path for path in (tmp_path / "cache").iterdir() if path.is_dir()} == entries, "the other has them too"
        await give_up(mesh, "same")
        await mesh.unregister("same")
        await until(lambda: not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()])


async def test_what_another_pod_of_the_node_took_from_the_disk_is_noticed(
    tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.driver._LOOK_S", 0.05)
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        await register(mesh, "m", "synthetic", "m")
        await give_up(mesh, "m")
        other = Cache(tmp_path / "cache", 30, threading.Event())
        other.get("0" * 64, 20, lambda folder, _: (folder / "files").mkdir()).close()
        other.close()
        await until(lambda: not mesh.pods["a"].engine.copies.lower[Tier.DISK].entries)
        assert await mesh.infer("m") == "a"
        assert (server.gets("m/model.synthetic.json"), held(mesh, "m", Tier.DISK)) == (2, True)


# Host and device


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Weights]:
    monkeypatch.setitem(LOADERS, "dense", Format("tests.loaders.dense_weights:DenseLoader", (".weights",)))
    monkeypatch.setattr(Dense, "open", 0)
    yield Weights(tmp_path)
    assert Dense.open == 0, "nothing is left of models that are gone"


class Weights:
    """Models, and what they answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of: dict[str, Tensor] = {}

    async def register(
        self, mesh: Mesh, *model_ids: str, columns: int = 1024, like: str = "", load: bool = True
    ) -> mm.ModelStatusInfo:
        """`like`: with the weights of another."""
        for model_id in model_ids:
            path = self.folder / f"{model_id}.weights"
            seed = list(self.of).index(like) if like else len(self.of)
            self.of[model_id] = write_dense(path, seed, columns)
            info = mm.ModelInfo(type="dense", path=str(path))
            request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)
            pod_id = next(iter(mesh.pods))
            status = await mesh.clients[pod_id].call("registerModel", request)
        assert isinstance(status, mm.ModelStatusInfo)
        return status

    async def infer(self, mesh: Mesh, model_id: str, pod_id: str = "a") -> str:
        """The pod that served it, rightly."""
        x = np.random.default_rng(7).standard_normal((1, ROWS)).astype(np.float32)
        request = v2.ModelInferRequest(model_name=model_id, raw_input_contents=[x.tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        answer, headers = await mesh.clients[pod_id].call_for_headers("ModelInfer", request)
        found = np.frombuffer(answer.raw_output_contents[0], np.float32)
        np.testing.assert_allclose(found, (x @ self.of[model_id])[0], rtol=1e-4, atol=1e-4)
        return headers["densemesh-pod"]


@asynccontextmanager
async def with_device(dense: Weights, pods: str = "a", models: int = 2, **more: Any) -> AsyncIterator[Mesh]:
    """Pods whose devices hold so many models; the books of engine and store agree in the end."""
    told = {"device": "fake", "device_memory": f"{models * ONE}B", "load_slots": 1, **more}
    async with running(pods, Loads(), **told) as mesh:
        yield mesh
        for pod in mesh.pods.values():
            await until(lambda pod=pod: agree(pod))  # type: ignore[misc]


def agree(pod: Pod) -> bool:
    """Whether the engine's books say what lies in the store's tiers."""
    assert pod.store is not None
    lower = pod.engine.copies.lower
    host_bytes = lower[Tier.HOST].resident_bytes if Tier.HOST in lower else 0
    taken = pod.store.usage(pod.store.device).taken_bytes, pod.store.usage(pod.store.host).taken_bytes
    return taken == (pod.engine.cache.resident_bytes, host_bytes)


def device_of(mesh: Mesh, pod_id: str = "a") -> FakeDevice:
    store = mesh.pods[pod_id].store
    assert store is not None
    assert isinstance(store._port, FakeDevice)
    return store._port


async def test_status_and_metrics_tell_each_tiers_books_with_shared_bytes_once(dense: Weights) -> None:
    async with with_device(dense, models=3, host_memory=f"{2 * ONE}B") as mesh:
        await dense.register(mesh, "m0", "m1", "m2", "m3")
        await dense.register(mesh, "twin", like="m3")
        state = await mesh.clients["a"].call("GetMemory", mm.GetMemoryRequest())
        device, host, disk = state.tiers
        assert (device.name, device.capacity_bytes, device.loaded_bytes) == ("device", 3 * ONE, 3 * ONE)
        assert (device.free_bytes, device.shared_bytes) == (0, ONE)
        assert (host.name, host.capacity_bytes, host.loaded_bytes) == ("host", 2 * ONE, 2 * ONE)
        assert (disk.name, disk.loaded_bytes) == ("disk", 0)
        held = {(model.model_id, model.tier): (model.state, model.charged_bytes) for model in state.models}
        assert held == {
            ("m0", "host"): ("held", ONE),
            ("m1", "host"): ("held", ONE),
            ("m2", "device"): ("loaded", ONE),
            ("m3", "device"): ("loaded", ONE),
            ("twin", "device"): ("loaded", 0),
        }
        seen = await scrape(mesh, "a")
        assert seen["densemesh_tier_bytes", "loaded,device"] == 3 * ONE
        assert seen["densemesh_tier_shared_bytes", "device"] == ONE
        assert seen["densemesh_tier_capacity_bytes", "host"] == 2 * ONE
        assert seen["densemesh_tenant_bytes", ",device"] == 2 * ONE
        assert seen["densemesh_memory_alarm", ""] == 0
        await mesh.unregister("twin")


async def test_books_that_differ_from_what_lies_there_raise_an_alarm(
    dense: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.driver._LOOK_S", 0.02)
    async with with_device(dense) as mesh:
        await dense.register(mesh, "m")
        store = mesh.pods["a"].store
        assert store is not None
        assert await alarms(mesh) == []
        store.load("foreign", made([tensor(1)]))
        await until_alarm(mesh, f"{ONE + 64 * KIB} bytes of models lie on the device, {ONE} by the books")
        store.drop("foreign", store.device)
        monkeypatch.setattr("mesh.memory.private_bytes", lambda: 1 << 40)
        await until_alarm(mesh, f"the process has {1 << 40} bytes resident")
        monkeypatch.setattr("mesh.memory.private_bytes", lambda: 1 << 20)
        await until_alarm(mesh, "")


async def alarms(mesh: Mesh) -> list[str]:
    """Of the last check; after the first."""
    while True:
        state = await mesh.clients["a"].call("GetMemory", mm.GetMemoryRequest())
        if state.check.expected_bytes:
            return list(state.check.alarms)


async def until_alarm(mesh: Mesh, says: str) -> None:
    """Return when that is the only alarm; empty: when there is none."""
    async with asyncio.timeout(30):
        while True:
            told = await alarms(mesh)
            if [says in alarm for alarm in told] == [True] * bool(says):
                assert (await scrape(mesh, "a"))["densemesh_memory_alarm", ""] == len(told)
                return


@pytest.mark.parametrize("mode", ["exclusive", "inclusive"])
@pytest.mark.parametrize("device", ["fake", "host"])
async def test_models_go_through_host_and_device_and_answer_the_same(dense: Weights, mode: str, device: str) -> None:
    names = [f"m{n}" for n in range(5)]
    async with with_device(dense, device=device, host_memory=f"{6 * ONE}B", host_mode=mode) as mesh:
        await dense.register(mesh, *names)
        for _ in range(2):
            for name in names:
                assert await dense.infer(mesh, name) == "a"
        moved = mesh.pods["a"].engine.stats.moved_bytes
        assert moved[None, Tier.DEVICE] == 5 * ONE, "each was read from its file once"
        assert moved[Tier.HOST, Tier.DEVICE] >= 8 * ONE
        assert (moved[Tier.DEVICE, Tier.HOST] > 0) == (mode == "exclusive")
        assert (moved[None, Tier.HOST] > 0) == (mode == "inclusive")
        assert Dense.open == 5
        pod = mesh.pods["a"]
        held_there = [name for name in names if held(mesh, name, Tier.HOST)]
        assert len(held_there) == (5 if mode == "inclusive" else 3)
        for name in names:
            await mesh.unregister(name)
        await until(lambda: agree(pod) and not pod.engine.cache.resident_bytes)


async def test_requests_that_wait_for_a_swap_run_together(
    dense: Weights, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed hits. Four threads are idle, so there are four runs; found to be rowwise the model was before."""
    monkeypatch.setattr(Batcher, "may_batch", lambda *_: True)
    async with with_device(dense, models=1, host_memory=f"{2 * ONE}B") as mesh:
        await dense.register(mesh, "m", "other")
        before = (await scrape(mesh, "a"))["densemesh_batch_size_count", ""]
        made_before, copies, gate = Dense.open, mesh.pods["a"].engine.cache.copies, loads.hold("m")
        waiting = [asyncio.create_task(dense.infer(mesh, "m")) for _ in range(12)]
        await until(lambda: "m" in copies and copies["m"].pins == 12)
        gate.set()
        await asyncio.gather(*waiting)
        assert (await scrape(mesh, "a"))["densemesh_batch_size_count", ""] - before == 4
        assert mesh.pods["a"].engine.stats.moved_bytes[Tier.HOST, Tier.DEVICE] == ONE
        assert made_before == Dense.open


# What goes wrong (issue 6, "Bad input gets"): one clear status each, and others are served on


async def refusal(dense: Weights, mesh: Mesh, model_id: str) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await dense.infer(mesh, model_id)
    return caught.value.code().name, caught.value.details() or ""


@pytest.mark.parametrize("mode", ["exclusive", "inclusive"])
async def test_a_host_without_room_for_a_model_costs_a_copy_and_no_request(dense: Weights, mode: str) -> None:
    async with with_device(dense, host_memory=f"{ONE // 2}B", host_mode=mode) as mesh:
        await dense.register(mesh, "m0", "m1", "m2")
        for name in ("m0", "m1", "m2", "m0"):
            assert await dense.infer(mesh, name) == "a"
        assert not held(mesh, "m1", Tier.HOST)


async def test_an_arena_that_is_all_in_use_is_told(dense: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        begun.release()
        assert may_end.wait(30)

    async with with_device(dense, models=1) as mesh:
        await dense.register(mesh, "busy")
        await dense.register(mesh, "m", load=False)
        limits = mesh.pods["a"].engine.limits
        object.__setattr__(limits, "queue_patience_ms", 0)
        monkeypatch.setattr(Dense, "on_run", staticmethod(wait))
        running_request = asyncio.create_task(dense.infer(mesh, "busy"))
        await asyncio.to_thread(begun.acquire)
        code, says = await refusal(dense, mesh, "m")
        assert (code, f"no room for {ONE} bytes" in says) == ("RESOURCE_EXHAUSTED", True)
        may_end.set()
        assert await running_request == "a"


async def test_where_the_arena_has_less_than_the_books_say_others_go_and_it_is_tried_again(dense: Weights) -> None:
    async with with_device(dense, models=3) as mesh:
        store = mesh.pods["a"].store
        assert store is not None
        store.load("foreign", made([tensor(1)]))
        await dense.register(mesh, "m0", "m1")
        assert (await dense.register(mesh, "m2")).status == Status.LOADED
        assert sorted(name for name in ("m0", "m1", "m2") if mesh.holders(name)) == ["m1", "m2"]
        assert mesh.pods["a"].engine.stats.evictions == 1
        store.drop("foreign", store.device)


async def test_a_model_larger_than_the_device_is_refused_for_good(dense: Weights) -> None:
    async with with_device(dense) as mesh:
        status = await dense.register(mesh, "large", columns=4096)
        assert status.status == Status.LOADING_FAILED
        assert f"needs {4 * ONE} bytes; this pod holds {2 * ONE} bytes" in status.errors[0]
        assert (await dense.register(mesh, "m")).status == Status.LOADED


async def test_a_copy_that_fails_is_this_models_failure_and_may_pass(dense: Weights) -> None:
    async with with_device(dense) as mesh:
        object.__setattr__(mesh.pods["a"].engine.limits, "retryable_expiry_ms", 100)
        await dense.register(mesh, "m")
        await dense.register(mesh, "n", load=False)
        device_of(mesh).faults.append(Fault.FAILS)
        code, says = await refusal(dense, mesh, "n")
        assert (code, "the copy failed" in says) == ("UNAVAILABLE", True)
        assert await dense.infer(mesh, "m") == "a"
        await until(lambda: "n" not in mesh.pods["a"].engine.cache.copies)
        assert await dense.infer(mesh, "n") == "a"


async def test_a_lost_device_is_fenced_its_models_go_elsewhere_and_the_pod_serves_the_rest(dense: Weights) -> None:
    async with with_device(dense, "ab", models=4, host_memory=f"{2 * ONE}B") as mesh:
        await mesh.register("plain", load=True, size_bytes=1000)
        await dense.register(mesh, "m0", "m1", "m2", load=False)
        lost = mesh.holders("plain")[0]
        other = "b" if lost == "a" else "a"
        store = mesh.pods[lost].store
        assert store is not None
        for name in ("m0", "m1"):
            asked = mm.EnsureLoadedRequest(modelId=name, sync=True)
            told = (("densemesh-hop", "load"), ("densemesh-model", name))
            await mesh.clients[lost].call("ensureLoaded", asked, metadata=told)
        device_of(mesh, lost).lost = True
        store.lost = "the device is gone"
        await until(lambda: not any(lost in mesh.holders(name) for name in ("m0", "m1", "m2")))
        for name in ("m0", "m1", "m2"):
            assert await dense.infer(mesh, name, lost) == other
        assert lost in mesh.holders("plain")
        assert await mesh.infer("plain", lost) == lost
        state = await mesh.clients[lost].call("GetMemory", mm.GetMemoryRequest())
        assert state.device_lost == "the device is gone"
        assert (await scrape(mesh, lost))["densemesh_memory_device_lost", ""] == 1
        await mesh.unregister("plain")


async def test_a_damaged_file_in_the_cache_is_fetched_again(dense: Weights, tmp_path: Path) -> None:
    w = write_dense(tmp_path / "model.weights", 1)
    with serving() as server:
        server.objects["m/model.weights"] = (tmp_path / "model.weights").read_bytes()
        told: dict[str, Any] = {**settings(tmp_path, server)}
        async with with_device(dense, **told) as mesh:
            assert (await register(mesh, "m", "dense", "m")).status == Status.LOADED
            dense.of["m"] = w
            assert await dense.infer(mesh, "m") == "a"
            await give_up(mesh, "m")
            (cached,) = (tmp_path / "cache").glob("*/files/model.weights")
            data = bytearray(cached.read_bytes())
            data[5000] ^= 1
            cached.write_bytes(data)
            assert await dense.infer(mesh, "m") == "a"
            assert server.gets("m/model.weights") == 2
            assert held(mesh, "m", Tier.DISK)


@pytest.mark.parametrize("times", [1, 2])
async def test_memory_that_runs_out_in_a_load(dense: Weights, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    async with with_device(dense) as mesh:
        await dense.register(mesh, "m0", "m1")
        store = mesh.pods["a"].store
        assert store is not None
        left, load = [None] * times, store.load

        def out_of_memory(*arguments: Any) -> None:
            if left:
                left.pop()
                raise MemoryError
            load(*arguments)

        monkeypatch.setattr(store, "load", out_of_memory)
        await mesh.unregister("m0")
        status = await dense.register(mesh, "m2")
        if times == 1:
            assert status.status == Status.LOADED
        else:
            assert status.status == Status.LOADING_FAILED
            assert "out of memory" in status.errors[0]
        assert not mesh.holders("m1"), "it went for it"
        assert not left


async def test_memory_that_runs_out_in_a_run(dense: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    async with with_device(dense) as mesh:
        await dense.register(mesh, "m0", "m1")
        monkeypatch.setattr(Dense, "on_run", staticmethod(out_of_memory))
        code, says = await refusal(dense, mesh, "m1")
        assert (code, "memory ran out in the run" in says) == ("RESOURCE_EXHAUSTED", True)
        await until(lambda: not mesh.holders("m0"))
        monkeypatch.setattr(Dense, "on_run", staticmethod(lambda: None))
        assert await dense.infer(mesh, "m1") == "a"
