"""Objects to files: parallel ranged reads, each tried again with growing pauses; nothing is trusted before its length
and, where the store tells one, its checksum are right."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
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
_HASH_CHUNK_BYTES: Final = 4 << 20


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


def fetch(store: Store, entries: Sequence[Entry], folder: Path, stopped: threading.Event) -> None:
    """Write the entries into a directory, durably. What is left there after an error is the caller's to remove.

    Raises:
        LoaderError: with the store's reason, or that of the disk.
    """
    failed = threading.Event()

    def halted() -> bool:
        return stopped.is_set() or failed.is_set()

    files: list[int] = []
    with ThreadPoolExecutor(PARALLEL, "fetch") as pool:
        try:
            with disk_told():
                for entry in entries:
                    path = inside(folder, entry.name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                    if entry.size_bytes:
                        os.posix_fallocate(files[-1], 0, entry.size_bytes)  # a full disk is found out first
            try:
                _all(pool, [_reading(store, *each, halted, stopped) for each in _parts(entries, files)])
            except RangesNotSupported:
                for entry, file in zip(entries, files, strict=True):
                    _retried(lambda entry=entry, file=file: _stream(store, entry, file, halted), stopped)  # type: ignore[misc]
            _all(pool, [_closing(store, *each) for each in zip(entries, files, strict=True)])
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
            for file in files:
                os.close(file)


def _all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs; the first failure is raised and what has not begun is left."""
    done, waiting = wait([pool.submit(job) for job in jobs], return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    for future in done:
        if not future.cancelled():
            future.result()


def _parts(entries: Sequence[Entry], files: Sequence[int]) -> Iterator[tuple[Entry, int, int, int]]:
    for entry, file in zip(entries, files, strict=True):
        for start in range(0, entry.size_bytes, PART_BYTES):
            yield entry, file, start, min(start + PART_BYTES, entry.size_bytes)


def _reading(
    store: Store, entry: Entry, file: int, start: int, end: int, halted: Callable[[], bool], stopped: threading.Event
) -> Callable[[], None]:
    def read() -> None:
        if halted():
            raise Halted("the pod is stopping", retryable=True)
        data = store.read(entry, start, end)
        if len(data) != end - start:
            raise LoaderError(f"{entry.key}: {len(data)} bytes came, {end - start} were asked for", retryable=True)
        _write(file, data, start)

    return lambda: _retried(read, stopped)


def _stream(store: Store, entry: Entry, file: int, halted: Callable[[], bool]) -> None:
    position = 0
    for data in store.stream(entry):
        if halted():
            raise Halted("the pod is stopping", retryable=True)
        position += len(data)
        if position > entry.size_bytes:
            break
        _write(file, data, position - len(data))
    if position != entry.size_bytes:
        raise LoaderError(f"{entry.key}: {position} bytes came, {entry.size_bytes} were told", retryable=True)


def _write(file: int, data: memoryview, position: int) -> None:
    with disk_told():
        while data:
            written = os.pwrite(file, data, position)
            data, position = data[written:], position + written


def _retried(work: Callable[[], T], stopped: threading.Event) -> T:
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except LoaderError as error:
            if not error.retryable or isinstance(error, Halted | DiskError) or stopped.wait(_PAUSE_S * 2**attempt):
                raise
    return work()


def _closing(store: Store, entry: Entry, file: int) -> Callable[[], None]:
    def close() -> None:
        with disk_told():
            os.fsync(file)
            if entry.md5 and store.etag_is_md5 and _md5(file) != entry.md5:
                raise LoaderError(
                    f"{entry.key}: its checksum differs from the store's ETag (ETags of buckets encrypted with KMS are "
                    'no checksums: "etag_md5": false in the storage key says so)',
                    retryable=True,
                )

    return close


def _md5(file: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    position = 0
    while chunk := os.pread(file, _HASH_CHUNK_BYTES, position):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()


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
