"""What lies in memory by the books, and by what the system says; whether the two agree.

**The process.** Expected are the bytes that it had when it began to serve, what importing frameworks took since, and
the books of what is loaded in it (not of models in other processes or servers, and not of synthetic ones, which take
none). Reality is the resident set once malloc has given back what is free. It may well be below: pages of mapped files
that nobody has read yet, or that the system has taken back. So only what it is above is an error, beyond 2 % of what is
expected and at least `FLOOR_BYTES`: the top of malloc's heap (64 MiB stay there for messages), free lists, and what
frameworks allocate in their first runs are no model's.

**A device.** What lies in its arena must be what the books say to the byte. What the device itself says is in use may
have grown by 2 % since the start (contexts of libraries, other processes). Arenas and slabs in host memory are shared
memory, and not counted to the process.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from loaders.base import LoaderError
from loaders.memory.process import give_back, private_bytes
from loaders.memory.store import Store
from loaders.memory.tiered import TieredModel
from mesh.models import Models, format_of
from mesh.resident import Resident
from placement.books import Books
from placement.engine import Engine
from placement.holdings import HoldState
from placement.lifecycle import CopyState
from placement.records import ModelId, TenantId, Tier

log = logging.getLogger(__name__)

SHARE: Final = 0.02
FLOOR_BYTES: Final = 128 << 20

_DEVICE: Final = {
    "promised": (CopyState.WAITING,),
    "loading": (CopyState.LOADING, CopyState.OVERDUE, CopyState.SIZING),
    "loaded": (CopyState.LOADED,),
    "unloading": (CopyState.UNLOADING,),
}
_LOWER: Final = {
    "promised": (HoldState.PROMISED,),
    "loading": (HoldState.FILLING,),
    "loaded": (HoldState.HELD,),
    "unloading": (HoldState.DROPPING,),
}


class TierBytes(NamedTuple):
    """The books of one tier."""

    name: str
    capacity: int
    by_state: dict[str, int]
    """Of `promised`, which lies nowhere yet, `loading`, `loaded`, `unloading`."""
    free: int
    """What nobody's bytes lie in."""
    shared: int
    """By how much what lies there is less than the books say: tensors that models have in common are stored once."""


class ModelBytes(NamedTuple):
    """One model in one tier."""

    model_id: ModelId
    tenant: TenantId
    tier: str
    state: str
    size: int
    charged: int
    """Its share of what is taken: of what models have in common, one has all. The same as `size` if nothing is."""


@dataclass(slots=True)
class Check:
    """What the last comparison found."""

    expected: int = 0
    resident: int = 0
    """Both of the process."""
    device_used: int = 0
    """As the device itself says, all processes; 0: there is none."""
    alarms: tuple[str, ...] = ()
    """What differs by more than it may, in sentences."""


