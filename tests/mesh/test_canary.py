"""Requests to a vmodel are split between its two models. Authority: docs/ARCHITECTURE.md, A canary; KServe's canary
rollouts (canaryTrafficPercent, tag routing) for what users expect of them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from loaders.base import LoaderError
from mesh.frontends import FRONTENDS
from placement.records import VModelRecord, encode, vmodel_key
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, request_for, running, until
from tests.mesh.test_metrics import scrape

VStatus = mm.VModelStatusInfo
Metadata = tuple[tuple[str, str | bytes], ...]

TO_NEW: Metadata = (("densemesh-tag", "latest"),)
TO_OLD: Metadata = (("densemesh-tag", "prev"),)


def info(version: str, **settings: Any) -> mm.ModelInfo:
    """A synthetic model whose answers carry this version."""
    return mm.ModelInfo(type="synthetic", key=json.dumps({"version": version, **settings}))


async def set_v(client: Client, target: str, percent: int | None = None, **how: Any) -> Any:
    """Give the vmodel a target, which is registered if it is not."""
    request = mm.SetVModelRequest(
        vModelId="v", targetModelId=target, modelInfo=info(target), autoDeleteTargetModel=True, canary_percent=percent
    )
    request.MergeFrom(mm.SetVModelRequest(**how))
    return await client.call("setVModel", request)


async def v_status(client: Client) -> Any:
    return await client.call("getVModelStatus", mm.GetVModelStatusRequest(vModelId="v"))


async def served(client: Client, metadata: Metadata = (), name: str = "v") -> str:
    answer = await client.call("ModelInfer", request_for(name), metadata=metadata)
    assert answer.model_name == name
    return str(answer.model_version)


async def share(clients: list[Client], requests: int, metadata: Metadata = ()) -> float:
    """Of requests that went to `new`, in percent."""
    got = Counter[str]()
    for begin in range(0, requests, 100):
        asked = (served(clients[n % len(clients)], metadata) for n in range(begin, begin + 100))
        got.update(await asyncio.gather(*asked))
    return 100 * got["new"] / requests


async def started(mesh: Mesh, percent: int = 10) -> None:
    """Old is active and loaded, new is its canary and loaded, and every pod knows."""
    a = mesh.clients["a"]
    await set_v(a, "old", loadNow=True, sync=True)
    told = await set_v(a, "new", percent, sync=True)
    assert (told.activeModelId, told.targetModelId, told.canary_percent) == ("old", "new", percent)
    await seen(mesh, percent)
    for model_id in ("old", "new") if percent else ("old",):
        await mesh.seen_by_all(model_id, mesh.holders(model_id)[0])


async def seen(mesh: Mesh, percent: int) -> None:
    """Return when every pod knows the share."""

    def known() -> bool:
        vmodels = (pod.engine.view.vmodels.get("v") for pod in mesh.pods.values())
        return all(vmodel is not None and vmodel.canary_percent == percent for vmodel in vmodels)

    await until(known)


async def moved(mesh: Mesh, active: str) -> None:
    """Return when every pod knows that the transition has ended."""

    def known() -> bool:
        vmodels = (pod.engine.view.vmodels.get("v") for pod in mesh.pods.values())
        return all(vmodel is not None and vmodel.active == vmodel.target == active for vmodel in vmodels)

    await until(known)


@pytest.fixture(params=FRONTENDS)
async def one(loads: Loads, request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    async with running("a", loads, frontend=request.param) as mesh:
        yield mesh


@pytest.fixture
async def three(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("abc", loads) as mesh:
        yield mesh


# Shares


@pytest.mark.parametrize("pods", ["a", "abc"])
async def test_two_thousand_requests_are_split_within_one_percent(loads: Loads, pods: str) -> None:
    async with running(pods, loads) as mesh:
        await started(mesh, 10)
        clients = list(mesh.clients.values())
        assert abs(await share(clients, 2_000) - 10) <= 1
        await set_v(mesh.clients["a"], "new", 60)
        await seen(mesh, 60)
        assert abs(await share(clients, 2_000) - 60) <= 1


async def test_what_was_forwarded_is_not_split_again(three: Mesh) -> None:
    """At 50 %, a second draw where the request arrives would make it 25 % of those that went one way."""
    await started(three, 50)
    outside = [client for pod_id, client in three.clients.items() if pod_id not in three.holders("new")]
    assert abs(await share(outside, 1_000) - 50) <= 1


async def test_the_answer_says_which_model_it_is_from(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one, 50)
    for _ in range(6):
        answer, headers = await a.call_for_headers("ModelInfer", request_for("v"))
        assert (answer.model_name, headers["densemesh-model"]) == ("v", answer.model_version)
    _, headers = await a.call_for_headers("ModelInfer", request_for("new"))
    assert "densemesh-model" not in headers


async def test_every_way_to_name_a_vmodel_is_split(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one, 50)
    for metadata in ((), (("mm-vmodel-id", "v"),), (("mm-vmodel-id-bin", b"v"),)):
        assert {await served(a, metadata) for _ in range(6)} == {"old", "new"}
    assert await served(a, (("mm-model-id", "old"),), name="v") == "old"
    assert {await served(a, name="old") for _ in range(6)} == {"old"}


async def test_what_is_asked_of_a_vmodel_is_told_of_its_active_model(one: Mesh) -> None:
    """Metadata that change from call to call would confuse clients, and are no traffic."""
    a = one.clients["a"]
    await started(one, 99)
    for _ in range(3):
        told = await a.call("ModelMetadata", v2.ModelMetadataRequest(name="v"))
        assert list(told.versions) == ["old"]
    told = await a.call("ModelMetadata", v2.ModelMetadataRequest(name="v"), metadata=TO_NEW)
    assert list(told.versions) == ["new"]


# Keys and tags


async def test_one_key_goes_one_way_on_every_pod(three: Mesh) -> None:
    await started(three, 30)
    sides = Counter[str]()
    for n in range(40):
        metadata: Metadata = (("densemesh-sticky", f"user {n}"),)
        ways = {await served(client, metadata) for client in three.clients.values()}
        assert len(ways) == 1
        sides.update(ways)
    assert len(sides) == 2
    assert await served(three.clients["a"], (("densemesh-sticky-bin", b"user 1"),)) == await served(
        three.clients["b"], (("densemesh-sticky", "user 1"),)
    )


@pytest.mark.parametrize("percent", [0, 50])
async def test_a_tag_names_its_side_whatever_the_share(one: Mesh, percent: int) -> None:
    a = one.clients["a"]
    await started(one, percent)
    for _ in range(4):
        assert [await served(a, TO_NEW), await served(a, TO_OLD)] == ["new", "old"]
    by_header: Metadata = (("mm-vmodel-id", "v"), *TO_NEW)
    assert await served(a, by_header) == "new"


async def test_where_there_is_one_model_both_tags_mean_it(one: Mesh) -> None:
    a = one.clients["a"]
    await set_v(a, "old", loadNow=True, sync=True)
    for name in ("v", "old"):
        assert [await served(a, tag, name=name) for tag in (TO_NEW, TO_OLD)] == ["old", "old"]


async def test_another_tag_is_refused(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one)
    for name in ("v", "old"):
        status, said = await a.refusal("ModelInfer", request_for(name), metadata=(("densemesh-tag", "canary"),))
        assert (status, said) == (
            "INVALID_ARGUMENT",
            "header densemesh-tag: expected latest or prev, found 'canary'",
        )


# Its end


async def test_promoted_by_a_call_without_a_share_or_with_all_of_it(three: Mesh) -> None:
    a = three.clients["a"]
    for percent, (old, new) in ((None, ("old", "new")), (100, ("new", "newer"))):
        await set_v(a, new, 10, sync=True)
        told = await set_v(a, new, percent, sync=True)
        assert (told.status, told.activeModelId, told.HasField("canary_percent")) == (VStatus.DEFINED, new, False)
        assert {await served(a) for _ in range(10)} == {new}
        status = await a.call("getModelStatus", mm.GetStatusRequest(modelId=old))
        assert status.status == mm.ModelStatusInfo.NOT_FOUND, "nobody points to it any more"


async def test_rolled_back_at_once_by_taking_the_share_away(three: Mesh) -> None:
    """From when the call has returned where it was made, and elsewhere from when the registry's watch has told."""
    await started(three, 90)
    told = await set_v(three.clients["a"], "new", 0)
    assert (told.canary_percent, told.activeModelId, told.targetModelId) == (0, "old", "new")
    assert {await served(three.clients["a"]) for _ in range(20)} == {"old"}
    await seen(three, 0)
    for client in three.clients.values():
        assert {await served(client) for _ in range(20)} == {"old"}


