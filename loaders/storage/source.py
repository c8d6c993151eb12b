"""What a model's path means, and its files on local disk for as long as they are in use."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loaders.base import LoaderError
from loaders.storage import hdfs, hub
from loaders.storage.archive import is_archive, top, unpack
from loaders.storage.base import Entry, Store, open_store
from loaders.storage.cache import Cache, Lease, Room
from loaders.storage.credentials import settings_for
from loaders.storage.fetch import fetch, find
from loaders.storage.local import claim_path

_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_BLOB: Final = re.compile(r"([a-z0-9]{3,24})\.blob\.core\.windows\.net")
_HEX: Final = re.compile("[0-9a-fA-F]{64}")
SHA256: Final = "sha256"
"""Of `storage_params`: what the files must have."""
_TYPES: Final = {
    **{"s3": "s3", "gcs": "gs", "gs": "gs", "azure": "az", "az": "az", "http": "http", "pvc": "pvc"},
    **{"hdfs": "hdfs", "webhdfs": "hdfs", "hf": "hf"},
}
"""The `type` of a storage key to the scheme."""
_PLACES: Final[dict[str, Callable[[str, str, Mapping[str, Any]], tuple[str, str]]]] = {
    "hdfs": hdfs.place_and_key,
    "hf": hub.place_and_key,
}
"""What has no buckets: place and key of the scheme and what follows it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies."""

    scheme: str
    place: str
    """Bucket, container, claim; for the web, the whole URL."""
    key: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Files that lie in the cache, for as long as there is room for them."""

    digest: str
    name: str
    """Of the model, in the entry; empty: it is the directory."""
    size_bytes: int
    """Of the entry."""


class Held:
    """A model's files; they stay until `close`."""

    def __init__(self, path: Path | str, lease: Lease | None = None, name: str = "") -> None:
        self.path = path
        self._lease = lease
        self.fetched = None if lease is None else Fetched(lease.digest, name, lease.size_bytes)
        """Where to find them again; None: they were not fetched."""

    @property
    def is_fixed(self) -> bool:
        """Whether the files are the cache's, where nobody writes them."""
        return self._lease is not None

    def close(self) -> None:
        if self._lease is not None:
            self._lease.close()


