"""`densemesh.Mesh`'s calls for tenants, and the quota that registrations meet (protos/management.proto)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, Mesh, request_for, running, until


@pytest.fixture
async def mesh(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("ab", loads) as pods:
        yield pods


@pytest.fixture
def a(mesh: Mesh) -> Client:
    return mesh.clients["a"]


@pytest.fixture
def b(mesh: Mesh) -> Client:
    return mesh.clients["b"]


def grant(tenant_id: str = "t", **granted: Any) -> mm.Tenant:
    return mm.Tenant(tenant_id=tenant_id, **granted)


async def listed(client: Client) -> dict[str, mm.TenantState]:
    answer = await client.call("ListTenants", mm.ListTenantsRequest())
    return {state.tenant.tenant_id: state for state in answer.tenants}


async def test_grants_are_set_seen_by_all_pods_and_taken_back(mesh: Mesh, a: Client, b: Client) -> None:
    state = await a.call("SetTenant", grant(guaranteed_bytes=5, max_bytes=10, max_loads=1, max_models=2))
    assert state.tenant == grant(guaranteed_bytes=5, max_bytes=10, weight=1, max_loads=1, max_models=2)
    assert (await listed(a))["t"] == state
    await until(lambda: "t" in mesh.pods["b"].engine.view.tenants)
    assert (await listed(b))["t"] == state
    await b.call("SetTenant", grant(weight=3))
    await until(lambda: mesh.pods["a"].engine.view.tenants["t"].weight == 3)
    assert (await listed(a))["t"].tenant == grant(weight=3)  # in place of what was granted before
    for _ in range(2):  # may be repeated
        await a.call("DeleteTenant", mm.DeleteTenantRequest(tenant_id="t"))
    assert "t" not in await listed(a)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tenant_id": ""}, "tenant_id: expected a non-empty id"),
        ({"guaranteed_bytes": -1}, "guaranteed_bytes: expected a number from 0 to"),
        ({"max_bytes": 1 << 60}, "max_bytes: expected a number from 0 to"),
        ({"weight": -1}, "weight: expected a number from 0 to"),
        ({"max_loads": 100_000}, "max_loads: expected a number from 0 to"),
        ({"max_models": -5}, "max_models: expected a number from 0 to"),
        ({"guaranteed_bytes": 3, "max_bytes": 2}, "guaranteed_bytes: expected at most max_bytes, 2, found 3"),
    ],
)
async def test_wrong_grants(a: Client, asked: dict[str, Any], says: str) -> None:
    status, message = await a.refusal("SetTenant", grant(**asked))
    assert status == "INVALID_ARGUMENT"
    assert says in message


async def test_guarantees_must_fit_the_mesh(mesh: Mesh, a: Client) -> None:
    capacity = sum(pod.engine.limits.capacity_bytes for pod in mesh.pods.values())
    await a.call("SetTenant", grant("s", guaranteed_bytes=capacity))
    status, message = await a.refusal("SetTenant", grant("t", guaranteed_bytes=1))
    assert status == "FAILED_PRECONDITION"
    assert str(capacity + 1) in message
    await a.call("SetTenant", grant("s", guaranteed_bytes=1))
    await a.call("SetTenant", grant("t", guaranteed_bytes=1))


def registration(model_id: str, tenant: str, *, load: bool = False) -> mm.RegisterModelRequest:
    key = json.dumps({"parameters": {"size_bytes": 1 << 20}, "placement": {"tenant": tenant}})
    info = mm.ModelInfo(type="synthetic", path="", key=key)
    return mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=load, sync=load)


async def test_a_quota_of_models(a: Client) -> None:
    await a.call("SetTenant", grant(max_models=2))
    for model_id in ("m1", "m2", "m2"):  # which may be repeated
        await a.call("registerModel", registration(model_id, "t"))
    status, message = await a.refusal("registerModel", registration("m3", "t"))
    assert (status, message) == ("RESOURCE_EXHAUSTED", "tenant 't' may register 2 models (max_models)")
    await a.call("registerModel", registration("m3", "other"))
    await a.call("unregisterModel", mm.UnregisterModelRequest(modelId="m1"))
    await a.call("registerModel", registration("m4", "t"))


async def test_a_limit_of_memory(mesh: Mesh, a: Client) -> None:
    """A tenant at its limit serves on, with its own room; what does not fit even then is told with the quota's name."""
    await a.call("SetTenant", grant(max_bytes=3 << 20))
    for n in range(6):
        await a.call("registerModel", registration(f"m{n}", "t", load=True))
        await mesh.infer(f"m{n}")
    used = sum(pod.engine.cache.tenant_bytes.get("t", 0) for pod in mesh.pods.values())
    assert used <= 3 << 20
    await a.call("SetTenant", grant(max_bytes=1 << 19))
    status, message = await a.refusal("ModelInfer", request_for("m0"))
    assert status == "RESOURCE_EXHAUSTED"
    assert "max_bytes" in message


async def test_a_storm_leaves_a_guaranteed_working_set_alone(loads: Loads) -> None:
    async with running("ab", loads, capacity="10MiB") as mesh:
        a = mesh.clients["a"]
        await a.call("SetTenant", grant("quiet", guaranteed_bytes=8 << 20))
        quiet = [f"quiet-{n}" for n in range(4)]
        for model_id in quiet:
            await a.call("registerModel", registration(model_id, "quiet", load=True))
        held = {model_id: mesh.holders(model_id) for model_id in quiet}
        for n in range(60):
            await a.call("registerModel", registration(f"storm-{n}", "storm"))
        await asyncio.gather(*(mesh.infer(f"storm-{n}", "ab"[n % 2]) for n in range(60)))
        assert loads.count("storm-59") >= 1
        assert {model_id: mesh.holders(model_id) for model_id in quiet} == held
        assert all(loads.count(model_id) == 1 for model_id in quiet)