class Memory:
    """Of one pod."""

    def __init__(
        self,
        engine: Engine,
        models: Models,
        store: Store | None,
        loaded: Callable[[], Iterable[tuple[ModelId, Resident]]],
        *,
        is_apart: bool,
    ) -> None:
        """`is_apart`: the device has memory of its own."""
        self._engine = engine
        self._models = models
        self._store = store
        self._loaded = loaded
        self._is_apart = is_apart
        self._baseline = self._device_baseline = 0
        self.last = Check()

    def begin(self) -> None:
        """Nothing is loaded yet."""
        self._baseline, self._device_baseline = private_bytes(), self._device_used()

    @property
    def lost(self) -> str:
        """Why the device is not used any more; empty: it is, or there is none."""
        return "" if self._store is None else self._store.lost

    def tiers(self) -> Iterator[TierBytes]:
        """The device, or where there is none, the process's own memory; then what lies below."""
        store, lower = self._store, self._engine.copies.lower
        device = "memory" if store is None else "device"
        yield _tier(device, self._engine.cache, _DEVICE, 0 if store is None else store.usage(store.device).saved_bytes)
        for tier, holdings in lower.items():
            in_slab = store is not None and tier is Tier.HOST
            shared = store.usage(store.host).saved_bytes if in_slab and store is not None else 0
            yield _tier(tier.value, holdings, _LOWER, shared)

    def models(self) -> Iterator[ModelBytes]:
        """Everything that takes bytes, largest first in each tier."""
        device = "memory" if self._store is None else "device"
        tiers: list[tuple[str, Books[Any, Any, Any]]] = [(device, self._engine.cache)]
        tiers += ((tier.value, holdings) for tier, holdings in self._engine.copies.lower.items())
        for name, books in tiers:
            told: list[Any] = [entry for entry in list(books.entries.values()) if entry.size_bytes]
            for entry in sorted(told, key=lambda entry: -entry.size_bytes):
                charged = self._charged(entry.model.model_id, entry.model.created, name, entry.size_bytes)
                yield ModelBytes(
                    entry.model.model_id, entry.model.tenant, name, entry.state.value, entry.size_bytes, charged
                )

    def tenants(self) -> Counter[tuple[TenantId, str]]:
        """Bytes by tenant and tier; what tenants have in common, once."""
        held: Counter[tuple[TenantId, str]] = Counter()
        for model in self.models():
            held[model.tenant, model.tier] += model.charged
        return held

    def check(self) -> Check:
        """Compare the books with reality. Blocks for some milliseconds."""
        give_back()
        expected, resident = self._expected(), private_bytes()
        alarms = []
        if resident - expected > max(SHARE * expected, FLOOR_BYTES):
            alarms.append(f"the process has {resident} bytes resident, {expected} are expected")
        alarms += self._store_alarms()
        used = self._device_used()
        if self._store is not None and used - self._device_baseline > SHARE * self._engine.limits.capacity_bytes:
            alarms.append(f"{used} bytes of the device are in use, {self._device_baseline} were at the start")
        for alarm in alarms:
            if alarm not in self.last.alarms:
                log.warning("memory: %s", alarm)
        self.last = Check(expected, resident, used, tuple(alarms))
        return self.last

    def _expected(self) -> int:
        here = 0
        for model_id, resident in list(self._loaded()):
            copy = self._engine.cache.copies.get(model_id)
            elsewhere = resident.forward is not None or resident.model.waits or isinstance(resident.model, TieredModel)
            if copy is not None and not elsewhere and format_of(copy.model) != "synthetic":
                here += resident.size_bytes
        return self._baseline + self._models.framework_bytes + here

    def _store_alarms(self) -> Iterator[str]:
        """While nothing moves, the books of engine and store are the same."""
        store, cache = self._store, self._engine.cache
        if store is None or store.lost:
            return
        moving = set(CopyState) - {CopyState.LOADED, CopyState.QUEUED, CopyState.FAILED, CopyState.GONE}
        before = cache.count(*moving)
        usage = store.usage(store.device)
        tiered = sum(r.model.size_bytes for _, r in list(self._loaded()) if isinstance(r.model, TieredModel))
        lies = usage.taken_bytes + usage.saved_bytes
        if not before and not cache.count(*moving) and lies != tiered:
            yield f"{lies} bytes of models lie on the device, {tiered} by the books"

    def _device_used(self) -> int:
        if self._store is None or self._store.lost or not self._is_apart:
            return 0
        try:
            return self._store.memory().used_bytes
        except LoaderError:  # which is told when the device is used
            return 0

    def _charged(self, model_id: ModelId, created: int, tier: str, size_bytes: int) -> int:
        store = self._store
        if store is None or tier == Tier.DISK.value:
            return size_bytes
        within, key = store.host if tier == Tier.HOST.value else store.device, (model_id, created)
        return store.charged_bytes(key, within) if store.holds(key, within) else size_bytes


def _tier(name: str, books: Books[Any, Any, Any], states: dict[str, tuple[Any, ...]], shared: int) -> TierBytes:
    by_state = {told: books.bytes_in(*among) for told, among in states.items()}
    return TierBytes(name, books.capacity_bytes, by_state, books.free_bytes, shared)
