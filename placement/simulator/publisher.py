"""What a pod tells the registry: wanted keys on one side, what was written on the other (`mesh.publisher`)."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from placement.records import CopyRecord, ModelId, Record, copy_key
from placement.simulator.clock import TICKS_PER_MS, ticks
from placement.simulator.registry import Session

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod

_BATCH: Final = 64
_RETRY: Final = 500 * TICKS_PER_MS


class Publisher:
    """Writes keys under one lease, the newest value of each; when the lease is lost, all of them under a new one."""

    def __init__(self, pod: SimPod) -> None:
        self.session: Session | None = None
        self._pod = pod
        self._clock = pod.world.clock
        self._registry = pod.world.registry
        self._renew_after = ticks(pod.world.options.lease_ttl_ms / 3)
        self._wanted: dict[str, Record] = {}
        self._dirty: dict[str, None] = {}
        self._writing = False
        self._closed = False

    def put(self, key: str, record: Record) -> None:
        if self._wanted.get(key) != record:
            self._wanted[key] = record
            self._touch(key)

    def delete(self, key: str) -> None:
        if self._wanted.pop(key, None) is not None:
            self._touch(key)

    def wanted_copy(self, model_id: ModelId) -> CopyRecord | None:
        """What the registry should hold of a copy here."""
        record = self._wanted.get(copy_key(self._pod.pod_id, model_id))
        return record if isinstance(record, CopyRecord) else None

    @property
    def is_behind(self) -> bool:
        """Whether something is not written yet."""
        return self._writing or bool(self._dirty)

    def connect(self, _: object = None) -> None:
        if not self._pod.alive or self._closed:
            return
        if self._pod.cut_off:
            self._clock.after(_RETRY, self.connect)
            return
        self.session = self._registry.open()
        self._clock.after(self._renew_after, self._renew, self.session)
        self._dirty = dict.fromkeys(self._wanted)
        if not self._writing:
            self._write()

    def close(self) -> None:
        """Give the lease back, and with it all keys."""
        self._closed = True
        if self.session is not None and not self._pod.cut_off:
            self._registry.end(self.session)
        self.session = None

    def _renew(self, session: Session) -> None:
        if self.session is not session or not self._pod.alive:
            return
        if self._pod.cut_off:
            self._clock.after(self._renew_after, self._renew, session)
        elif session.alive:
            session.renewed = self._clock.now
            self._clock.after(self._renew_after, self._renew, session)
        else:
            self.session = None
            self.connect()

    def _touch(self, key: str) -> None:
        self._dirty[key] = None
        if not self._writing:
            self._write()

    def _write(self, _: object = None) -> None:
        """Send what is dirty; one batch is under way at a time."""
        self._writing = bool(self._dirty) and self.session is not None and self._pod.alive
        if self._writing:
            batch = {key: self._wanted.get(key) for key in islice(self._dirty, _BATCH)}
            for key in batch:
                del self._dirty[key]
            ms = self._pod.rng.expovariate(1 / self._pod.world.options.write_ms)
            self._clock.after(ticks(ms), self._written, (self.session, batch))

    def _written(self, what: tuple[Session, dict[str, Record | None]]) -> None:
        session, batch = what
        if not self._pod.alive:
            return
        if session.alive and not self._pod.cut_off:
            for key, record in batch.items():
                self._registry.put(key, record, session)
            self._pod.serving = not self._closed
            self._write()
        else:
            self._dirty |= dict.fromkeys(batch)
            self._clock.after(_RETRY, self._write)
