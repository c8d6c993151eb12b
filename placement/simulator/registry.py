"""One registry for all pods: revisions, leases, and watches that bring changes late, in order and in batches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Final

from placement.records import CopyRecord, ModelRecord, PodId, PodRecord, Record
from placement.simulator.clock import TICKS_PER_MS, Clock, Tick
from placement.simulator.views import Change, Past
from placement.view import ClusterView

_BATCH: Final = 5 * TICKS_PER_MS
"""Watchers hear of the changes of so long a time together."""


@dataclass(eq=False, slots=True)
class Session:
    """A pod's lease, and the keys that go with it."""

    renewed: Tick
    alive: bool = True
    keys: dict[str, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Batch:
    """One delivery of the watch. Pods hold the one they have seen; older ones are nobody's."""

    tick: Tick
    revision: int
    changes: list[Change]
    rare: list[Change]
    """Of those, the ones that are not about pods and copies."""
    pods: dict[PodId, PodRecord]
    """All of them, as of this revision."""
    sizes: tuple[int, int]
    """Sum and number of the models' known sizes, as of this revision."""
    next: Batch | None = None


class Registry:
    """`head` is the newest state; `past` is what it replaced, for as long as some pod has not seen that."""

    def __init__(self, clock: Clock, lease_ttl: Tick) -> None:
        self.head = ClusterView()
        self.past = Past(self.head)
        self.revision = 0
        self.last = Batch(0, 0, [], [], {}, (0, 0))
        self.on_batch: Callable[[Batch], None] = lambda batch: None
        self._clock = clock
        self._lease_ttl = lease_ttl
        self._records: dict[str, Record] = {}
        self._holders: dict[str, Session] = {}
        self._changes: list[Change] = []
        self._pods_changed = False

    @property
    def records(self) -> Collection[Record]:
        return self._records.values()

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def open(self) -> Session:
        session = Session(self._clock.now)
        self._clock.after(self._lease_ttl, self._end_unless_renewed, session)
        return session

    def end(self, session: Session) -> None:
        """The lease ends, and its keys with it."""
        if session.alive:
            session.alive = False
            for key in list(session.keys):
                self.put(key, None)

    def put(self, key: str, record: Record | None, session: Session | None = None) -> None:
        """Write, or delete (None). The key is bound to the session's lease, if there is one."""
        before = self._records.get(key)
        if before is None and record is None:
            return
        holder = self._holders.pop(key, None)
        if holder is not None:
            del holder.keys[key]
        self.revision += 1
        if record is None:
            del self._records[key]
        else:
            record = self._records[key] = _stamped(record, before, self.revision)
            if session is not None:
                self._holders[key] = session
                session.keys[key] = None
        self._pods_changed |= key.startswith("pods/")
        change = Change(self.revision, key, record)
        self.past.keep(change)
        if record is None:
            self.head.remove(key, self.revision)
        else:
            self.head.apply(record)
        if not self._changes:
            self._clock.after(_BATCH - self._clock.now % _BATCH, self._deliver)
        self._changes.append(change)

    def _deliver(self, _: object) -> None:
        pods = dict(self.head.pods) if self._pods_changed else self.last.pods
        rare = [change for change in self._changes if not change.key.startswith(("copies/", "pods/"))]
        batch = Batch(self._clock.now, self.revision, self._changes, rare, pods, self.past.sizes())
        self._changes, self._pods_changed = [], False
        self.last.next = batch
        self.last = batch
        self.on_batch(batch)

    def _end_unless_renewed(self, session: Session) -> None:
        left = session.renewed + self._lease_ttl - self._clock.now
        if left > 0 and session.alive:
            self._clock.after(left, self._end_unless_renewed, session)
        else:
            self.end(session)


def _stamped(record: Record, before: Record | None, revision: int) -> Record:
    """With the registry's own numbers (`placement.records`)."""
    if isinstance(record, CopyRecord):
        return record
    if isinstance(record, (ModelRecord, PodRecord)):
        created = before.created if isinstance(before, (ModelRecord, PodRecord)) else revision
        return replace(record, revision=revision, created=created)
    return replace(record, revision=revision)
