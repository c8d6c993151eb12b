"""Fetched artifacts on local disk: by content, up to a number of bytes, shared by the pods of a node.

    DIR/<digest>/             an artifact: `files`, complete, since it got this name by a rename, and `manifest.json`,
                              written once they are synced
    DIR/<digest>.partial/     what is being fetched; `.gone`: removed
    DIR/<digest>.lock         flock: exclusive while it is fetched or removed, shared while it is in use.
                              Its text is the bytes that the entry takes or will take, its time the last use's
                              beginning or end.
    DIR/lock                  flock: exclusive while room is counted and made

Locks go with their process, so a crash leaves bytes and no lock: what nobody holds is checked and cleared at start. An
entry may be used before it is on disk: syncing goes on beside. If the machine dies meanwhile, it has no manifest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from loaders.base import LoaderError
from loaders.storage.fetch import disk_told

log = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_DROP_TRIES: Final = 20
_JUST_NOW_S: Final = 1.0
"""Uses that are closer are one."""
_MANIFEST: Final = "manifest.json"
_UNSYNCED: Final = "manifest.new"


class Lease:
    """An entry in use: its files stay until `close`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    @property
    def digest(self) -> str:
        return self.folder.parent.name

    @property
    def size_bytes(self) -> int:
        """That the entry takes, as long as it is not closed."""
        return int(os.pread(self._lock, 32, 0) or 0)

    def close(self) -> None:
        if self._lock >= 0:
            with suppress(OSError):
                _used_now(self._lock)
            os.close(self._lock)
            self._lock = -1


