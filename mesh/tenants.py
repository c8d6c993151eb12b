"""Tenants' grants in the registry, over `densemesh.Mesh`, and the quota that registrations meet."""

from __future__ import annotations

from typing import Final

from mesh.config import MAX_BYTES
from mesh.directory import check_id
from mesh.errors import FailedPrecondition, InvalidRequest, OverQuota
from mesh.inference import parse
from mesh.mirror import Mirror
from mesh.registry.base import CAS_TRIES, Commit, Registry
from mesh.rpc import Call, Unary
from placement.engine import Engine
from placement.records import ModelRecord, TenantId, TenantRecord, encode, tenant_key
from placement.view import ClusterView
from protos import management_pb2 as pb

_MOST: Final = {
    "guaranteed_bytes": MAX_BYTES,
    "max_bytes": MAX_BYTES,
    "weight": 1_000_000,
    "max_loads": 1_000,
    "max_models": 10_000_000,
}


class TenantGrants:
    """Handlers of the tenants' calls."""

    def __init__(self, engine: Engine, registry: Registry, mirror: Mirror) -> None:
        self._engine = engine
        self._view = engine.view
        self._registry = registry
        self._mirror = mirror

    def handlers(self) -> dict[str, Unary]:
        return {"SetTenant": self._set, "DeleteTenant": self._delete, "ListTenants": self._list}

    async def _set(self, call: Call, message: bytes) -> bytes:
        record = tenant_record(parse(pb.Tenant, message))
        self._check_guarantees(record)
        await self._commit(record.tenant_id, encode(record))
        return self._state(record.tenant_id).SerializeToString()

    async def _delete(self, call: Call, message: bytes) -> bytes:
        await self._commit(check_id("tenant_id", parse(pb.DeleteTenantRequest, message).tenant_id), None)
        return pb.DeleteTenantResponse().SerializeToString()

    async def _list(self, call: Call, message: bytes) -> bytes:
        parse(pb.ListTenantsRequest, message)
        known = {*self._view.tenants, *self._view.tenants_with_models()}
        return pb.Tenants(tenants=[self._state(tenant) for tenant in sorted(known)]).SerializeToString()

    async def _commit(self, tenant: TenantId, value: bytes | None) -> None:
        """Write a tenant's grants, or remove them; the view has the change then.

        Raises:
            FailedPrecondition, RegistryError
        """
        key = tenant_key(tenant)
        for _ in range(CAS_TRIES):
            entry = await self._registry.get(key)
            if value is None and entry is None:
                return
            expect = {key: entry.revision if entry is not None else 0}
            change = Commit(expect, delete=(key,)) if value is None else Commit(expect, put={key: value})
            revision = await self._registry.commit(change)
            if revision is not None:
                await self._mirror.caught_up(revision)
                return
        raise FailedPrecondition(f"tenant {tenant!r} is being changed by others; try again")

    def _check_guarantees(self, record: TenantRecord) -> None:
        """Guarantees that exceed the mesh would leave room for nothing else, and be none.

        Raises:
            FailedPrecondition
        """
        granted = {**self._view.tenants, record.tenant_id: record}
        guaranteed_bytes = sum(tenant.guaranteed_bytes for tenant in granted.values())
        pods = {**self._view.pods, self._engine.pod_id: self._engine.pod_record()}
        capacity_bytes = sum(pod.capacity_bytes for pod in pods.values())
        if record.guaranteed_bytes and guaranteed_bytes > capacity_bytes:
            raise FailedPrecondition(
                f"guaranteed_bytes: all tenants' guarantees would be {guaranteed_bytes} bytes, the pods have "
                f"{capacity_bytes} bytes"
            )

    def _state(self, tenant: TenantId) -> pb.TenantState:
        record = self._view.tenants.get(tenant, TenantRecord(tenant))
        own_bytes = self._engine.cache.tenant_bytes.get(tenant, 0)
        return pb.TenantState(
            tenant=pb.Tenant(tenant_id=tenant, **{name: getattr(record, name) for name in _MOST}),
            used_bytes=own_bytes + self._view.tenant_bytes(tenant, without=self._engine.pod_id),
            models_registered=self._view.tenant_models(tenant),
        )


def tenant_record(asked: pb.Tenant) -> TenantRecord:
    """The record a grant asks for.

    Raises:
        InvalidRequest: names the field and what was expected.
    """
    members = {name: getattr(asked, name) for name in _MOST}
    members["weight"] = members["weight"] or 1
    for name, most in _MOST.items():
        if not 0 <= members[name] <= most:
            raise InvalidRequest(f"{name}: expected a number from 0 to {most}, found {members[name]}")
    record = TenantRecord(check_id("tenant_id", asked.tenant_id), **members)
    if record.max_bytes and record.guaranteed_bytes > record.max_bytes:
        raise InvalidRequest(
            f"guaranteed_bytes: expected at most max_bytes, {record.max_bytes}, found {record.guaranteed_bytes}"
        )
    return record


def check_quota(view: ClusterView, model: ModelRecord) -> None:
    """A tenant may register another model. Pods that register at the same moment may pass the limit together, by as
    many models as their watches are behind.

    Raises:
        OverQuota
    """
    most = view.tenants.get(model.tenant, TenantRecord("")).max_models
    if most and model.model_id not in view.models and view.tenant_models(model.tenant) >= most:
        raise OverQuota(f"tenant {model.tenant!r} may register {most} models (max_models)")
