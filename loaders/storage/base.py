"""The port of object stores: list, stat, ranged read. One scheme is one line in `STORES`.

Stores block; they are called in worker threads, `read` in several at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol

from loaders.base import LoaderError

STORES: Final[dict[str, str]] = {
    "s3": "loaders.storage.store:open_s3",
    "gs": "loaders.storage.store:open_gs",
    "az": "loaders.storage.store:open_az",
    "http": "loaders.storage.store:open_http",
    "https": "loaders.storage.store:open_http",
    "hdfs": "loaders.storage.hdfs:open_hdfs",
    "webhdfs": "loaders.storage.hdfs:open_hdfs",
    "hf": "loaders.storage.hub:open_hub",
}
"""By scheme: `module:function` that takes (bucket or URL, `credentials` entry) and gives a `Store`."""

_MD5: Final = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of an artifact."""

    key: str
    name: str
    """Its path within the artifact, with `/`."""
    size_bytes: int
    etag: str
    """As the store writes it, in quotes; of a store without ETags the time of the last change."""
    sha256: str = ""
    """Hex digest of the content, if the store tells it."""

    @property
    def md5(self) -> str:
        """Hex digest of the content if the ETag is one ("Checking object integrity" in the S3 user guide: objects of
        one part, not encrypted with KMS); else empty."""
        match = _MD5.fullmatch(self.etag)
        return match[1] if match else ""


class Store(Protocol):
    """One bucket, container or web address, as one model's owner may read it. Every method raises `LoaderError` with
    the store's own reason, retryable where it may pass."""

    @property
    def identity(self) -> str:
        """What tells it from every other store, without secrets: `s3://endpoint/bucket`."""
        ...

    @property
    def etag_is_md5(self) -> bool:
        """Whether an ETag that looks like an MD5 digest is the content's."""
        ...

    def stat(self, key: str) -> Entry | None:
        """The object, or None if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects under `prefix/`."""
        ...

    def read(self, entry: Entry, start: int, end: int) -> memoryview:
        """Bytes [start, end) of the object as it was when it was found.

        Raises:
            RangesNotSupported: only `stream` works here.
        """
        ...

    def stream(self, entry: Entry) -> Iterator[memoryview]:
        """The whole object."""
        ...


class RangesNotSupported(Exception):
    """A web server that sends a file from its start or not at all."""


def open_store(scheme: str, place: str, settings: Mapping[str, Any]) -> Store:
    """The store of a scheme; `place` is a bucket, a container or a URL.

    Raises:
        LoaderError: unknown scheme, settings it cannot use, or its package is not installed.
    """
    if scheme not in STORES:
        expected = ", ".join(f"{known}://" for known in (*STORES, "pvc", "file"))
        raise LoaderError(f"storage scheme {scheme!r} is not supported: expected one of {expected}")
    module, _, name = STORES[scheme].partition(":")
    store: Store = getattr(import_module(module), name)(place, settings)
    return store