class Cache:
    """The entries in a directory, which several processes may share."""

    def __init__(self, root: Path, max_bytes: int | None, stopped: threading.Event) -> None:
        """`max_bytes`: None is a third of what is free and what the cache has; a pod has two of these. What an earlier
        crash left is removed.

        Raises:
            LoaderError: the directory cannot be used.
        """
        self.root = root
        self._stopped = stopped
        self._syncing = ThreadPoolExecutor(1, "sync")
        with disk_told():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._counting():
                self._sweep()
                free = shutil.disk_usage(root).free
                self.max_bytes = (free + self.used_bytes()) // 3 if max_bytes is None else max_bytes

    def get(self, digest: str, size_bytes: int, fill: Callable[[Path, Room], None]) -> Lease:
        """The entry, filled into an empty directory first if it is not there; `fill` makes `files` in it.

        Raises:
            LoaderError: from `fill`; or it does not fit beside what is in use.
        """
        if size_bytes > self.max_bytes:
            raise LoaderError(f"its files take {size_bytes} bytes, the model cache may have {self.max_bytes}")
        with disk_told():
            while True:
                lock = self._locked(digest, fcntl.LOCK_SH)
                if lock is not None and self._is_there(digest):
                    if (
                        time.time() > os.fstat(lock).st_mtime + _JUST_NOW_S
                    ):  # a write that would wait for what is synced
                        os.utime(lock)
                    return Lease(self.root / digest / "files", lock)
                if lock is not None:
                    os.close(lock)
                lock = self._locked(digest, fcntl.LOCK_EX)
                if lock is None:  # somebody fetches it, here or in another pod
                    if self._stopped.wait(_POLL_S):
                        raise LoaderError("the pod is stopping", retryable=True)
                    continue
                try:
                    if not self._is_there(digest):
                        self._fill(digest, lock, size_bytes, fill)
                finally:
                    os.close(lock)

    def find(self, digest: str) -> Lease | None:
        """The entry, if it is there now.

        Raises:
            LoaderError: the directory cannot be used.
        """
        with disk_told():
            if not self._is_there(digest):
                return None
            lock = self._locked(digest, fcntl.LOCK_SH)
            if lock is None:
                return None
            if not self._is_there(digest):
                os.close(lock)
                return None
            os.utime(lock)
            return Lease(self.root / digest / "files", lock)

    def has(self, digest: str) -> bool:
        """Whether the entry is there; nothing keeps it from being removed by the time this answers."""
        return self._is_there(digest)

    def release(self, digest: str) -> None:
        """Remove the entry, unless somebody uses it.

        Raises:
            LoaderError: the directory cannot be used.
        """
        with disk_told(), self._counting():
            self._remove(digest)

    def drop(self, digest: str) -> bool:
        """Remove the entry; False: somebody uses it.

        Raises:
            LoaderError: the directory cannot be used.
        """
        with disk_told():
            for _ in range(_DROP_TRIES):
                with self._counting():
                    self._remove(digest)
                if not self._is_there(digest):
                    return True
                self._stopped.wait(_POLL_S)  # it may still be on its way to the disk
            return False

    def close(self) -> None:
        """Wait until what was fetched is on disk; nothing more may be."""
        self._syncing.shutdown()

    def used_bytes(self) -> int:
        """Of all entries, those being fetched included."""
        return sum(map(_size_in, self._locks()))

    def _locks(self) -> list[Path]:
        return [path for path in self.root.glob("*.lock") if _is_digest(path.stem)]

    def _fill(self, digest: str, lock: int, size_bytes: int, fill: Callable[[Path, Room], None]) -> None:
        partial = self.root / f"{digest}.partial"
        try:
            room = Room(self, lock)
            room.take(size_bytes)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            fill(partial, room)
            sizes = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial / "files")}
            room.take(sum(sizes.values()))
            (partial / _UNSYNCED).write_text(json.dumps(sizes))
            folders = {"files"} | {str(parent) for name in sizes for parent in Path(name).parents}
            folder = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            partial.rename(self.root / digest)
            self._syncing.submit(self._settle, digest, (*sizes, _UNSYNCED, *folders), folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                (self.root / f"{digest}.lock").unlink()
            raise

    def _settle(self, digest: str, names: Iterable[str], folder: int) -> None:
        """Have an entry outlast the machine. It may be removed meanwhile, and even come anew."""
        try:
            for name in names:
                _sync(name, folder)
            _sync(self.root / f"{digest}.lock")
            os.rename(_UNSYNCED, _MANIFEST, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
            _sync(self.root)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("model cache: an entry is not safe on disk and goes at the next start: %s", error)
        finally:
            os.close(folder)

    def _make_room(self, lock: int, size_bytes: int) -> None:
        """Write down what an entry takes, once that much is free; the entries used longest ago go."""
        with self._counting():
            mine = os.fstat(lock).st_ino
            others: list[tuple[int, Path]] = []
            for path in self._locks():
                with suppress(FileNotFoundError):  # of a fetch that failed meanwhile
                    status = path.stat()
                    if status.st_ino != mine:
                        others.append((status.st_mtime_ns, path))
            used = sum(_size_in(path) for _, path in others)
            for _, path in sorted(others):
                if used + size_bytes <= self.max_bytes:
                    break
                used -= self._remove(path.stem)
            if used + size_bytes > self.max_bytes:
                raise LoaderError(
                    f"its files take {size_bytes} bytes, but models in use have {used} of the model cache's "
                    f"{self.max_bytes}",
                    retryable=True,
                )
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(size_bytes).encode(), 0)

    def _remove(self, digest: str) -> int:
        """Remove an entry and whatever else has its name, unless somebody holds it; the bytes that are free now."""
        lock = self._locked(digest, fcntl.LOCK_EX)
        if lock is None:
            return 0
        try:
            path = self.root / f"{digest}.lock"
            size_bytes = _size_in(path)
            gone = self.root / f"{digest}.gone"  # if we die half-way, nobody takes the rest for an entry
            if self._is_there(digest):
                (self.root / digest).rename(gone)
            for folder in (gone, self.root / f"{digest}.partial"):
                shutil.rmtree(folder, ignore_errors=True)
                if folder.exists():  # a manifest got its name meanwhile; or it cannot be removed, which is said now
                    shutil.rmtree(folder)
            path.unlink()
            return size_bytes
        finally:
            os.close(lock)

    def _sweep(self) -> None:
        digests = {path.name.partition(".")[0] for path in self.root.iterdir() if path.name != "lock"}
        for digest in filter(_is_digest, digests):
            whole = self._is_whole(digest) and (self.root / f"{digest}.lock").exists()
            if not whole or any((self.root / f"{digest}.{left}").exists() for left in ("partial", "gone")):
                self._remove(digest)

    def _is_whole(self, digest: str) -> bool:
        folder = self.root / digest
        try:
            sizes = json.loads((folder / _MANIFEST).read_bytes())
            return isinstance(sizes, dict) and all((folder / name).stat().st_size == sizes[name] for name in sizes)
        except (OSError, ValueError):
            return False

    def _is_there(self, digest: str) -> bool:
        return (self.root / digest).is_dir()

    def _locked(self, digest: str, how: int) -> int | None:
        """A file descriptor that holds the entry's lock, or None if somebody else has it."""
        path = self.root / f"{digest}.lock"
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
                if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
                    return lock
            except OSError as error:
                os.close(lock)
                if error.errno == errno.EWOULDBLOCK:
                    return None
                if error.errno == errno.ENOENT:
                    continue
                raise
            os.close(lock)  # removed between the two calls

    @contextmanager
    def _counting(self) -> Iterator[None]:
        file = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


class Room:
    """What an entry that is being filled may take."""

    def __init__(self, cache: Cache, lock: int) -> None:
        self._cache = cache
        self._lock = lock

    @property
    def max_bytes(self) -> int:
        return self._cache.max_bytes

    def take(self, size_bytes: int) -> None:
        """Set the bytes it takes altogether.

        Raises:
            LoaderError: what is in use leaves too little room.
        """
        self._cache._make_room(self._lock, size_bytes)


def _used_now(lock: int) -> None:
    if time.time() > os.fstat(lock).st_mtime + _JUST_NOW_S:  # a write that would wait for what is being synced
        os.utime(lock)


def _size_in(lock: Path) -> int:
    try:
        return int(lock.read_bytes() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def _is_digest(name: str) -> bool:
    return len(name) == 64 and all(character in "0123456789abcdef" for character in name)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path | str, folder: int | None = None) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(file)
    finally:
        os.close(file)