async def test_rolled_back_by_giving_the_target_up(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one, 90)
    told = await set_v(a, "old")
    assert (told.status, told.activeModelId, told.targetModelId) == (VStatus.DEFINED, "old", "old")
    assert {await served(a) for _ in range(20)} == {"old"}
    status = await a.call("getModelStatus", mm.GetStatusRequest(modelId="new"))
    assert status.status == mm.ModelStatusInfo.NOT_FOUND
    model = one.pods["a"].engine.view.models["old"]
    assert model.refs == 1


async def test_another_target_takes_the_canarys_place(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one, 50)
    told = await set_v(a, "newer", 50, sync=True)
    assert (told.activeModelId, told.targetModelId) == ("old", "newer")
    assert {await served(a) for _ in range(6)} == {"old", "newer"}


async def test_a_canary_does_not_end_by_itself_and_repeating_it_changes_nothing(one: Mesh) -> None:
    a = one.clients["a"]
    await started(one, 10)
    revision = one.pods["a"].engine.view.vmodels["v"].revision
    told = await set_v(a, "new", 10)
    assert told.status == VStatus.TRANSITIONING
    assert one.pods["a"].engine.view.vmodels["v"].revision == revision


async def test_the_first_model_of_a_vmodel_is_no_canary(one: Mesh) -> None:
    told = await set_v(one.clients["a"], "old", 10, loadNow=True, sync=True)
    assert (told.status, told.HasField("canary_percent")) == (VStatus.DEFINED, False)
    assert {await served(one.clients["a"]) for _ in range(4)} == {"old"}


