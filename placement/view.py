"""The cluster as this pod sees it: the registry's records, behind by the watch's lag.

`apply` and `remove` are idempotent and keep the newer of two registrations, because a resumed watch may repeat itself
and a single record may be read ahead of the watch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from placement.records import (
    CopyRecord,
    CopyStatus,
    ModelId,
    ModelRecord,
    PodId,
    PodRecord,
    Record,
    TenantId,
    TenantRecord,
    VModelRecord,
)

IN_MEMORY: Final = frozenset({CopyStatus.LOADED, CopyStatus.LOADING})
_NO_COPIES: Final[Mapping[PodId, CopyRecord]] = MappingProxyType({})


class ClusterView:
    """Records by id, plus what placement asks of them."""

    def __init__(self) -> None:
        self.models: dict[ModelId, ModelRecord] = {}
        self.vmodels: dict[str, VModelRecord] = {}
        self.tenants: dict[TenantId, TenantRecord] = {}
        self.pods: dict[PodId, PodRecord] = {}
        self.in_transition: set[str] = set()
        """VModels whose target is not active yet."""
        self._copies: dict[ModelId, dict[PodId, CopyRecord]] = {}
        self._sizes: dict[ModelId, tuple[int, int]] = {}
        """Registration (`ModelRecord.created`) and the size of its copies."""
        self._sizes_sum = 0
        self._tenant_bytes: dict[TenantId, dict[PodId, int]] = {}
        """Loaded and loading copies of models that have a tenant."""
        self._unloaded: dict[ModelId, tuple[PodId, int]] = {}
        """Of models that had copies and have none: the pod of the last one, and when that was last used."""
        self._tenant_models: dict[TenantId, int] = {}

    def copies(self, model_id: ModelId) -> Mapping[PodId, CopyRecord]:
        """The model's copies by pod. A pod's record may be gone before its copies', or come after them."""
        return self._copies.get(model_id, _NO_COPIES)

    def size_bytes(self, model_id: ModelId) -> int:
        """The model's size as last measured anywhere, else the mean of all measured models, else 0."""
        known = self.measured(model_id)
        if known is not None:
            return known
        return self._sizes_sum // len(self._sizes) if self._sizes else 0

    def measured(self, model_id: ModelId) -> int | None:
        """The model's size as last measured anywhere; None: nobody has loaded it since this pod started."""
        model, known = self.models.get(model_id), self._sizes.get(model_id)
        return known[1] if model is not None and known is not None and known[0] == model.created else None

    def tenant_bytes(self, tenant: TenantId, *, without: PodId) -> int:
        """Bytes of a tenant's copies on all pods but one."""
        pods = self.tenant_pods(tenant)
        return sum(pods.values()) - pods.get(without, 0)

    def tenant_models(self, tenant: TenantId) -> int:
        """How many models a tenant has registered."""
        return self._tenant_models.get(tenant, 0)

    def tenants_with_models(self) -> Collection[TenantId]:
        return self._tenant_models.keys()

    def unloaded(self, model_id: ModelId) -> tuple[PodId, int] | None:
        """Of a model that had copies and has none: the pod of the last one, and when that was last used as far as was
        told."""
        return self._unloaded.get(model_id)

    def tenant_pods(self, tenant: TenantId) -> Mapping[PodId, int]:
        """Bytes of a tenant's copies by pod."""
        return self._tenant_bytes.get(tenant, {})

    def learn_size(self, model_id: ModelId, registration: int, size_bytes: int) -> None:
        """A copy of the model was measured. A pod that lags may still tell of an earlier registration's."""
        known_registration, known_bytes = self._sizes.get(model_id, (registration, 0))
        if registration >= known_registration:
            self._sizes_sum += size_bytes - known_bytes
            self._sizes[model_id] = (registration, size_bytes)

    def apply(self, record: Record) -> ModelId | None:
        """Take up a record, unless a newer one of that key is known. Returns the model's id if it now means something
        else than before."""
        match record:
            case ModelRecord():
                old = self.models.get(record.model_id)
                if old is not None and old.revision > record.revision:
                    return None
                if old is None or old.tenant != record.tenant:
                    self._attribute(record.model_id, -1)
                    self.models[record.model_id] = record
                    self._attribute(record.model_id, 1)
                self.models[record.model_id] = record
                if old is not None and not may_stay(old, record):
                    return record.model_id
            case VModelRecord():
                known = self.vmodels.get(record.vmodel_id)
                if known is not None and known.revision > record.revision:
                    return None
                self.vmodels[record.vmodel_id] = record
                if record.active != record.target:
                    self.in_transition.add(record.vmodel_id)
                else:
                    self.in_transition.discard(record.vmodel_id)
            case TenantRecord():
                granted = self.tenants.get(record.tenant_id)
                if granted is None or granted.revision <= record.revision:
                    self.tenants[record.tenant_id] = record
            case PodRecord():
                self.pods[record.pod_id] = record
            case CopyRecord():
                copies = self._copies.setdefault(record.model_id, {})
                self._count(copies.get(record.pod_id), -1)
                copies[record.pod_id] = record
                self._unloaded.pop(record.model_id, None)
                self._count(record, 1)
                if record.status is CopyStatus.LOADED:
                    self.learn_size(record.model_id, record.registration, record.size_bytes)
        return None

    def remove(self, key: str, revision: int | None = None) -> ModelId | None:
        """Forget the record at a key, unless it is newer than `revision`; unknown keys are fine. Returns the model's id
        if a model was removed."""
        kind, _, rest = key.partition("/")
        match kind:
            case "models":
                model = self.models.get(rest)
                if model is None or (revision is not None and model.revision > revision):
                    return None
                self._attribute(rest, -1)
                del self.models[rest]
                self._unloaded.pop(rest, None)
                self._forget_size(rest)
                return rest
            case "vmodels":
                vmodel = self.vmodels.get(rest)
                if vmodel is not None and (revision is None or vmodel.revision <= revision):
                    del self.vmodels[rest]
                    self.in_transition.discard(rest)
            case "tenants":
                tenant = self.tenants.get(rest)
                if tenant is not None and (revision is None or tenant.revision <= revision):
                    del self.tenants[rest]
            case "pods":
                self.pods.pop(rest, None)
            case "copies":
                pod_id, _, model_id = rest.partition("/")
                copies = self._copies.get(model_id)
                copy = copies.pop(pod_id, None) if copies is not None else None
                self._count(copy, -1)
                if copy is not None and not copies:
                    del self._copies[model_id]
                    if model_id in self.models:
                        self._unloaded[model_id] = pod_id, copy.used_ms
                    else:
                        self._forget_size(model_id)
        return None

    def replace(self, records: Iterable[Record]) -> list[ModelId]:
        """Make the view equal to a snapshot. Returns the models that are gone or mean something else."""
        records = list(records)
        models = {record.model_id: record for record in records if isinstance(record, ModelRecord)}
        changed = [
            model_id
            for model_id, model in self.models.items()
            if model_id not in models or not may_stay(model, models[model_id])
        ]
        for model_id, (registration, _) in list(self._sizes.items()):
            if model_id not in models or models[model_id].created != registration:
                self._forget_size(model_id)
        had = self._copies
        self.models, self.vmodels, self.tenants, self.pods, self._copies = {}, {}, {}, {}, {}
        self.in_transition.clear()
        self._tenant_bytes.clear()
        self._tenant_models.clear()
        for record in records:
            self.apply(record)
        for model_id, copies in had.items():
            if model_id in self.models and model_id not in self._copies:
                copy = min(copies.values(), key=lambda copy: (copy.pod_id in self.pods, copy.pod_id))
                self._unloaded[model_id] = copy.pod_id, copy.used_ms
        self._unloaded = {m: last for m, last in self._unloaded.items() if m in self.models}
        return changed

    def _attribute(self, model_id: ModelId, sign: int) -> None:
        """Count a model and its copies for the tenant it has now, or no longer."""
        model = self.models.get(model_id)
        if model is None or not model.tenant:
            return
        models = self._tenant_models.pop(model.tenant, 0) + sign
        if models:
            self._tenant_models[model.tenant] = models
        for copy in self._copies.get(model_id, _NO_COPIES).values():
            self._count(copy, sign)

    def _count(self, copy: CopyRecord | None, sign: int) -> None:
        model = self.models.get(copy.model_id) if copy is not None else None
        if copy is None or model is None or not model.tenant or copy.status not in IN_MEMORY:
            return
        pods = self._tenant_bytes.setdefault(model.tenant, {})
        size_bytes = pods.get(copy.pod_id, 0) + sign * copy.size_bytes
        if size_bytes:
            pods[copy.pod_id] = size_bytes
        else:
            pods.pop(copy.pod_id, None)
            if not pods:
                del self._tenant_bytes[model.tenant]

    def _forget_size(self, model_id: ModelId) -> None:
        self._sizes_sum -= self._sizes.pop(model_id, (0, 0))[1]


def may_stay(old: ModelRecord, new: ModelRecord) -> bool:
    """Whether copies of the one may be kept when it becomes the other."""
    return same_contents(old, new) and (old.stopped or not new.stopped)


def same_contents(a: ModelRecord, b: ModelRecord) -> bool:
    """Whether copies of one serve for the other: same registration, same files, same way to read them, same tenant, in
    whose books the copies are."""
    return (a.created, a.format, a.path, a.key, a.tenant) == (b.created, b.format, b.path, b.key, b.tenant)
