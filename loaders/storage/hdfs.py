"""HDFS by its WebHDFS gateway ("WebHDFS REST API"; HttpFS speaks the same).

`webhdfs://host:port/path`, or with a storage key that has `namenode`, KServe's `hdfs://path`. Its other settings are
KServe's: `rootpath`, `user_proxy`, `headers`, `tls_cert`, `tls_key`, `tls_ca`, `tls_skip_verify`; and `user` and
`token` (a delegation token). Kerberos tickets are not obtained here: a gateway with a token, or one that does it, is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from loaders.base import LoaderError
from loaders.storage.archive import MAX_FILES
from loaders.storage.base import Entry
from loaders.storage.web import Web

_WHOLE: Final = "/webhdfs/v1"


class Hdfs:
    """The files of one namenode; of several, those of the one that is active."""

    etag_is_md5 = False

    def __init__(self, identity: str, gateways: list[str], settings: Mapping[str, Any]) -> None:
        self._gateways = gateways
        self._root = settings.get("rootpath", "").strip("/")
        self.identity = identity = f"{identity}/{self._root}".rstrip("/")
        who = {"user.name": "user", "doas": "user_proxy", "delegation": "token"}
        self._who = {name: settings[setting] for name, setting in who.items() if settings.get(setting)}
        verify_ssl = settings.get("verify_ssl", True) and not settings.get("tls_skip_verify", False)
        self._web = Web(identity, {**settings, "verify_ssl": verify_ssl}, settings.get("headers", {}))

    def stat(self, key: str) -> Entry | None:
        try:
            told = self._asked(key, "GETFILESTATUS")["FileStatus"]
            return _entry(key, key.rpartition("/")[2], told) if told["type"] == "FILE" else None
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError):
            raise self._another_form() from None

    def list(self, prefix: str) -> Iterator[Entry]:
        folders, walked = [""], 0
        while folders:
            folder = folders.pop()
            walked += 1
            if walked > MAX_FILES:
                raise LoaderError(f"{self.identity}/{prefix} holds more than {MAX_FILES} directories")
            try:
                told = self._asked("/".join(filter(None, (prefix, folder))), "LISTSTATUS")
                for each in told["FileStatuses"]["FileStatus"]:
                    name = "/".join(filter(None, (folder, each["pathSuffix"])))
                    if each["type"] == "DIRECTORY":
                        if name == folder:
                            raise ValueError(name)
                        folders.append(name)
                    else:
                        yield _entry(f"{prefix}/{name}" if prefix else name, name, each)
            except FileNotFoundError:
                if folder:
                    raise LoaderError(f"{self.identity}/{prefix} changes while it is listed", retryable=True) from None
                return
            except (KeyError, TypeError, ValueError):
                raise self._another_form() from None

    def read(self, entry: Entry, start: int, end: int) -> memoryview:
        """The gateway knows no versions: that the file is still the one that was found is asked afterwards."""
        url = self._url(self._gateways[0], entry.key, "OPEN", offset=start, length=end - start)
        data = self._web.read(url, entry.key, end - start)
        now = self.stat(entry.key)
        if now is None or (now.size_bytes, now.etag) != (entry.size_bytes, entry.etag):
            raise LoaderError(f"{self.identity}/{entry.key}: it was changed while it was read", retryable=True)
        return data

    def stream(self, entry: Entry) -> Iterator[memoryview]:
        raise AssertionError("ranges are parameters of OPEN, so they are always supported")

    def _asked(self, key: str, operation: str) -> Any:
        """Of the active namenode, which is the first one then."""
        for left in reversed(range(len(self._gateways))):
            try:
                return self._web.json(self._url(self._gateways[0], key, operation), key)[0]
            except LoaderError as error:
                if not left or not error.retryable:
                    raise
                self._gateways = [*self._gateways[1:], self._gateways[0]]
        raise AssertionError

    def _url(self, gateway: str, key: str, operation: str, **parameters: int) -> str:
        path = "/".join(filter(None, (self._root, key)))
        return f"{gateway}{_WHOLE}/{quote(path)}?{urlencode({'op': operation, **parameters, **self._who})}"

    def _another_form(self) -> LoaderError:
        return LoaderError(f"{self.identity}: the gateway's answer is of another form", retryable=True)


def _entry(key: str, name: str, told: Mapping[str, Any]) -> Entry:
    return Entry(key, name, int(told["length"]), str(int(told["modificationTime"])))


def place_and_key(scheme: str, path: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The gateway's address and a path, of what follows `hdfs://` or `webhdfs://`. With a `namenode` in the settings
    all of it is a path, unless it begins with that host: what a storage key has goes nowhere else.

    Raises:
        LoaderError: there is no gateway, or another one than the storage key's.
    """
    address, _, rest = path.partition("/")
    namenode = settings.get("namenode", "")
    if not namenode:
        if scheme == "webhdfs" and address:
            return address, rest.strip("/")
        raise LoaderError(
            f"{scheme}://{path[:200]}: expected a storage key with a namenode, or webhdfs://host:port/path"
        )
    gateways = [urlsplit(url) for url in _gateways(namenode)]
    if not all(url.scheme in ("http", "https") and url.hostname for url in gateways):
        raise LoaderError("hdfs: expected a namenode of URLs that start with http:// or https://, separated by ';'")
    hosts = {url.hostname for url in gateways}
    if not address or address.partition(":")[0] in hosts:
        return namenode, rest.strip("/")
    if ":" in address:
        raise LoaderError(f"{scheme}://{address[:200]}: the storage key is for another namenode")
    return namenode, path.strip("/")


def open_hdfs(place: str, settings: Mapping[str, Any]) -> Hdfs:
    """`place`: `host:port`, or the URLs of namenodes, separated by `;`."""
    if kerberos := next((name for name in settings if name.startswith("kerberos_")), ""):
        raise LoaderError(
            f"hdfs: {kerberos} is not supported: expected a gateway that takes a token, user or certificate"
        )
    if "://" not in place:
        return Hdfs(f"webhdfs://{place}", [f"http://{place}"], settings)
    gateways = _gateways(place)
    hosts = ";".join(urlsplit(url).netloc.rpartition("@")[2] for url in gateways)
    return Hdfs(f"hdfs://{hosts}", gateways, settings)


def _gateways(namenode: str) -> list[str]:
    return [url.strip().rstrip("/") for url in namenode.split(";") if url.strip()]
