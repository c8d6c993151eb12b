"""Three pods in one process when pods, clients or the registry fail. Authority: docs/ARCHITECTURE.md."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from loaders.base import LoaderError, Tensor
from loaders.synthetic import SyntheticModel
from mesh.config import Config
from mesh.pod import Pod
from mesh.registry.memory import MemoryStore
from placement.records import CopyRecord, CopyStatus, PodRecord, encode
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.pods import TIMEOUT_S, Loads, Mesh, TroubledRegistry, request_for, running, until

Status = mm.ModelStatusInfo

THERE: list[tuple[str, str | bytes]] = [("densemesh-hop", "load"), ("densemesh-model-bin", b"m")]
"""Headers that have a pod load model `m` itself."""


@pytest.fixture
async def three(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads) as mesh:
        yield mesh


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Semaphore, threading.Event]:
    """(released once for every inference that begins, lets them end)"""
    begun, gate = threading.Semaphore(0), threading.Event()
    infer = SyntheticModel.infer

    def wait(model: SyntheticModel, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        begun.release()
        assert gate.wait(TIMEOUT_S)
        return infer(model, inputs, outputs)

    monkeypatch.setattr(SyntheticModel, "infer", wait)
    return begun, gate


async def on_b(mesh: Mesh) -> None:
    """Model `m`, loaded on `b` alone, as everybody knows."""
    await mesh.register("m")
    await mesh.clients["b"].call("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="m"), metadata=[])
    (holder,) = mesh.holders("m")
    if holder != "b":
        await mesh.clients["b"].call("ModelMetadata", v2.ModelMetadataRequest(name="m"), metadata=THERE)
        hit = [("densemesh-hop", "hit"), ("densemesh-model-bin", b"m")]
        unload = v2.RepositoryModelUnloadRequest(model_name="m")
        await mesh.clients[holder].call("RepositoryModelUnload", unload, metadata=hit)
    await mesh.seen_by_all("m", "b")
    assert mesh.holders("m") == ["b"]


# Pods that go


async def test_a_holder_that_is_gone_is_replaced_at_once(three: Mesh) -> None:
    await on_b(three)
    await three.crash("b")  # its lease still stands
    assert "b" in three.pods["a"].engine.view.pods
    served = await asyncio.gather(*(three.infer("m", "ac"[i % 2]) for i in range(20)))
    assert "b" not in served


async def test_the_lease_of_a_pod_that_is_gone_ends_and_takes_its_copies(three: Mesh) -> None:
    await on_b(three)
    await three.crash("b")
    for lease in three.registries["b"].sessions:
        three.store.expire(lease)
    await until(lambda: all("b" not in pod.engine.view.pods for pod in three.pods.values()))
    assert (await three.status("m")).status == Status.NOT_LOADED
    assert await three.infer("m", "c") in "ac"


async def test_a_drained_pod_ends_what_it_has_begun(
    three: Mesh, slow: tuple[threading.Semaphore, threading.Event]
) -> None:
    await on_b(three)
    begun, gate = slow
    running_there = [asyncio.create_task(three.infer("m", pod_id)) for pod_id in "ab"]
    for _ in running_there:
        assert await asyncio.to_thread(begun.acquire, timeout=TIMEOUT_S)
    leaving = asyncio.create_task(three.stop("b"))
    await until(lambda: "b" not in three.pods["a"].engine.view.pods)
    gate.set()
    assert await asyncio.gather(*running_there) == ["b", "b"]
    await leaving
    assert await three.infer("m", "a") in "ac"


async def test_draining_is_told_to_who_watches_health(three: Mesh) -> None:
    # grpc.health.v1: NOT_SERVING; and the stream does not hold up the pod's end
    watch = three.clients["c"].channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=TIMEOUT_S)
    assert await watch.read() == b"\x08\x01"
    leaving = asyncio.create_task(three.stop("c"))
    assert await watch.read() == b"\x08\x02"
    await leaving


# Clients that go


async def test_the_deadline_passes_during_a_load(three: Mesh) -> None:
    gate = three.loads.hold("m")
    await three.register("m")
    for pod_id in "abc":
        status, _ = await three.clients[pod_id].refusal("ModelInfer", request_for("m"), timeout_s=0.2)
        assert status == "DEADLINE_EXCEEDED"
    await until(lambda: three.pins() == 0)
    gate.set()
    await three.infer("m")
    assert three.loads.count("m") == 1  # the load went on


@pytest.mark.parametrize("asked", "ab")
async def test_a_copy_stays_pinned_until_the_abandoned_inference_has_ended(
    three: Mesh, slow: tuple[threading.Semaphore, threading.Event], asked: str
) -> None:
    await on_b(three)
    begun, gate = slow
    call = three.clients[asked].start("ModelInfer", request_for("m"))
    assert await asyncio.to_thread(begun.acquire, timeout=TIMEOUT_S)
    copy = three.pods["b"].engine.cache.copies["m"]
    assert copy.pins == 2  # the request, and the thread
    call.cancel()
    await until(lambda: copy.pins == 1)
    unloading = asyncio.create_task(
        three.clients["b"].call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="m"))
    )
    await until(lambda: not three.holders("m"))
    assert not unloading.done()  # its memory is still in use
    gate.set()
    await unloading
    assert copy.pins == 0


async def test_unregistered_during_an_inference(three: Mesh, slow: tuple[threading.Semaphore, threading.Event]) -> None:
    await on_b(three)
    begun, gate = slow
    under_way = asyncio.create_task(three.infer("m", "a"))
    assert await asyncio.to_thread(begun.acquire, timeout=TIMEOUT_S)
    await three.unregister("m", "c")
    assert (await three.clients["c"].refusal("ModelInfer", request_for("m")))[0] == "NOT_FOUND"
    gate.set()
    assert await under_way == "b"  # it was registered when the request came
    await until(lambda: not three.pods["b"].engine.cache.copies)


# The registry


async def test_a_pod_that_lost_its_lease_registers_anew(three: Mesh) -> None:
    await on_b(three)
    lost = three.registries["b"].sessions[-1]
    three.store.expire(lost)
    await until(lambda: three.registries["b"].sessions[-1] is not lost)
    await three.together()
    await three.seen_by_all("m", "b")
    assert await three.infer("m", "a") == "b"
    assert three.loads.count("m") <= 2  # none since


async def test_a_load_is_tried_on_three_pods_whatever_the_watch_has_told(loads: Loads) -> None:
    """`Limits.load_tries`. Found by the simulator (--drawn --seed 3003): a request whose pod's watch was behind went on
    to as many pods as it had attempts."""
    async with running("abcdef", loads) as mesh:
        await mesh.register("m")
        mesh.registries["a"].watching.clear()
        loads.failures = {pod_id: LoaderError("corrupt") for pod_id in mesh.pods}
        status, message = await mesh.clients["a"].refusal("ModelInfer", request_for("m"))
        assert (status, "corrupt" in message) == ("FAILED_PRECONDITION", True)
        assert loads.count("m") == 3
        mesh.registries["a"].watching.set()


async def test_without_the_registry_loaded_models_serve_and_management_is_unavailable(three: Mesh) -> None:
    await on_b(three)
    for registry in three.registries.values():
        registry.reachable = False
    assert {await three.infer("m", pod_id) for pod_id in "abc"} == {"b"}
    assert (await three.status("m")).status == Status.LOADED
    a = three.clients["a"]
    register = mm.RegisterModelRequest(modelId="n", modelInfo=mm.ModelInfo(type="synthetic"))
    for name, request in (
        ("registerModel", register),
        ("unregisterModel", mm.UnregisterModelRequest(modelId="m")),
        ("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="m")),
        ("deleteVModel", mm.DeleteVModelRequest(vModelId="v")),
        ("getModelStatus", mm.GetStatusRequest(modelId="n")),
        ("ModelInfer", request_for("n")),
    ):
        status, message = await a.refusal(name, request)
        assert (status, "registry does not answer" in message) == ("UNAVAILABLE", True), name
    for registry in three.registries.values():
        registry.reachable = True
    await three.register("n")
    await three.infer("n", "b")


async def test_a_pod_can_be_stopped_while_it_waits_for_the_registry(loads: Loads) -> None:
    registry = TroubledRegistry(MemoryStore())
    registry.reachable = False
    pod = Pod(Config(host="127.0.0.1", grpc_port=0, metrics_port=0, pod_id="a"), registry)
    life = asyncio.create_task(pod.run())
    await asyncio.wait([life], timeout=0.1)
    assert not life.done()
    pod.stop()
    await life
    assert not pod.serving.is_set()


# Records written by hand


async def test_a_pod_starts_and_serves_beside_records_it_cannot_read(loads: Loads) -> None:
    async with running("a", loads) as mesh:
        garbage = {
            "models/torn": b"{",
            "models/list": b"[]",
            "models/typed": b'{"format":5,"path":"/m"}',
            "models/binary": b"\xff\xfe\0",
            "models/": b"{}",
            "vmodels/torn": b"nonsense",
            "pods/torn": b"{}",
            "copies/torn": b"{}",
            "copies/a/torn": b"[1]",
            "unheard/of": b"{}",
        }
        mesh.store.write(garbage, ())
        await mesh.start("b")  # a snapshot with them; `a` meets them in its watch
        for pod_id in "ab":
            await mesh.register(pod_id, pod_id, load=True)
            await mesh.infer(pod_id, pod_id)
            status, _ = await mesh.clients[pod_id].refusal("ModelInfer", request_for("torn"))
            assert status == "NOT_FOUND"
        assert {pod.pod_id for pod in mesh.pods["a"].engine.view.pods.values()} == {"a", "b"}
        request = mm.RegisterModelRequest(modelId="torn", modelInfo=mm.ModelInfo(type="synthetic"))
        status, message = await mesh.clients["a"].refusal("registerModel", request)
        assert (status, "record cannot be read: 'models/torn'" in message) == ("FAILED_PRECONDITION", True)
        set_v = mm.SetVModelRequest(vModelId="torn", targetModelId="a")
        assert (await mesh.clients["a"].refusal("setVModel", set_v))[0] == "FAILED_PRECONDITION"
        await mesh.unregister("torn")
        await mesh.register("torn", load=True)
        await mesh.infer("torn", "b")


async def test_a_record_that_breaks_takes_its_model_away(three: Mesh) -> None:
    await on_b(three)
    three.store.write({"models/m": b"{"}, ())
    await until(lambda: not three.pods["b"].engine.cache.copies)
    assert (await three.clients["a"].refusal("ModelInfer", request_for("m")))[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b'{"format":"gguf","path":""}', "unknown model format 'gguf'"),
        (b'{"format":"synthetic","path":"","key":"{"}', "key is not JSON"),
        (b'{"format":"synthetic","path":"relative/path"}', "not absolute"),
    ],
)
async def test_a_readable_record_of_a_model_that_cannot_be(loads: Loads, value: bytes, says: str) -> None:
    async with running("a", loads) as mesh:
        mesh.store.write({"models/odd": value}, ())
        a = mesh.clients["a"]
        status, message = await a.refusal("ModelInfer", request_for("odd"))
        assert (status, says in message) == ("FAILED_PRECONDITION", True), message
        assert not (await a.call("ModelReady", v2.ModelReadyRequest(name="odd"))).ready
        (model,) = (await a.call("RepositoryIndex", v2.RepositoryIndexRequest())).models
        assert (model.name, model.state, says in model.reason) == ("odd", "UNAVAILABLE", True)


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1:1", "unix:///nowhere", "dns:///:::", "\u00fc:1"])
async def test_a_pod_that_is_not_there_but_says_it_holds_the_model(loads: Loads, address: str) -> None:
    async with running("a", loads) as mesh:
        ghost = PodRecord("ghost", address, capacity_bytes=1 << 50)
        copy = CopyRecord("m", "ghost", CopyStatus.LOADED, size_bytes=1)
        await mesh.register("m")
        mesh.store.write({"pods/ghost": encode(ghost), "copies/ghost/m": encode(copy)}, ())
        await until(lambda: "ghost" in mesh.pods["a"].engine.view.copies("m"))
        assert await mesh.infer("m") == "a"