class Storage:
    """A pod's ways to models. `config`: see `credentials`; `mounts`: where claims are mounted."""

    def __init__(
        self,
        cache_dir: Path,
        cache_bytes: int | None,
        config: Path | None,
        mounts: Path,
        capacity_bytes: int | None = None,
    ) -> None:
        """`capacity_bytes`: all that the pod can hold in memory; None: no limit."""
        self._capacity_bytes = capacity_bytes
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes
        self._config, self._mounts = config, mounts
        self._stopped = threading.Event()
        self._opening = threading.Lock()
        self._cache: Cache | None = None

    def start(self) -> None:
        """Check a cache that is there already and clear what a crash left of it.

        Raises:
            LoaderError: it cannot be used.
        """
        if self._cache_dir.is_dir():
            self._open_cache()

    def stop(self) -> None:
        """Make fetches that are under way fail soon."""
        self._stopped.set()

    def close(self) -> None:
        """Wait until what was fetched is on disk; nothing may be under way any more."""
        if self._cache is not None:
            self._cache.close()

    def hold(self, uri: str, storage_key: str, params: Mapping[str, Any], max_bytes: int | None = None) -> Held:
        """The files of a model, fetched if they are not here in the version that the store has now. Blocks.

        Raises:
            LoaderError: one sentence with the store's own reason.
        """
        source = self._source(uri, storage_key, params) if is_stored(uri, storage_key) else None
        if SHA256 in params and (source is None or source.scheme == "pvc"):
            raise LoaderError(f"storage_params: {SHA256} is checked when a model is fetched, which {uri!r} is not")
        if source is None:
            return Held(uri)
        if source.scheme == "pvc":
            return Held(claim_path(self._mounts, source.place, source.key))
        store = open_store(source.scheme, source.place, source.settings)
        entries = find(store, source.key)
        only = entries[0] if len(entries) == 1 and entries[0].key == source.key else None
        if only is not None and not only.name:  # of the web: the last part of the path
            entries = [only := Entry("", _file_name(source.place), only.size_bytes, only.etag)]
        total_bytes = sum(entry.size_bytes for entry in entries)
        if max_bytes is not None and total_bytes > max_bytes:
            raise LoaderError(f"{uri!r} has {total_bytes} bytes, at most {max_bytes} are allowed")
        self._check_capacity(entries)
        sha256 = _sha256(params.get(SHA256), entries)
        lease = self._open_cache().get(
            _digest(store, source.key, entries, sha256),
            total_bytes,
            lambda folder, room: self._fill(store, entries, folder, room, only, sha256),
        )
        if only is None:
            return Held(lease.folder, lease)
        path = top(lease.folder) if is_archive(only.name) else lease.folder / only.name
        return Held(path, lease, str(path.relative_to(lease.folder)))

    @property
    def cache_bytes(self) -> int:
        """That fetched models may take on disk."""
        if self._cache is not None:
            return self._cache.max_bytes
        if self._cache_bytes is not None:
            return self._cache_bytes
        there = next(folder for folder in (self._cache_dir, *self._cache_dir.parents) if folder.is_dir())
        return shutil.disk_usage(there).free // 2

    @property
    def used_bytes(self) -> int:
        """That they take now, of all pods on the node."""
        return 0 if self._cache is None else self._cache.used_bytes()

    def find(self, fetched: Fetched) -> Held | None:
        """Files that were fetched before, if they are still here; no store is asked.

        Raises:
            LoaderError: the cache cannot be read.
        """
        lease = self._open_cache().find(fetched.digest)
        return None if lease is None else Held(lease.folder / fetched.name, lease, fetched.name)

    def has(self, fetched: Fetched) -> bool:
        return self._open_cache().has(fetched.digest)

    def release(self, fetched: Fetched) -> None:
        """Give the disk back, unless somebody reads it.

        Raises:
            LoaderError: the cache cannot be used.
        """
        self._open_cache().release(fetched.digest)

    def _check_capacity(self, entries: Sequence[Entry]) -> None:
        """Refuse a file that is larger than the pod's memory before it is fetched. All of them together may be: formats
        read some of a directory. What an archive holds is not known yet."""
        largest = max(entries, key=lambda entry: entry.size_bytes)
        if (
            self._capacity_bytes is not None
            and largest.size_bytes > self._capacity_bytes
            and not is_archive(largest.name)
        ):
            raise LoaderError(
                f"{largest.name} has {largest.size_bytes} bytes; this pod holds {self._capacity_bytes} bytes"
            )

    def _fill(
        self,
        store: Store,
        entries: Sequence[Entry],
        folder: Path,
        room: Room,
        only: Entry | None,
        sha256: Mapping[str, str],
    ) -> None:
        files = folder / "files"
        if only is None or not is_archive(only.name):
            files.mkdir()
            fetch(store, entries, files, self._stopped, sha256)
            return
        fetched = folder / "fetched"
        fetched.mkdir()
        fetch(store, entries, fetched, self._stopped, sha256)
        archive = fetched / only.name
        unpack(archive, files, room.max_bytes - only.size_bytes)
        archive.unlink()
        fetched.rmdir()

    def _open_cache(self) -> Cache:
        with self._opening:
            if self._cache is None:
                self._cache = Cache(self._cache_dir, self._cache_bytes, self._stopped)
            return self._cache

    def _source(self, uri: str, storage_key: str, params: Mapping[str, Any]) -> Source:
        match = _URI.fullmatch(uri)
        scheme = match[1] if match else ""
        blob = _BLOB.fullmatch(match[2]) if match and scheme == "https" else None
        kind = "az" if blob else {"https": "http", "webhdfs": "hdfs"}.get(scheme, scheme)
        settings = dict(settings_for(self._config, storage_key, kind))
        if match is not None and kind in _TYPES.values() and _TYPES.get(settings.get("type", ""), kind) != kind:
            if storage_key:
                raise LoaderError(f"storage key {storage_key!r} is of type {settings['type']}, the path is {scheme}://")
            settings = {}  # the default of another store
        settings |= _params(params)
        if match is None:  # ModelMesh: a path within the bucket of the storage key
            return _within(storage_key, uri.strip("/"), settings)
        if kind in _PLACES:
            return Source(kind, *_PLACES[kind](scheme, uri.partition("://")[2], settings), settings)
        if kind == "http":
            settings.pop("headers", None)  # they are for the key's own url
            return Source(scheme, uri, "", settings)
        place, key = match[2], match[3].strip("/")
        if blob:
            if settings.setdefault("account_name", blob[1]) != blob[1]:
                raise LoaderError(f"storage key {storage_key or 'default'!r} is for another account than {blob[1]!r}")
            place, _, key = key.partition("?")[0].partition("/")
        if not place:
            raise LoaderError(f"{uri!r} names no bucket: expected {scheme}://bucket/path")
        return Source(kind, place, key, settings)


