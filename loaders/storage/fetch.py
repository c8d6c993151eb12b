"""Objects to files: parallel ranged reads, each tried again with growing pauses; nothing is trusted before its length
and, where the store tells one, its checksum are right."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from loaders.base import LoaderError
from loaders.storage.archive import MAX_FILES, inside
from loaders.storage.base import Entry, RangesNotSupported, Store

T = TypeVar("T")

PARALLEL: Final = 8
"""Reads at once; S3's own advice is one per 85 to 90 MB/s of network ("Performance guidelines for Amazon S3")."""
PART_BYTES: Final = 8 << 20
ATTEMPTS: Final = 3
"""Of each part, after the client's own retries of its request."""
_PAUSE_S: Final = 0.2
_HASH_CHUNK_BYTES: Final = 1 << 20
NO_SUMS: Final[Mapping[str, str]] = {}
_ETAG_DIFFERS: Final = (
    "its checksum differs from the store's ETag (ETags of buckets encrypted with KMS are no checksums: "
    '"etag_md5": false in the storage key says so)'
)


def find(store: Store, key: str) -> list[Entry]:
    """The files of an artifact: the object `key`, or those under `key/`, by name.

    Raises:
        LoaderError: there are none (retryable), too many, or the store refuses.
    """
    denied: LoaderError | None = None
    try:
        entry = store.stat(key)
    except LoaderError as error:  # S3 denies a HEAD without a reason, and if the key is absent and may not be listed
        entry, denied = None, error
    if entry is not None and (entry.size_bytes or not key):
        return [entry]
    if denied is not None and denied.retryable:
        raise denied
    found: list[Entry] = []
    for each in store.list(key):
        found.append(each)
        if len(found) > MAX_FILES:
            raise LoaderError(f"{store.identity}/{key} holds more than {MAX_FILES} files")
    folders = {key} | {str(parent) for each in found for parent in Path(each.key).parents}
    found = [each for each in found if each.size_bytes or each.key not in folders]  # consoles mark folders with objects
    if not found and denied is not None:
        raise denied
    if not found and entry is None:
        told = f"/{key}: there is no such object, nor any under {key}/" if key else ": there is nothing there"
        raise LoaderError(f"{store.identity}{told}", retryable=True)
    return sorted(found, key=lambda each: each.name) or [entry for entry in (entry,) if entry]


def fetch(
    store: Store, entries: Sequence[Entry], folder: Path, stopped: threading.Event, sha256: Mapping[str, str] = NO_SUMS
) -> None:
    """Write the entries into a directory; they are not on disk before someone has them synced. What is left there after
    an error is the caller's to remove. `sha256`: what the files of some names must have, in hex.

    Raises:
        LoaderError: with the store's reason, or that of the disk.
    """
    failed = threading.Event()

    def halted() -> bool:
        return stopped.is_set() or failed.is_set()

    with ThreadPoolExecutor(PARALLEL, "fetch") as pool:
        try:
            files = [_File(store, entry, inside(folder, entry.name), sha256.get(entry.name, "")) for entry in entries]
            try:
                _all(pool, [_reading(store, *each, halted, stopped) for each in _parts(files)])
                _all(pool, [file.check for file in files])
            except RangesNotSupported:
                pool.shutdown(cancel_futures=True)
                for file in files:
                    _retried(lambda file=file: _stream(store, file, halted), stopped)  # type: ignore[misc]
                    file.check()
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)


