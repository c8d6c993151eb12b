"""Three pods in one process: where requests go. Authority: docs/ARCHITECTURE.md, A request and A load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from loaders.base import LoaderError
from mesh.router import Router
from mesh.rpc import Call, Metadata
from placement.messages import Hop
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.pods import ROW, Loads, Mesh, request_for, running

Status = mm.ModelStatusInfo


@pytest.fixture
async def three(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads) as mesh:
        yield mesh


async def test_a_model_is_served_through_every_pod_by_the_one_that_holds_it(three: Mesh) -> None:
    await three.register("m", load=True)
    (holder,) = three.holders("m")
    await three.seen_by_all("m", holder)
    assert [await three.infer("m", pod_id) for pod_id in "abc"] == [holder] * 3
    assert three.loads.count("m") == 1


async def test_models_spread_over_pods(three: Mesh) -> None:
    models = [f"m{i}" for i in range(24)]
    for model_id in models:
        await three.register(model_id)
    await asyncio.gather(*(three.infer(model_id, "abc"[i % 3]) for i, model_id in enumerate(models)))
    held = {pod_id: pod.engine.cache.committed_bytes for pod_id, pod in three.pods.items()}
    assert sum(held.values()) == 24 << 20
    assert min(held.values()) > 0
    assert len(three.loads.seen) == 24


async def test_requests_from_everywhere_share_one_load(three: Mesh) -> None:
    gate = three.loads.hold("m")
    await three.register("m")
    asked = [asyncio.create_task(three.infer("m", "abc"[i % 3])) for i in range(60)]
    await three.loads.begun()
    asked += [asyncio.create_task(three.infer("m", "abc"[i % 3])) for i in range(60)]
    gate.set()
    served = await asyncio.gather(*asked)
    assert three.loads.count("m") == 1
    assert set(served) == set(three.holders("m"))
    assert sum(pod.engine.stats.joins for pod in three.pods.values()) > 0


async def test_a_vmodel_is_served_through_every_pod_under_its_name(three: Mesh) -> None:
    await three.register("m", load=True)
    await three.clients["a"].call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="m"))
    served = {await three.infer("v", pod_id) for pod_id in "abc"}  # checks the response's model_name
    assert served == set(three.holders("m"))


async def test_metadata_is_forwarded_as_inference_is(three: Mesh) -> None:
    await three.register("m")
    for pod_id in "abc":
        told = await three.clients[pod_id].call("ModelMetadata", v2.ModelMetadataRequest(name="m"))
        assert (told.name, told.platform) == ("m", "synthetic")
    assert three.loads.count("m") == 1


# Hops


@pytest.mark.parametrize(("hop", "reason"), [("hit", "not-here"), ("nonsense", "not-here")])
async def test_what_a_pod_sent_to_a_holder_is_never_sent_on(three: Mesh, hop: str, reason: str) -> None:
    await three.register("m", load=True)
    (holder,) = three.holders("m")
    other = next(pod_id for pod_id in "abc" if pod_id != holder)
    await three.seen_by_all("m", holder)
    metadata = [("densemesh-hop", hop), ("densemesh-model-bin", b"m")]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await three.clients[other].call("ModelInfer", request_for("m"), metadata=metadata)
    assert error.value.code().name == "UNAVAILABLE"
    assert dict(error.value.trailing_metadata())["densemesh-reason"] == reason
    assert three.holders("m") == [holder]


async def test_what_a_pod_sent_to_be_loaded_is_loaded_there(three: Mesh) -> None:
    await three.register("m")
    for pod_id in "abc":
        metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "load"), ("densemesh-model-bin", b"m")]
        assert await three.infer("m", pod_id, metadata=metadata) == pod_id
    assert three.holders("m") == ["a", "b", "c"]


async def test_a_forward_carries_the_clients_headers(three: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client sent them, `-bin` values and repeated keys too; those of its connection to us stay here."""
    came: list[tuple[str, Metadata]] = []
    model_of = Router.model_of

    async def seen(
        router: Router, call: Call, message: bytes, field_number: int, *, splits: bool = False
    ) -> tuple[str, Hop]:
        came.append((call.method, call.metadata))
        return await model_of(router, call, message, field_number, splits=splits)

    await three.register("m", load=True)
    (holder,) = three.holders("m")
    await three.seen_by_all("m", holder)
    other = next(pod_id for pod_id in "abc" if pod_id != holder)
    await three.infer("m", other)  # the first one opens the connection
    given: list[tuple[str, str | bytes]] = [
        *(("tenant", "t"), ("traceparent", "00-1"), ("x-bin", b"\xff\x00"), ("x-bin", b""), ("x-again", "2")),
        *(("x-again", "1"), ("authorization", "Bearer " + "x" * 300)),
    ]
    monkeypatch.setattr(Router, "model_of", seen)
    for _ in range(3):
        came.clear()
        await three.infer("m", other, metadata=given)
        ((method, headers),) = came  # the forwarder's handler did not run
        assert method == "/inference.GRPCInferenceService/ModelInfer"
        own = [("densemesh-hop", "hit"), ("densemesh-model-bin", b"m")]
        assert sorted(pair for pair in headers if pair[0] != "densemesh-created") == sorted([*given, *own])
        assert [value for key, value in headers if key == "x-again"] == ["2", "1"]
        created = dict(headers)["densemesh-created"]
        assert created == str(three.pods[other].engine.view.models["m"].created)


