"""Tenants on one pod: whose copies are given up for whose, and whose loads start first.

A tenant without a record has the weight 1, no guarantee and no limit; all models without a tenant are one tenant.

- Share: a tenant's weight over that of all tenants with bytes here, of the pod's capacity. Free room is anybody's; when
  there is none, those above their share give first, the one that asks among them.
- Guarantee: others' loads never bring a tenant below its floor, which is its guarantee held pod by pod in proportion to
  capacity. So a pod needs nobody's word to keep it, and no race between pods can break it. Copies are whole: one that
  reaches across the floor stays.
- Limit: a tenant's bytes in the whole mesh, as far as this pod sees. Above it, a load takes the tenant's own room.
- Turns: loads start in the order of the work that each tenant's earlier loads were, over its weight (start-time fair
  queueing, Goyal et al. 1996), so that one tenant's storm does not make the others wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol, TypeVar

from placement.records import PodId, TenantId, TenantRecord
from placement.view import ClusterView

_NO_RECORD: Final = TenantRecord("")
_REMEMBERED: Final = 1_024
"""Tenants with a place in the order, before those whose turn has passed are forgotten."""


class Candidate(Protocol):
    """What `choose` needs of a copy."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def tenant(self) -> TenantId: ...


class Tenants:
    """Shares, floors and turns of the tenants on one pod."""

    def __init__(self, pod_id: PodId, capacity_bytes: int, view: ClusterView) -> None:
        self._pod_id = pod_id
        self._capacity_bytes = capacity_bytes
        self._view = view
        self._mesh_bytes = capacity_bytes
        self._now = 0.0
        """Virtual time: where the last load stood that has started. Whoever comes late starts from here."""
        self._until: dict[TenantId, float] = {}
        """Until when, in virtual time, the tenant's loads so far are its due."""

    def refresh(self) -> None:
        """Take note of the pods there are now: what guarantees are divided by."""
        others = sum(pod.capacity_bytes for pod in self._view.pods.values() if pod.pod_id != self._pod_id)
        self._mesh_bytes = self._capacity_bytes + others

    def record(self, tenant: TenantId) -> TenantRecord:
        return self._view.tenants.get(tenant, _NO_RECORD)

    def shares(self, used_bytes: Mapping[TenantId, int], asking: TenantId) -> Shares:
        """Of the tenants with bytes here, and of the one that asks for some."""
        present = {tenant for tenant, size_bytes in used_bytes.items() if size_bytes} | {asking}
        return Shares(self, self._capacity_bytes, sum(self.weight(tenant) for tenant in present))

    def weight(self, tenant: TenantId) -> int:
        return max(1, self.record(tenant).weight)

    def floor_bytes(self, tenant: TenantId) -> int:
        """What others' loads leave to the tenant here."""
        return self.record(tenant).guaranteed_bytes * self._capacity_bytes // self._mesh_bytes

    def above_limit_bytes(self, tenant: TenantId, used_bytes: int, need_bytes: int) -> int:
        """By how much a load of `need_bytes` would pass the tenant's limit; `used_bytes` are its bytes here."""
        limit_bytes = self.record(tenant).max_bytes
        if not limit_bytes:
            return 0
        return max(0, self._view.tenant_bytes(tenant, without=self._pod_id) + used_bytes + need_bytes - limit_bytes)

    def gives_first(self, tenant: TenantId, used_bytes: int) -> bool:
        """Whether the tenant is above its limit, and no pod has more of its bytes than this one."""
        if not self.above_limit_bytes(tenant, used_bytes, 0):
            return False
        pods = self._view.tenant_pods(tenant).items()
        return all((used_bytes, self._pod_id) > (held_bytes, pod) for pod, held_bytes in pods if pod != self._pod_id)

    def may_start(self, tenant: TenantId, loads: int) -> bool:
        """Whether a tenant with so many loads under way here may start another."""
        most = self.record(tenant).max_loads
        return not most or loads < most

    def turn(self, tenant: TenantId) -> float:
        """Where the tenant's next load stands in the order of loads: the lowest goes first."""
        return max(self._now, self._until.get(tenant, self._now))

    def started(self, tenant: TenantId, work: float) -> None:
        """A load of this much work has started, out of its turn perhaps."""
        begun = self.turn(tenant)
        self._now = max(self._now, begun)
        self._until[tenant] = begun + work / self.weight(tenant)
        if len(self._until) > _REMEMBERED:
            self._until = {other: until for other, until in self._until.items() if until > self._now}


class Shares:
    """What each tenant may have of a full pod, at one moment."""

    def __init__(self, tenants: Tenants, capacity_bytes: int, weights: int) -> None:
        self._tenants = tenants
        self._capacity_bytes = capacity_bytes
        self._weights = weights

    def share_bytes(self, tenant: TenantId) -> int:
        return self._capacity_bytes * self._tenants.weight(tenant) // self._weights

    def floor_bytes(self, tenant: TenantId) -> int:
        return self._tenants.floor_bytes(tenant)


C = TypeVar("C", bound=Candidate)


def choose(
    coldest: Iterable[C],
    need_bytes: int,
    own_bytes: int,
    asking: TenantId,
    used_bytes: Mapping[TenantId, int],
    shares: Shares,
) -> list[C] | None:
    """Copies to give up for `need_bytes` more for one tenant, of which `own_bytes` must be its own.

    `coldest` are those that can be given up at all, first to go first. None: there are not enough.

    1. The asking tenant's own, as far as its limit demands.
    2. Of tenants above their share, as long as they are above it.
    3. Of anybody, down to their floors; the asking tenant has none against itself.
    """
    if own_bytes <= 0 and used_bytes.keys() <= {asking}:
        return _first(coldest, need_bytes)
    order = list(coldest)
    left = dict(used_bytes)
    left[asking] = left.get(asking, 0) + need_bytes
    taken: dict[int, C] = {}

    def is_owed(copy: C) -> bool:
        return own_bytes > 0 and copy.tenant == asking

    def is_above_share(copy: C) -> bool:
        return left[copy.tenant] > shares.share_bytes(copy.tenant) and is_spare(copy)

    def is_spare(copy: C) -> bool:
        above_floor = left[copy.tenant] - copy.size_bytes >= shares.floor_bytes(copy.tenant)
        return above_floor or copy.tenant == asking

    for may_go in (is_owed, is_above_share, is_spare):
        for at, copy in enumerate(order):
            if need_bytes <= 0 and own_bytes <= 0:
                return [taken[at] for at in sorted(taken)]
            if at not in taken and may_go(copy):
                taken[at] = copy
                left[copy.tenant] -= copy.size_bytes
                need_bytes -= copy.size_bytes
                own_bytes -= copy.size_bytes if copy.tenant == asking else 0
    return [taken[at] for at in sorted(taken)] if need_bytes <= 0 and own_bytes <= 0 else None


def _first(coldest: Iterable[C], need_bytes: int) -> list[C] | None:
    """The usual case, one tenant below its limit: as few of the coldest as will do, and no more are looked at."""
    chosen: list[C] = []
    for copy in coldest:
        chosen.append(copy)
        need_bytes -= copy.size_bytes
        if need_bytes <= 0:
            return chosen
    return None
