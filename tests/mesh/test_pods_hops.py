"""Hops of real pods: large messages, and both front ends alike. Authority: docs/ARCHITECTURE.md, Forward."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import numpy as np
import pytest

from mesh.frontends import FRONTENDS
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.pods import Loads, Mesh, running


@pytest.fixture(params=FRONTENDS)
async def three(request: pytest.FixtureRequest, loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads, frontend=request.param, max_message="4MiB") as mesh:
        yield mesh


def large(model_id: str, floats: int = 200_000) -> v2.ModelInferRequest:
    row = np.arange(floats, dtype="<f4").tobytes()
    request = v2.ModelInferRequest(model_name=model_id, id="7", raw_input_contents=[row])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, floats])
    return request


async def through_a_hop(mesh: Mesh, model_id: str = "m") -> tuple[str, str]:
    """The pod that has the model loaded, and one that forwards to it and is connected to it."""
    await mesh.register(model_id, load=True)
    (holder,) = mesh.holders(model_id)
    await mesh.seen_by_all(model_id, holder)
    other = next(pod_id for pod_id in mesh.pods if pod_id != holder)
    assert await mesh.infer(model_id, other) == holder
    return holder, other


async def test_answers_and_refusals_are_the_holders(three: Mesh) -> None:
    """The same through a hop as asked directly, with every front end."""
    holder, other = await through_a_hop(three)
    wrong = large("m")
    wrong.inputs[0].shape[1] += 1
    unnamed = large("")
    requests = [large("m"), large("m", 5_000), large("m", 3), wrong, large("unknown"), unnamed, large("m", 2_000_000)]
    found: dict[str, list[object]] = {holder: [], other: []}
    for pod_id, seen in found.items():
        for request in requests:
            try:
                answer, headers = await three.clients[pod_id].call_for_headers("ModelInfer", request)
                assert headers["densemesh-pod"] == holder
                seen.append(answer)
            except grpc.aio.AioRpcError as error:
                seen.append((error.code(), error.details()))
        answer, _ = await three.clients[pod_id].call_for_headers("ModelInfer", unnamed, metadata=[("mm-model-id", "m")])
        seen.append(answer)
    assert found[holder] == found[other]
    assert found[other][0].raw_output_contents == requests[0].raw_input_contents  # type: ignore[attr-defined]
    assert [error[0].name for error in found[other][3:7]] == [  # type: ignore[index]
        *("INVALID_ARGUMENT", "NOT_FOUND", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"),
    ]


async def test_a_large_request_to_a_pod_that_lost_the_model_is_served_elsewhere(three: Mesh) -> None:
    holder, other = await through_a_hop(three)
    three.registries[other].watching.clear()  # from now on it believes what it has seen
    metadata: list[tuple[str, str | bytes]] = [("densemesh-hop", "hit"), ("densemesh-model-bin", b"m")]
    unload = v2.RepositoryModelUnloadRequest(model_name="m")
    await three.clients[holder].call("RepositoryModelUnload", unload, metadata=metadata)
    retries = three.pods[other].engine.stats.retries
    answer, headers = await three.clients[other].call_for_headers("ModelInfer", large("m"))
    assert answer.raw_output_contents == large("m").raw_input_contents
    assert headers["densemesh-pod"] != holder
    assert three.pods[other].engine.stats.retries == retries + 1
    three.registries[other].watching.set()


async def test_a_large_request_to_a_pod_that_is_gone_is_served_elsewhere(three: Mesh) -> None:
    holder, other = await through_a_hop(three)
    await three.crash(holder)
    _, headers = await three.clients[other].call_for_headers("ModelInfer", large("m"))
    assert headers["densemesh-pod"] != holder


async def test_a_vmodels_large_request_goes_to_its_model(three: Mesh) -> None:
    holder, other = await through_a_hop(three)
    await three.clients[other].call("setVModel", mm.SetVModelRequest(vModelId="v", targetModelId="m"))
    answer, headers = await three.clients[other].call_for_headers("ModelInfer", large("v"))
    assert (answer.model_name, answer.id, headers["densemesh-pod"]) == ("v", "7", holder)


async def test_forwards_are_counted_and_timed(three: Mesh) -> None:
    holder, other = await through_a_hop(three)
    engine = three.pods[other].engine
    before = engine.stats.forwards
    for request in (large("m"), large("m", 3)):
        await three.clients[other].call("ModelInfer", request)
    assert engine.stats.forwards == before + 2
    assert not engine.peers._in_flight
    assert three.pods[holder].engine.stats.forwards == 0
