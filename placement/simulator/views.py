"""What each pod sees of the registry: a view of its own, or one shared by all and seen with the pod's lag.

Both follow the same batches, so they must tell the same; tests hold a run with the one against a run with the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from placement.records import CopyRecord, ModelId, ModelRecord, PodId, Record, TenantId, TenantRecord, VModelRecord
from placement.view import ClusterView, same_contents

if TYPE_CHECKING:
    from placement.simulator.registry import Batch, Registry

T = TypeVar("T")

_NO_COPIES: Final[Mapping[PodId, CopyRecord]] = MappingProxyType({})


class Change(NamedTuple):
    revision: int
    key: str
    record: Record | None
    """None: deleted."""


class OwnView(ClusterView):
    """A pod's own copy of everything, as in production: what `mesh.mirror` does."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.seen = 0
        self.reread(registry)

    def follow(self, batch: Batch) -> Iterator[ModelId]:
        """See what the batch brings; yields the models that vanished or mean something else, each in its moment."""
        for revision, key, record in batch.changes:
            if revision > self.seen:
                self.seen = revision
                changed = self.remove(key, revision) if record is None else self.apply(record)
                if changed is not None:
                    yield changed

    def reread(self, registry: Registry) -> list[ModelId]:
        """See everything as it is now; the models that vanished or mean something else."""
        self.seen = registry.revision
        return sorted(self.replace(registry.records))


class Past:
    """What the changes that some pod has not seen have replaced: by key, with the revision that replaced it."""

    def __init__(self, head: ClusterView) -> None:
        self.head = head
        self.models: dict[ModelId, list[tuple[int, ModelRecord | None]]] = {}
        self.copies: dict[ModelId, list[tuple[int, dict[PodId, CopyRecord]]]] = {}
        self.known: dict[ModelId, list[tuple[int, tuple[int, int] | None]]] = {}
        """Registration and size."""
        self.unloaded: dict[ModelId, list[tuple[int, tuple[PodId, int] | None]]] = {}
        self.tenant_bytes: dict[TenantId, list[tuple[int, Mapping[PodId, int]]]] = {}
        self.tenant_models: dict[TenantId, list[tuple[int, int]]] = {}
        self._order: deque[tuple[int, dict[ModelId, list[Any]], ModelId]] = deque()

    def keep(self, change: Change) -> None:
        """Before it is applied to the head."""
        kind, _, rest = change.key.partition("/")
        head, revision = self.head, change.revision
        if kind == "models":
            model_id = rest
            self._keep(self.models, model_id, revision, head.models.get(model_id))
        elif kind == "copies":
            model_id = rest.partition("/")[2]
            self._keep(self.copies, model_id, revision, dict(head.copies(model_id)))
        else:
            return
        self._keep(self.known, model_id, revision, head._sizes.get(model_id))
        self._keep(self.unloaded, model_id, revision, head.unloaded(model_id))
        for model in {head.models.get(model_id), change.record}:
            if isinstance(model, ModelRecord) and model.tenant:
                tenant = model.tenant
                self._keep(self.tenant_bytes, tenant, revision, dict(head.tenant_pods(tenant)))
                self._keep(self.tenant_models, tenant, revision, head.tenant_models(tenant))

    def forget(self, revision: int) -> None:
        """Every pod has seen everything up to here."""
        order = self._order
        while order and order[0][0] <= revision:
            _, table, key = order.popleft()
            versions = table[key]
            del versions[0]
            if not versions:
                del table[key]

    def sizes(self) -> tuple[int, int]:
        return self.head._sizes_sum, len(self.head._sizes)

    def _keep(self, table: dict[ModelId, list[tuple[int, T]]], key: ModelId, revision: int, before: T) -> None:
        table.setdefault(key, []).append((revision, before))
        self._order.append((revision, table, key))