# Trouble


async def test_a_canary_gets_nothing_before_it_is_loaded(one: Mesh, loads: Loads) -> None:
    a, gate = one.clients["a"], loads.hold("new")
    await set_v(a, "old", loadNow=True, sync=True)
    await loads.begun()
    await set_v(a, "new", 90)
    await loads.begun()
    assert {await served(a) for _ in range(10)} == {"old"}
    gate.set()
    await set_v(a, "new", 90, sync=True)
    assert {await served(a) for _ in range(10)} == {"old", "new"}


async def test_a_canary_that_cannot_be_loaded_gets_nothing_and_says_why(one: Mesh, loads: Loads) -> None:
    a = one.clients["a"]
    loads.failures["a/new"] = LoaderError("weights are torn")
    await set_v(a, "old", loadNow=True, sync=True)
    told = await set_v(a, "new", 50, sync=True)
    assert (told.status, told.activeModelId, told.canary_percent) == (VStatus.TRANSITION_FAILED, "old", 50)
    assert "weights are torn" in told.targetModelStatus.errors[0]
    assert {await served(a) for _ in range(10)} == {"old"}
    status, said = await a.refusal("ModelInfer", request_for("v"), metadata=TO_NEW)
    assert (status, "weights are torn" in said) == ("FAILED_PRECONDITION", True)
    assert (await set_v(a, "old")).status == VStatus.DEFINED


async def test_when_the_canarys_pod_dies_the_active_model_answers(three: Mesh, loads: Loads) -> None:
    await started(three, 50)
    (holder,) = three.holders("new")
    gate = loads.hold("new")
    await three.crash(holder)
    for session in three.registries[holder].sessions:
        three.store.expire(session)
    left = [three.clients[pod_id] for pod_id in three.pods]
    await until(lambda: all(not pod.engine.view.copies("new").get(holder) for pod in three.pods.values()))
    assert {await served(client) for client in left for _ in range(6)} == {"old"}
    gate.set()
    await until(lambda: bool(three.holders("new")))  # the leader, whoever that is now, has it loaded again
    await three.seen_by_all("new", three.holders("new")[0])
    assert {await served(client) for client in left for _ in range(6)} == {"old", "new"}


