"""`hf://owner/name[@revision][/path]`: models of a Hugging Face hub, by its HTTP API ("Hub API Endpoints").

A revision is read as the commit that it is at the time, whose files never change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

from loaders.base import LoaderError
from loaders.storage.base import Entry
from loaders.storage.web import Web

_ENDPOINT: Final = "https://huggingface.co"
_PLACE: Final = re.compile(r"(?:models?/(?=[^/]+/[^/]+))?([\w.-]+/[\w.-]+)(?:[@:]([^/]+))?(?:/(.*))?", re.DOTALL)
"""KServe writes the revision after a colon."""
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_PAGES: Final = 100


def place_and_key(scheme: str, path: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """`owner/name@revision`, and the path of a file or a directory in it, of what follows `hf://`.

    Raises:
        LoaderError: there is no such form.
    """
    match = _PLACE.fullmatch(path.strip("/"))
    if match is None:
        raise LoaderError(f"hf://{path[:200]}: expected hf://owner/name[@revision][/path]")
    return f"{match[1]}@{match[2] or 'main'}", match[3] or ""


class Hub:
    """One repository at one commit."""

    etag_is_md5 = False

    def __init__(self, endpoint: str, place: str, settings: Mapping[str, Any], token: str) -> None:
        self.identity = f"hf://{place}"
        self._endpoint = endpoint
        self._repository, _, revision = place.partition("@")
        self._revision = quote(unquote(revision), safe="")
        self._web = Web(self.identity, settings, {"Authorization": f"Bearer {token}"} if token else {})
        self._commit = ""
        self._entries: dict[str, Entry] | None = None

    def stat(self, key: str) -> Entry | None:
        return self._files().get(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        for key, entry in self._files().items():
            if not prefix or key.startswith(f"{prefix}/"):
                name = key.removeprefix(f"{prefix}/") if prefix else key
                yield Entry(key, name, entry.size_bytes, entry.etag, entry.sha256)

    def read(self, entry: Entry, start: int, end: int) -> memoryview:
        ranged = {"Range": f"bytes={start}-{end - 1}"} if (start, end) != (0, entry.size_bytes) else {}
        return self._web.read(self._url(entry), entry.key, end - start, ranged)

    def stream(self, entry: Entry) -> Iterator[memoryview]:
        return self._web.stream(self._url(entry), entry.key)

    def _url(self, entry: Entry) -> str:
        return f"{self._endpoint}/{self._repository}/resolve/{self._commit}/{quote(entry.key)}"

    def _files(self) -> dict[str, Entry]:
        if self._entries is None:
            model = f"{self._endpoint}/api/models/{self._repository}"
            try:
                self._commit = quote(self._web.json(f"{model}/revision/{self._revision}")[0]["sha"], safe="")
                found = map(_entry, self._tree(f"{model}/tree/{self._commit}?recursive=true"))
                self._entries = {entry.key: entry for entry in found if entry is not None}
            except FileNotFoundError:
                raise LoaderError(f"{self.identity}: there is no such model or revision", retryable=True) from None
            except (KeyError, TypeError):
                raise LoaderError(f"{self.identity}: the hub's answer is of another form", retryable=True) from None
        return self._entries

    def _tree(self, url: str) -> Iterator[Any]:
        for _ in range(_PAGES):
            page, url = self._web.json(url)
            yield from page
            if not url.startswith(f"{self._endpoint}/"):  # the token goes nowhere else
                return
        raise LoaderError(f"{self.identity} holds too many files")


def _entry(told: Any) -> Entry | None:
    """Of one line of a tree. Large files are named by their SHA-256 (`lfs.oid`), small ones by what git has."""
    if told["type"] != "file":
        return None
    large = told.get("lfs") or {}
    digest = large.get("oid") or ""
    return Entry(
        told["path"],
        told["path"].rpartition("/")[2],
        int(large.get("size", told["size"])),
        str(digest or told["oid"]),
        digest if _DIGEST.fullmatch(digest) else "",
    )


def open_hub(place: str, settings: Mapping[str, Any]) -> Hub:
    """The hub of the storage key with its token, or that of `HF_ENDPOINT` with `HF_TOKEN`: the environment's token does
    not go to a hub that a storage key names."""
    if settings.get("endpoint_url"):
        return Hub(settings["endpoint_url"].rstrip("/"), place, settings, settings.get("token", "").strip())
    endpoint = (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")
    token: str = settings.get("token") or os.environ.get("HF_TOKEN", "")
    return Hub(endpoint, place, settings, token.strip())