async def test_a_forward_that_finds_nothing_is_routed_again(three: Mesh) -> None:
    await three.register("m", load=True)
    (holder,) = three.holders("m")
    await three.seen_by_all("m", holder)
    other = next(pod_id for pod_id in "abc" if pod_id != holder)
    three.registries[other].watching.clear()  # from now on it believes what it has seen
    metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "hit"), ("densemesh-model-bin", b"m")]
    unload = v2.RepositoryModelUnloadRequest(model_name="m")
    await three.clients[holder].call("RepositoryModelUnload", unload, metadata=metadata)
    assert three.holders("m") == []
    assert await three.infer("m", other) != holder
    assert three.pods[other].engine.stats.retries == 1
    three.registries[other].watching.set()


# Loads that fail


def fail(loads: Loads, *pod_ids: str, retryable: bool = False) -> None:
    for pod_id in pod_ids:
        loads.failures[pod_id] = LoaderError(f"torn on {pod_id}", retryable=retryable)


@pytest.mark.parametrize("asked", "abc")
async def test_a_load_that_fails_is_tried_elsewhere(three: Mesh, asked: str) -> None:
    await three.register("m")
    fail(three.loads, "a", "b")
    assert await three.infer("m", asked) == "c"
    pods = [pod for pod, _ in three.loads.seen]
    assert (pods[-1], len(set(pods))) == ("c", len(pods))  # none was tried twice


@pytest.mark.parametrize(("retryable", "status"), [(False, "FAILED_PRECONDITION"), (True, "UNAVAILABLE")])
async def test_a_load_that_fails_everywhere_says_why(three: Mesh, retryable: bool, status: str) -> None:
    await three.register("m")
    fail(three.loads, *"abc", retryable=retryable)
    found, message = await three.clients["b"].refusal("ModelInfer", request_for("m"))
    assert found == status
    assert "model 'm' cannot be loaded: " in message
    assert "torn on" in message
    assert sorted(pod for pod, _ in three.loads.seen) == ["a", "b", "c"]
    found, _ = await three.clients["a"].refusal("ModelInfer", request_for("m"))
    assert (found, three.loads.count("m")) == (status, 3)  # remembered


async def test_a_load_is_tried_on_three_pods_at_most(three: Mesh) -> None:
    await three.start("d")
    await three.together()
    await three.register("m")
    fail(three.loads, *"abcd")
    assert (await three.clients["d"].refusal("ModelInfer", request_for("m")))[0] == "FAILED_PRECONDITION"
    assert three.loads.count("m") == 3


async def test_unload_gives_up_every_copy_and_load_brings_one_back(three: Mesh) -> None:
    await three.register("m")
    metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "load"), ("densemesh-model-bin", b"m")]
    for pod_id in "ab":
        await three.infer("m", pod_id, metadata=metadata)
    for pod_id in "ab":
        await three.seen_by_all("m", pod_id)
    await three.clients["c"].call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="m"))
    assert three.holders("m") == []
    await three.clients["c"].call("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="m"))
    assert len(three.holders("m")) == 1


async def test_unload_says_when_a_holder_cannot_be_told(three: Mesh) -> None:
    metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "load"), ("densemesh-model-bin", b"m")]
    await three.register("m")
    await three.infer("m", "b", metadata=metadata)
    await three.seen_by_all("m", "b")
    await three.crash("b")
    unload = v2.RepositoryModelUnloadRequest(model_name="m")
    assert (await three.clients["a"].refusal("RepositoryModelUnload", unload))[0] == "UNAVAILABLE"


# A model registered anew


async def test_a_holder_whose_watch_is_behind_does_not_answer_from_what_was(three: Mesh) -> None:
    async def register(version: str) -> Any:
        info = mm.ModelInfo(type="synthetic", key=f'{{"version":"{version}"}}')
        return await three.clients["a"].call("registerModel", mm.RegisterModelRequest(modelId="m", modelInfo=info))

    await register("1")
    metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "load"), ("densemesh-model-bin", b"m")]
    await three.infer("m", "b", metadata=metadata)
    await three.seen_by_all("m", "b")
    three.registries["b"].watching.clear()
    await three.unregister("m")
    await register("2")
    answer = await three.clients["a"].call("ModelInfer", request_for("m"))
    assert (answer.model_version, answer.raw_output_contents) == ("2", [ROW])
    three.registries["b"].watching.set()
