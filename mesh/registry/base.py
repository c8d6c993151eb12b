"""The registry's port: an ordered key-value store with compare-and-set, leases and a resumable watch.

Keys are text below one prefix that belongs to the mesh, not empty and not starting with U+0000 (an adapter's own);
values are small JSON documents. Every change has a revision, one number for the whole store that only grows. etcd's v3
API is the model; `memory` is its twin in one process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

CAS_TRIES: Final = 10
"""Compare-and-set attempts before somebody else's traffic on one record is an error."""


class RegistryError(Exception):
    """The store cannot be reached, or refuses; one sentence with the store's own reason."""


class Compacted(RegistryError):
    """The history a watch wanted to resume from is gone: take a new snapshot."""


class LeaseLost(RegistryError):
    """The session's lease ended; every key it carried is gone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as it stood at a revision."""

    key: str
    value: bytes
    revision: int
    """Of its latest change (etcd: mod_revision); what `Commit.expect` compares."""
    created: int
    """Revision at which it came into being (etcd: create_revision); orders pods for leadership."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """A key that is gone."""

    key: str
    revision: int


Change = Entry | Deleted


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys at one revision."""

    revision: int
    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Commit:
    """One atomic change: all expectations hold and everything is written, or nothing is.

    At most 120 expectations and 120 writes (etcd's --max-txn-ops is 128) of 1 MiB together; no key is written twice.
    """

    expect: Mapping[str, int] = field(default_factory=dict)
    """Key to the revision it must have now; 0: it must not exist."""
    put: Mapping[str, bytes] = field(default_factory=dict)
    delete: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert self.put.keys().isdisjoint(self.delete), "a commit either puts a key or deletes it"


class Session(Protocol):
    """A lease, kept alive until closed. Keys put through it vanish with it."""

    async def put(self, key: str, value: bytes) -> None:
        """Write a key bound to this lease. Safe to repeat.

        Raises:
            LeaseLost, RegistryError
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove a key this session has put, unless another session has taken it over. Safe to repeat.

        Raises:
            RegistryError
        """
        ...

    async def lost(self) -> None:
        """Return when the lease has ended, by loss or by `close`; its keys are gone, or will be within its TTL."""
        ...

    async def close(self) -> None:
        """Revoke the lease: its keys vanish now. Never raises; a dead store lets the TTL do it."""
        ...


class Registry(Protocol):
    """The store. Safe to use from many tasks of one event loop."""

    async def snapshot(self) -> Snapshot:
        """Everything under the prefix, read at one revision.

        Raises:
            RegistryError
        """
        ...

    def watch(self, after: int) -> AsyncGenerator[Sequence[Change], None]:
        """Every change with a revision greater than `after`, in order, at least once, for ever.

        Survives restarts and leader changes of the store by resuming after the last change it gave. A batch never
        ends in the middle of a revision. Who leaves it early closes it (contextlib.aclosing).

        Raises:
            Compacted: the history after `after` is gone.
            RegistryError: the store refuses for good (permission).
        """
        ...

    async def get(self, key: str) -> Entry | None:
        """The key as it stands now (linearizable).

        Raises:
            RegistryError
        """
        ...

    async def commit(self, change: Commit) -> int | None:
        """Apply atomically, once; the new revision, or None when an expectation does not hold.

        A connection that breaks meanwhile changes nothing about this: the answer is found out afterwards.

        Raises:
            RegistryError: the store stayed out of reach; it is then unknown whether the change was applied.
        """
        ...

    async def open_session(self, ttl_s: float) -> Session:
        """A new lease with this time to live.

        Raises:
            RegistryError
        """
        ...

    async def close(self) -> None:
        """Release connections. Sessions are closed by their owners first."""
        ...
