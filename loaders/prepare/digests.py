"""Models by content: the same digest for the same bytes, wherever they lie."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Final

_KEPT: Final = 65_536


class Digests:
    """SHA-256 of files, each read once as long as it is not touched. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[int, ...], bytes] = {}

    def knows(self, path: Path) -> bool:
        """Whether `of` reads nothing.

        Raises:
            OSError: see `of`.
        """
        identities = [_identity(file.stat()) for file in files_of(path)]
        with self._lock:
            return all(identity in self._known for identity in identities)

    def of(self, path: Path) -> str:
        """Of a file's bytes; of a directory's names and files.

        Raises:
            OSError: it cannot be read.
        """
        if not path.is_dir():
            return self._of_file(path).hex()
        digest = hashlib.sha256()
        for file in files_of(path):
            name = os.fsencode(file.relative_to(path))
            digest.update(len(name).to_bytes(8, "little") + name + self._of_file(file))
        return digest.hexdigest()

    def _of_file(self, path: Path) -> bytes:
        with path.open("rb", buffering=0) as file:
            identity = _identity(os.fstat(file.fileno()))
            with self._lock:
                known = self._known.get(identity)
            if known is None:
                known = hashlib.file_digest(file, "sha256").digest()
                with self._lock:
                    if len(self._known) >= _KEPT:
                        self._known.clear()
                    self._known[identity] = known
            return known


def _identity(found: os.stat_result) -> tuple[int, ...]:
    # ctime, which nobody can set back: a file may be written anew with the same length and mtime.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def files_of(path: Path) -> list[Path]:
    """A model's files in a fixed order: itself, or all in the directory."""
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