def _all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs; the first failure is raised and what has not begun is left."""
    done, waiting = wait([pool.submit(job) for job in jobs], return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    for future in done:
        if not future.cancelled():
            future.result()


class _File:
    """An entry on its way to disk: written in parts that come in any order, and hashed meanwhile."""

    def __init__(self, store: Store, entry: Entry, path: Path, sha256: str) -> None:
        self.entry = entry
        self._path = path
        self._expected = {"sha256": sha256 or entry.sha256, "md5": entry.md5 if store.etag_is_md5 else ""}
        self._writing = threading.Lock()
        self._hashing = threading.Lock()
        self.restart()
        with disk_told():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except (FileExistsError, NotADirectoryError):
                raise LoaderError(
                    f"{entry.name[:200]!r} or a part of its path is both a file and a directory"
                ) from None
            try:
                if entry.size_bytes:
                    os.posix_fallocate(file, 0, entry.size_bytes)  # a full disk is found out first
            finally:
                os.close(file)

    def restart(self) -> None:
        """It is written from its start (again)."""
        self._hashes = [
            (name, hashlib.new(name, usedforsecurity=False), digest)
            for name, digest in self._expected.items()
            if digest
        ]
        self._hashed_bytes = 0
        self._ends: dict[int, int] = {}
        """Of the parts that are written and not hashed yet, by their starts."""

    def write(self, data: memoryview, start: int) -> None:
        position, end = start, start + len(data)
        # One thread at a time: in the kernel, writers of one file would spin while they wait for each other.
        with disk_told(), self._writing, self._opened(os.O_WRONLY) as file:
            while position < end:
                position += os.pwrite(file, data[position - start :], position)
        if self._hashes:
            self._ends[start] = end
            if self._hashing.acquire(blocking=False):  # else `check` does, or whoever writes next
                try:
                    self._hash()
                finally:
                    self._hashing.release()

    def check(self) -> None:
        """All has been written.

        Raises:
            LoaderError: a checksum differs.
        """
        if self._hashes:
            self._hash()
        for name, hash_, expected in self._hashes:
            if hash_.hexdigest() != expected:
                where = self.entry.key or self.entry.name
                if name == "md5":
                    raise LoaderError(f"{where}: {_ETAG_DIFFERS}", retryable=True)
                says = "the store says" if expected == self.entry.sha256 else "storage_params say"
                raise LoaderError(f"{where}: its sha256 is {hash_.hexdigest()}, {says} {expected}")

    def _hash(self) -> None:
        """As far as there is no gap. What was just written is read from memory, not from disk."""
        with disk_told(), self._opened(os.O_RDONLY) as file:
            buffer = memoryview(bytearray(min(_HASH_CHUNK_BYTES, self.entry.size_bytes)))
            while (end := self._ends.pop(self._hashed_bytes, None)) is not None:
                while self._hashed_bytes < end:
                    length = os.preadv(file, [buffer[: end - self._hashed_bytes]], self._hashed_bytes)
                    if not length:
                        raise OSError("a file became shorter")
                    for _, hash_, _ in self._hashes:
                        hash_.update(buffer[:length])
                    self._hashed_bytes += length

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        """Not for as long as the fetch takes: there may be more files than a process may have open."""
        file = os.open(self._path, flags | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)


def _parts(files: Sequence[_File]) -> Iterator[tuple[_File, int, int]]:
    for file in files:
        for start in range(0, file.entry.size_bytes, PART_BYTES):
            yield file, start, min(start + PART_BYTES, file.entry.size_bytes)


def _reading(
    store: Store, file: _File, start: int, end: int, halted: Callable[[], bool], stopped: threading.Event
) -> Callable[[], None]:
    def read() -> None:
        if halted():
            raise Halted("the pod is stopping", retryable=True)
        data = store.read(file.entry, start, end)
        if len(data) != end - start:
            raise LoaderError(f"{file.entry.key}: {len(data)} bytes came, {end - start} were asked for", retryable=True)
        file.write(data, start)

    return lambda: _retried(read, stopped)


def _stream(store: Store, file: _File, halted: Callable[[], bool]) -> None:
    entry = file.entry
    file.restart()
    position = 0
    for data in store.stream(entry):
        if halted():
            raise Halted("the pod is stopping", retryable=True)
        position += len(data)
        if position > entry.size_bytes:
            break
        file.write(data, position - len(data))
    if position != entry.size_bytes:
        raise LoaderError(f"{entry.key}: {position} bytes came, {entry.size_bytes} were told", retryable=True)


def _retried(work: Callable[[], T], stopped: threading.Event) -> T:
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except LoaderError as error:
            if not error.retryable or isinstance(error, Halted | DiskError) or stopped.wait(_PAUSE_S * 2**attempt):
                raise
    return work()


class Halted(LoaderError):
    """Another part has failed, or the pod stops."""


class DiskError(LoaderError):
    """The disk's own failure; asking the store again does not help."""


@contextmanager
def disk_told() -> Iterator[None]:
    """What goes wrong on the cache's disk, as a sentence.

    Raises:
        DiskError: retryable: another pod's disk, or this one later, may do.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"the model cache cannot be written: {error.strerror or error}", retryable=True) from error