def is_stored(uri: str, storage_key: str) -> bool:
    """Whether a path means something that `Storage` has to find, and not just a path in the pod's file system."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    return scheme not in ("", "file") or bool(storage_key and uri and not scheme)


def _within(storage_key: str, key: str, settings: Mapping[str, Any]) -> Source:
    where = f"storage key {storage_key!r}"
    scheme = _TYPES.get(settings.get("type", ""))
    if scheme is None:
        raise LoaderError(f"{where}: expected a type of {', '.join(_TYPES)}, found {settings.get('type', '')!r}")
    if scheme == "http":
        url = settings.get("url", "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise LoaderError(f"{where}: expected a url that starts with http:// or https://")
        return Source("http", f"{url}/{key}", "", settings)
    if scheme in _PLACES:
        return Source(scheme, *_PLACES[scheme](scheme, key, settings), settings)
    named = {"az": ("container", "bucket"), "pvc": ("name", "bucket")}.get(scheme, ("bucket", "default_bucket"))
    place = next((settings[name] for name in named if settings.get(name)), "")
    if not place:
        raise LoaderError(f"{where}: expected a {named[0]} there or in storage_params")
    return Source(scheme, place, key, settings)


def _params(params: Mapping[str, Any]) -> dict[str, str]:
    """Where, as the model's owner says; how it is opened is the storage key's alone, or its secret could be sent to an
    address of the owner's choice."""
    told = {name: params[name] for name in ("bucket", "container", "name") if name in params}
    for name, value in told.items():
        if not isinstance(value, str) or not value or "/" in value:
            raise LoaderError(f"storage_params: {name} is not a bucket's name")
    return told


def _file_name(url: str) -> str:
    name = re.split(r"[?#]", url)[0].rstrip("/").rpartition("/")[2]
    return name or "model"


def _sha256(said: Any, entries: Sequence[Entry]) -> dict[str, str]:
    """What the owner says that the files have, by name: one digest for one file, else an object with that of each."""
    if said is None:
        return {}
    if isinstance(said, str) and len(entries) == 1:
        said = {entries[0].name: said}
    if not isinstance(said, dict) or not all(isinstance(hex_, str) and _HEX.fullmatch(hex_) for hex_ in said.values()):
        raise LoaderError(f"storage_params: {SHA256} is neither 64 hex digits nor an object with those of each file")
    names = {entry.name for entry in entries}
    if differ := sorted(names ^ said.keys()):
        where = "in the store" if differ[0] in said else f"in {SHA256}"
        raise LoaderError(f"storage_params: {SHA256} has to name each file and no other: {differ[0]!r} is not {where}")
    return {name: hex_.lower() for name, hex_ in said.items()}


def _digest(store: Store, key: str, entries: Sequence[Entry], sha256: Mapping[str, str]) -> str:
    """Of what the files are: the same for every pod, another for every version, and for one that is checked."""
    told: list[object] = [store.identity, key, [(entry.name, entry.size_bytes, entry.etag) for entry in entries]]
    if sha256:
        told.append(sha256)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@contextmanager
def holding(held: Held) -> Iterator[Path | str]:
    """Hold for a while."""
    try:
        yield held.path
    finally:
        held.close()
