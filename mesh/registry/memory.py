"""The registry inside one process: for tests, simulations of many pods, and a first try without etcd.

Several `MemoryRegistry` on one `MemoryStore` behave like several pods on one etcd. Nothing here looks at a clock: a
lease lives until it is closed or `MemoryStore.expire` ends it, as a pod's crash would.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Final
from weakref import WeakValueDictionary

from mesh.registry.base import Change, Commit, Compacted, Deleted, Entry, LeaseLost, Session, Snapshot

HISTORY: Final = 10_000
"""Changes kept for watches that lag or resume; older ones are compacted away."""


class MemoryStore:
    """Keys, their history, and who holds them. Every method is one atomic step: none of them awaits."""

    def __init__(self, history: int = HISTORY) -> None:
        self.revision = 1  # as in an empty etcd, so that 0 can mean "does not exist"
        self._entries: dict[str, Entry] = {}
        self._holders: dict[str, MemorySession] = {}
        self._changes: list[Change] = []
        self._keep = history
        self._compacted = 0
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<MemoryStore revision={self.revision} keys={len(self._entries)} changes={len(self._changes)}>"

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, sorted(self._entries.values(), key=lambda entry: entry.key))

    def write(self, put: Mapping[str, bytes], delete: Iterable[str], holder: MemorySession | None = None) -> int:
        """Apply under one new revision, and return it; what the keys were bound to before no longer holds them."""
        revision, before = self.revision + 1, len(self._changes)
        for key, value in put.items():
            old = self._entries.get(key)
            entry = Entry(key, value, revision, old.created if old else revision)
            self._entries[key] = entry
            self._changes.append(entry)
            self._bind(key, holder)
        for key in delete:
            if self._entries.pop(key, None) is not None:
                self._changes.append(Deleted(key, revision))
                self._bind(key, None)
        if len(self._changes) > before:
            self.revision = revision
            self._changed.set()
            self._changed = asyncio.Event()
        if len(self._changes) > 2 * self._keep:
            self.compact(self._changes[-self._keep].revision)
        return self.revision

    def _bind(self, key: str, holder: MemorySession | None) -> None:
        if holder is None:
            self._holders.pop(key, None)
        else:
            self._holders[key] = holder

    def holder(self, key: str) -> MemorySession | None:
        return self._holders.get(key)

    def expire(self, session: Session) -> None:
        """End a lease from the store's side; its keys go under one revision."""
        assert isinstance(session, MemorySession)
        session.ended.set()
        self.write({}, sorted(key for key, holder in self._holders.items() if holder is session))

    def compact(self, revision: int) -> None:
        """Forget the changes before a revision (etcd KV.Compact)."""
        self._compacted = max(self._compacted, revision)
        self._changes = self._since(self._compacted - 1)

    def since(self, after: int) -> Sequence[Change]:
        """The changes after a revision.

        Raises:
            Compacted: some of them are forgotten.
        """
        if after + 1 < self._compacted:
            raise Compacted(f"changes before revision {self._compacted} are forgotten")
        return self._since(after)

    def _since(self, after: int) -> list[Change]:
        return self._changes[bisect_right(self._changes, after, key=lambda change: change.revision) :]

    async def wait(self) -> None:
        """Return after the next change."""
        await self._changed.wait()


class MemorySession:
    """A lease of a `MemoryStore` (`base.Session`)."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.ended = asyncio.Event()

    async def put(self, key: str, value: bytes) -> None:
        if self.ended.is_set():
            raise LeaseLost("the session has ended")
        self._store.write({key: value}, (), self)

    async def delete(self, key: str) -> None:
        if self._store.holder(key) is self:
            self._store.write({}, (key,))

    async def lost(self) -> None:
        await self.ended.wait()

    async def close(self) -> None:
        self._store.expire(self)


class MemoryRegistry:
    """One pod's view of a store (`base.Registry`)."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = MemoryStore() if store is None else store

    async def snapshot(self) -> Snapshot:
        return self.store.snapshot()

    async def watch(self, after: int) -> AsyncGenerator[Sequence[Change], None]:
        while True:
            if changes := self.store.since(after):
                after = changes[-1].revision
                yield changes
            else:
                await self.store.wait()

    async def get(self, key: str) -> Entry | None:
        return self.store.get(key)

    async def commit(self, change: Commit) -> int | None:
        for key, revision in change.expect.items():
            entry = self.store.get(key)
            if (entry.revision if entry else 0) != revision:
                return None
        return self.store.write(change.put, change.delete)

    async def open_session(self, ttl_s: float) -> Session:
        return MemorySession(self.store)

    async def close(self) -> None:
        """Nothing is held."""


_named: Final[WeakValueDictionary[str, MemoryStore]] = WeakValueDictionary()


def open_url(url: str) -> MemoryRegistry:
    """The store named by memory://name, or one of its own for memory://.

    Raises:
        ValueError: something follows the name.
    """
    name = url.removeprefix("memory://")
    if not name:
        return MemoryRegistry()
    if not name.isidentifier():
        raise ValueError("expected memory:// or memory://name, the name of letters, digits and underscores")
    store = _named.get(name)
    if store is None:
        store = _named[name] = MemoryStore()
    return MemoryRegistry(store)
