"""A pod's prepared models: what is on disk, and what is to be made. Everything here blocks."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from loaders.artifacts import own_parameters
from loaders.base import Artifact, LoadedModel, LoaderError
from loaders.prepare import PREPARERS, Preparer, form_loader, unwrapped
from loaders.prepare.child import Child, ChildFailed
from loaders.prepare.digests import Digests, files_of
from loaders.storage.cache import Cache, Lease, Room

log: Final = logging.getLogger("loaders.prepare")

_REFUSED: Final = "refused"
"""The file, instead of a form's, that says why there is none."""


class Outcome(StrEnum):
    """What became of a job."""

    PREPARED = "prepared"
    FOUND = "found"
    """Another pod, or another model with the same bytes, had it prepared."""
    REFUSED = "refused"
    """It cannot be, or it would be slower; remembered with the bytes."""
    FAILED = "failed"
    """It may succeed another time: not tried again by this pod."""


class Prepared:
    """A form of a model, on disk as long as this is not closed."""

    def __init__(self, form: str, artifact: Artifact, lease: Lease) -> None:
        self.form = form
        self._artifact = artifact
        self._lease = lease

    def estimate_bytes(self) -> int:
        """
        Raises:
            LoaderError: `Damaged`, or with the framework's reason.
        """
        return form_loader(self.form).estimate_bytes(self._artifact)

    def load(self) -> LoadedModel:
        """
        Raises:
            LoaderError: see `estimate_bytes`.
        """
        return form_loader(self.form).load(self._artifact)

    def close(self) -> None:
        self._lease.close()


class Preparation:
    """The forms in a directory, which the pods of a node may share, and the child that makes them.

    `find` and `drop` may be called by any thread, `prepare` by one.
    """

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._stopped = threading.Event()
        self._opening = threading.Lock()
        self._cache: Cache | None = None
        self._digests = Digests()
        self._given_up: dict[str, str] = {}
        """By digest: what this pod does not try again, and why."""
        self._dropped: set[str] = set()
        self.said = ""
        """Why the model that `prepare` was called for last has no form; empty: it has, or nobody has tried."""
        self.child = Child()

    def start(self) -> None:
        """Check what is there already.

        Raises:
            LoaderError: the directory cannot be used.
        """
        if self._root.is_dir():
            self._open()

    def stop(self) -> None:
        """End what is under way."""
        self._stopped.set()
        self.child.stop()

    def close(self) -> None:
        """Nothing is under way any more."""
        self.stop()
        self.child.close()
        if self._cache is not None:
            self._cache.close()

    def find(self, format_name: str, artifact: Artifact) -> Prepared | None:
        """A model's form, if there is one, and it is not sooner to load the model as it is (`Preparer.read_bytes`).

        Raises:
            LoaderError: the model or the directory cannot be read.
        """
        format_name, artifact = unwrapped(format_name, artifact)
        digest = self._digest(format_name, artifact, is_awaited=True)
        if not digest or digest in self._given_up:
            return None
        lease = self._open().find(digest)
        if lease is None:
            return None
        if (lease.folder / _REFUSED).exists():
            lease.close()
            return None
        prepared = Artifact(lease.folder, artifact.parameters, artifact.inputs, artifact.outputs)
        return Prepared(PREPARERS[format_name].form, prepared, lease)

    def drop(self, format_name: str, artifact: Artifact, why: str) -> None:
        """What `find` gave, and nobody holds any more, is of no use; it is made once more.

        Raises:
            LoaderError: see `find`.
        """
        format_name, artifact = unwrapped(format_name, artifact)
        digest = self._digest(format_name, artifact)
        log.warning("%s: its prepared form is dropped: %s", artifact.path, why)
        if digest in self._dropped or not self._open().drop(digest):
            self._given_up[digest] = why
        self._dropped.add(digest)

    def prepare(self, format_name: str, artifact: Artifact) -> Outcome | None:
        """Have a model's form made if it is not there, however long it takes; None: there is nothing to be done.

        Raises:
            LoaderError: see `find`; or the directory is full.
        """
        self.said = ""
        format_name, artifact = unwrapped(format_name, artifact)
        digest = self._digest(format_name, artifact)
        if not digest or digest in self._given_up:
            self.said = self._given_up.get(digest, "")
            return None
        outcome = Outcome.FOUND

        def fill(folder: Path, room: Room) -> None:
            nonlocal outcome
            outcome = Outcome.PREPARED
            (folder / "files").mkdir()
            self._make(PREPARERS[format_name], artifact, folder / "files")

        size_bytes = sum(path.stat().st_size for path in files_of(artifact.path))
        try:
            lease = self._open().get(digest, size_bytes, fill)
        except ChildFailed as failure:
            self.said = str(failure)
            if not self._stopped.is_set():
                self._given_up[digest] = str(failure)
                log.warning("%s is not prepared: %s", artifact.path, failure)
            return Outcome.FAILED
        try:
            refusal = lease.folder / _REFUSED
            if not refusal.exists():
                return outcome
            self.said = refusal.read_text()
            if outcome is Outcome.FOUND:
                return None
            log.info("%s is served as it is: %s", artifact.path, self.said)
            return Outcome.REFUSED
        finally:
            lease.close()

    def _make(self, preparer: Preparer, artifact: Artifact, folder: Path) -> None:
        """
        Raises:
            ChildFailed
        """
        request = {
            "function": preparer.function,
            "path": str(artifact.path),
            "parameters": dict(artifact.parameters),
            "folder": str(folder),
        }
        answer = self.child.run(request, preparer.deadline_s)
        if "failed" in answer:
            raise ChildFailed(answer["failed"])
        if "refused" in answer:
            for path in files_of(folder):
                path.unlink()
            (folder / _REFUSED).write_text(answer["refused"])

    def _digest(self, format_name: str, artifact: Artifact, *, is_awaited: bool = False) -> str:
        """Of all that the form depends on; empty: this format is not prepared here, or this model is too large (to be
        read now, if somebody waits for it)."""
        preparer = PREPARERS.get(format_name)
        versions = _versions(preparer.packages) if preparer is not None else None
        if preparer is None or versions is None:
            return ""
        try:
            size_bytes = sum(path.stat().st_size for path in files_of(artifact.path))
            if size_bytes > preparer.max_bytes:
                return ""
            if is_awaited and size_bytes > preparer.read_bytes and not self._digests.knows(artifact.path):
                return ""
            content = self._digests.of(artifact.path)
        except OSError as error:
            raise LoaderError(f"{artifact.path} cannot be read: {error.strerror}", retryable=True) from error
        told = [format_name, preparer.form, preparer.version, versions, own_parameters(artifact), content]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _open(self) -> Cache:
        with self._opening:
            if self._cache is None:
                self._cache = Cache(self._root, self._max_bytes, self._stopped)
            return self._cache


@cache
def _versions(packages: tuple[str, ...]) -> tuple[str, ...] | None:
    """Of installed distributions; None: one is not."""
    try:
        return tuple(map(version, packages))
    except PackageNotFoundError:
        return None