async def test_the_next_leader_ends_what_the_last_one_began(three: Mesh, loads: Loads) -> None:
    gate = loads.hold("new")
    clients = three.clients
    await set_v(clients["b"], "old", loadNow=True, sync=True)
    await three.seen_by_all("old", three.holders("old")[0])
    leader = min(three.pods, key=lambda pod_id: three.pods["c"].engine.view.pods[pod_id].created)
    others = [pod_id for pod_id in three.pods if pod_id != leader]
    await set_v(clients[others[0]], "new", 50)
    await seen(three, 50)
    await three.crash(leader)
    for session in three.registries[leader].sessions:
        three.store.expire(session)
    gate.set()
    told = await set_v(clients[others[1]], "new", 50, loadNow=True, sync=True)
    assert (told.status, told.canary_percent) == (VStatus.TRANSITIONING, 50)
    told = await set_v(clients[others[1]], "new", sync=True)
    assert (told.status, told.activeModelId) == (VStatus.DEFINED, "new")
    await moved(three, "new")


async def test_many_who_change_it_at_once_leave_one_state_and_right_counts(three: Mesh) -> None:
    await started(three, 10)

    async def change(n: int) -> bool:
        client = three.clients["abc"[n % 3]]
        try:
            await set_v(client, f"m{n % 4}", (10, 50, None)[n % 3], expectedTargetModelId="new")
        except grpc.aio.AioRpcError as error:
            assert error.code().name == "FAILED_PRECONDITION"  # noqa: PT017
            return False
        return True

    assert sum(await asyncio.gather(*(change(n) for n in range(12)))) == 1, "they all expected the same target"
    view = three.pods["a"].engine.view
    await until(lambda: "new" not in view.models)
    vmodel = view.vmodels["v"]
    models = {vmodel.active, vmodel.target}
    assert {model_id: model.refs for model_id, model in view.models.items()} == dict.fromkeys(models, 1)


async def test_a_record_of_a_version_without_canaries_is_a_transition(one: Mesh) -> None:
    record = VModelRecord("v", "old", "new", owner="o")
    assert encode(record) == b'{"active":"old","target":"new","owner":"o"}'
    a = one.clients["a"]
    await set_v(a, "old", loadNow=True, sync=True)
    await a.call("registerModel", mm.RegisterModelRequest(modelId="new", modelInfo=info("new")))
    one.store.write({vmodel_key("v"): encode(replace(record, owner=""))}, ())
    await moved(one, "new")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"canary_percent": 101}, "canary_percent: expected 0 to 100, found 101"),
        ({"canary_percent": 5, "force": True}, "force and canary_percent: expected one of them"),
    ],
)
async def test_a_share_that_cannot_be_is_refused(one: Mesh, how: dict[str, Any], sentence: str) -> None:
    request = mm.SetVModelRequest(vModelId="v", targetModelId="old", modelInfo=info("old"), **how)
    status, said = await one.clients["a"].refusal("setVModel", request)
    assert status == "INVALID_ARGUMENT"
    assert said.startswith(sentence)


# As many copies


async def test_the_target_has_as_many_copies_as_the_active_model_before_it_takes_over(three: Mesh) -> None:
    """model-mesh.proto promises it; ModelMesh loads one."""
    a = three.clients["a"]
    await set_v(a, "old", modelInfo=info("old", placement={"min_copies": 3}))
    await until(lambda: len(three.holders("old")) == 3)
    for pod_id in "abc":
        await three.seen_by_all("old", pod_id)
    taken_over: list[list[str]] = []
    view = three.pods["a"].engine.view
    apply = view.apply

    def watched(record: Any) -> Any:
        if isinstance(record, VModelRecord) and record.active == "new" and not taken_over:
            taken_over.append(three.holders("new"))
        return apply(record)

    view.apply = watched  # type: ignore[method-assign]
    await set_v(a, "new", sync=True)
    assert taken_over == [["a", "b", "c"]]


# What an operator sees


async def test_requests_of_both_sides_are_told_while_there_is_a_canary(one: Mesh) -> None:
    await started(one, 50)
    a = one.clients["a"]
    assert await share([a], 100) == 50
    await a.refusal("ModelInfer", v2.ModelInferRequest(model_name="v"), metadata=TO_NEW)
    told = await scrape(one, "a")
    name = "densemesh_vmodel_request_seconds_count"
    assert (told[name, "OK,active,v"], told[name, "OK,target,v"]) == (50, 50)
    assert told[name, "INVALID_ARGUMENT,target,v"] == 1
    await set_v(a, "old")
    assert not any(key[0] == name for key in await scrape(one, "a"))