class LaggedView(ClusterView):
    """The shared view, except for changes that this pod has not seen yet.

    A table that is added to `ClusterView` is answered here as well, or kept per pod as `vmodels` and `tenants` are.
    """

    models: Mapping[ModelId, ModelRecord]  # type: ignore[assignment]

    def __init__(self, registry: Registry, *, models_change: bool = True) -> None:
        super().__init__()
        self._past = registry.past
        self._head = registry.head
        self._head_copies = registry.head._copies
        self.ahead: dict[ModelId, ModelRecord] = {}
        """Registrations read past the watch's lag."""
        self.seen = registry.revision
        self.models = _Models(self) if models_change else registry.head.models
        self._all_sizes = registry.past.sizes()
        self._reread_rest(registry)

    def follow(self, batch: Batch) -> Iterator[ModelId]:
        """See what the batch brings; yields the models that vanished or mean something else, each in its moment."""
        for revision, key, record in batch.rare:
            if revision > self.seen:
                self.seen = revision - 1  # what it replaces is still seen
                changed = self.remove(key, revision) if record is None else self.apply(record)
                self.seen = revision
                if changed is not None:
                    yield changed
        if batch.revision >= self.seen:
            self.seen, self.pods, self._all_sizes = batch.revision, batch.pods, batch.sizes
        if self.ahead:
            self.ahead = {m: model for m, model in self.ahead.items() if model.revision > self.seen}

    def reread(self, registry: Registry) -> list[ModelId]:
        """See everything as it is now; the models that vanished or mean something else."""
        changed = []
        for model_id in self._past.models.keys() | self.ahead.keys():
            old, new = self.models.get(model_id), self._head.models.get(model_id)
            if old is not None and (new is None or not same_contents(old, new)):
                changed.append(model_id)
        self.seen = registry.revision
        self.ahead.clear()
        self._reread_rest(registry)
        return sorted(changed)

    def _reread_rest(self, registry: Registry) -> None:
        head = registry.head
        self.pods, self._all_sizes = dict(head.pods), registry.past.sizes()
        self.vmodels, self.in_transition = dict(head.vmodels), set(head.in_transition)
        self.tenants = dict(head.tenants)

    def copies(self, model_id: ModelId) -> Mapping[PodId, CopyRecord]:
        versions = self._past.copies.get(model_id)
        if versions is not None:
            for revision, before in versions:
                if revision > self.seen:
                    return before
        return self._head_copies.get(model_id, _NO_COPIES)

    def measured(self, model_id: ModelId) -> int | None:
        model = self.models.get(model_id)
        if model is None:
            return None
        for known in (self._sizes.get(model_id), self._known(model_id)):
            if known is not None and known[0] == model.created:
                return known[1]
        return None

    def size_bytes(self, model_id: ModelId) -> int:
        known = self.measured(model_id)
        if known is not None:
            return known
        total, count = self._all_sizes
        for own_id, (registration, size_bytes) in list(self._sizes.items()):
            others = self._known(own_id)
            if others is not None and others[0] >= registration:
                self._forget_size(own_id)  # the others have heard of it
            else:
                total += size_bytes - (others[1] if others else 0)
                count += others is None
        return total // count if count else 0

    def unloaded(self, model_id: ModelId) -> tuple[PodId, int] | None:
        return self._at(self._past.unloaded.get(model_id), self._head.unloaded(model_id))

    def tenant_bytes(self, tenant: TenantId, *, without: PodId) -> int:
        pods = self.tenant_pods(tenant)
        return sum(pods.values()) - pods.get(without, 0)

    def tenant_pods(self, tenant: TenantId) -> Mapping[PodId, int]:
        return self._at(self._past.tenant_bytes.get(tenant), self._head.tenant_pods(tenant))

    def tenant_models(self, tenant: TenantId) -> int:
        return self._at(self._past.tenant_models.get(tenant), self._head.tenant_models(tenant))

    def tenants_with_models(self) -> Collection[TenantId]:
        tenants = {*self._head.tenants_with_models(), *self._past.tenant_models}
        return sorted(tenant for tenant in tenants if self.tenant_models(tenant))

    def apply(self, record: Record) -> ModelId | None:
        match record:
            case ModelRecord(model_id):
                old = self.models.get(model_id)
                if old is not None and old.revision > record.revision:
                    return None
                self.ahead[model_id] = record
                return model_id if old is not None and not same_contents(old, record) else None
            case VModelRecord() | TenantRecord():
                return super().apply(record)
            case _:
                raise AssertionError(f"not per pod: {record}")

    def remove(self, key: str, revision: int | None = None) -> ModelId | None:
        kind, _, model_id = key.partition("/")
        if kind != "models":
            return super().remove(key, revision)
        model = self.models.get(model_id)
        if model is None or (revision is not None and model.revision > revision):
            return None
        self.ahead.pop(model_id, None)
        self._forget_size(model_id)
        return model_id

    def _known(self, model_id: ModelId) -> tuple[int, int] | None:
        return self._at(self._past.known.get(model_id), self._head._sizes.get(model_id))

    def _model(self, model_id: ModelId) -> ModelRecord | None:
        if not self.ahead and model_id not in self._past.models:
            return self._head.models.get(model_id)
        ahead = self.ahead.get(model_id)
        seen = self._at(self._past.models.get(model_id), self._head.models.get(model_id))
        return seen if ahead is None or (seen is not None and seen.revision >= ahead.revision) else ahead

    def _at(self, versions: list[tuple[int, T]] | None, now: T) -> T:
        for revision, before in versions or ():
            if revision > self.seen:
                return before
        return now


class _Models(Mapping[ModelId, ModelRecord]):
    def __init__(self, view: LaggedView) -> None:
        self._view = view

    def __getitem__(self, model_id: ModelId) -> ModelRecord:
        model = self._view._model(model_id)
        if model is None:
            raise KeyError(model_id)
        return model

    def get(self, model_id: ModelId, default: Any = None) -> Any:
        return self._view._model(model_id) or default

    def __contains__(self, model_id: object) -> bool:
        return isinstance(model_id, str) and self._view._model(model_id) is not None

    def __iter__(self) -> Iterator[ModelId]:
        view = self._view
        ids = dict.fromkeys(view._head.models) | dict.fromkeys(view._past.models) | dict.fromkeys(view.ahead)
        return (model_id for model_id in ids if view._model(model_id) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
