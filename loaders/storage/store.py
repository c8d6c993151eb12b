"""S3, Google Cloud Storage, Azure Blob Storage and the web, through obstore (the extra `storage`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, cast

from loaders.base import LoaderError
from loaders.storage.base import Entry, RangesNotSupported

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, ObjectStore, RetryConfig, S3Config

INSTALL: Final = "models in object stores need obstore: pip install 'densemesh[storage]'"

STALL_S: Final = 20.0
"""A read that brings nothing for so long is begun again."""
REQUEST_S: Final = 900.0
"""Longest single request: one part, or a whole file of a web server without ranges."""
RETRIES: Final = 3
_CHUNK_BYTES: Final = 8 << 20

_STATUS: Final = re.compile(r"status code: (\d{3})[ \w-]*")
_CODE: Final = re.compile(r"<Code>(.{1,100}?)</Code>", re.DOTALL)
_MESSAGE: Final = re.compile(r"<Message>(.{1,500}?)</Message>", re.DOTALL)
_JSON_MESSAGE: Final = re.compile(r'"message":\s*"((?:[^"\\]|\\.){1,500})"')
_URL: Final = re.compile(r"(https?://)(?:[^\s/?#@]*@)?([^\s?#]*)[^\s]*")
_METADATA: Final = ("169.254.169.254", "metadata.google.internal", "/latest/api/token", "security-credentials")
"""Where clouds hand out workload identities; asked last, so a failure there means that there are no credentials."""


class Objects:
    """A `Store` on obstore."""

    def __init__(self, identity: str, store: ObjectStore, *, etag_is_md5: bool = True) -> None:
        self.identity = identity
        self.etag_is_md5 = etag_is_md5
        self._store = store

    def stat(self, key: str) -> Entry | None:
        import obstore

        if not key:
            return None
        try:
            with self._explained(key):
                meta = obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        return Entry(key, key.rpartition("/")[2], meta["size"], _version(meta))

    def list(self, prefix: str) -> Iterator[Entry]:
        import obstore

        with self._explained(prefix), _missing_told(self._named(prefix)):
            for batch in obstore.list(self._store, prefix or None):
                for meta in batch:
                    key = meta["path"]
                    name = key.removeprefix(f"{prefix}/") if prefix else key
                    yield Entry(key, name, meta["size"], _version(meta))

    def read(self, entry: Entry, start: int, end: int) -> memoryview:
        import obstore
        from obstore.exceptions import NotSupportedError

        whole = (start, end) == (0, entry.size_bytes)
        options: Any = {} if whole else {"range": (start, end)}
        if entry.etag.startswith('"'):  # a weak one never matches (RFC 9110, 13.1.1)
            options["if_match"] = entry.etag
        with self._explained(entry.key), _missing_told(self._named(entry.key)):
            try:
                return memoryview(obstore.get(self._store, entry.key, options=options).bytes())
            except NotSupportedError:
                raise RangesNotSupported from None

    def stream(self, entry: Entry) -> Iterator[memoryview]:
        import obstore

        with self._explained(entry.key), _missing_told(self._named(entry.key)):
            for chunk in obstore.get(self._store, entry.key).stream(min_chunk_size=_CHUNK_BYTES):
                yield memoryview(chunk)

    def _named(self, key: str) -> str:
        return f"{self.identity}/{key}" if key else self.identity

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """What obstore raises, in one sentence of the store's own words and without its URL's secrets.

        Raises:
            FileNotFoundError: there is no such object.
        """
        from obstore.exceptions import BaseError, InvalidPathError

        try:
            yield
        except FileNotFoundError:
            raise
        except (InvalidPathError, ValueError) as error:
            raise LoaderError(f"{self._named(key)}: no key of an object: {_first_line(error)}") from None
        except (BaseError, OSError) as error:
            raise _told(self._named(key), error) from None


class WebFile(Objects):
    """One file on the web, under the empty key. Signed URLs often allow GET and nothing else."""

    def stat(self, key: str) -> Entry | None:
        import obstore

        try:
            try:
                with self._explained(key):
                    meta = obstore.head(self._store, key)
            except LoaderError as error:
                if error.retryable:
                    raise
                with self._explained(key):
                    meta = obstore.get(self._store, key).meta  # its body is not read
        except FileNotFoundError:
            return None
        return Entry(key, "", meta["size"], _version(meta))

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(())


@contextmanager
def _missing_told(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LoaderError(f"{name}: there is no such object", retryable=True) from None


def _first_line(error: Exception) -> str:
    """obstore adds its own structures to what was said, and they have whole URLs."""
    return shown(next(iter(str(error).strip().splitlines()), "no reason was given"))[:300]


def _told(name: str, error: Exception) -> LoaderError:
    said = str(error).partition("Debug source")[0]
    status = _STATUS.search(said)
    code, message = _CODE.search(said), _MESSAGE.search(said) or _JSON_MESSAGE.search(said)
    number = int(status[1]) if status else 0
    reason = ": ".join(found[1].strip() for found in (code, message) if found) or (status[0] if status else "")
    if any(place in said for place in _METADATA):
        return LoaderError(f"{name}: there are no credentials: expected a storage key, the environment or an identity")
    if number in (401, 403):
        return LoaderError(f"{name}: access is denied ({reason})")
    if number == 404:
        return LoaderError(f"{name}: not found ({reason})", retryable=True)
    if number == 412:
        return LoaderError(f"{name}: it was changed while it was read", retryable=True)
    reason = reason or _first_line(error)
    if any(sign in said for sign in ("error sending request", "response body error", "timed out")):
        return LoaderError(f"{name}: the store cannot be reached, stalls or breaks off ({reason})", retryable=True)
    return LoaderError(f"{name}: {reason}", retryable=not 400 <= number < 500 or number in (408, 429))


def _version(meta: ObjectMeta) -> str:
    return meta["e_tag"] or meta["last_modified"].isoformat()


def shown(text: str) -> str:
    """A text without the passwords and queries of the URLs in it."""
    return _URL.sub(r"\1\2", text)


def open_s3(bucket: str, settings: Mapping[str, Any]) -> Objects:
    """Amazon S3 and what speaks its API at `endpoint_url`."""
    S3Store = _package().S3Store
    endpoint = settings.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL", "")
    config: dict[str, Any] = {"region": settings.get("region") or os.environ.get("AWS_REGION", "us-east-1")}
    if settings.get("access_key_id"):
        config |= {name: settings[name] for name in ("access_key_id", "secret_access_key")}
        if settings.get("session_token"):
            config["session_token"] = settings["session_token"]
    if settings.get("anonymous"):
        config["skip_signature"] = True
    if endpoint:
        config["endpoint"] = endpoint
    with _opening(f"s3://{bucket}"):
        store = S3Store(
            bucket, config=cast("S3Config", config), client_options=_client(settings, endpoint), retry_config=_retry()
        )
    identity = f"s3://{shown(endpoint).partition('://')[2]}/{bucket}" if endpoint else f"s3://{bucket}"
    return Objects(identity, store, etag_is_md5=settings.get("etag_md5", True))


def open_gs(bucket: str, settings: Mapping[str, Any]) -> Objects:
    """Google Cloud Storage."""
    import json

    config: dict[str, Any] = {}
    if settings.get("private_key"):
        key = {name: settings.get(name, "") for name in ("private_key", "private_key_id", "client_email")}
        config["service_account_key"] = json.dumps(key | {"type": "service_account"})
    if settings.get("anonymous"):
        config["skip_signature"] = True
    endpoint = settings.get("endpoint_url") or ""
    if endpoint:
        config["base_url"] = endpoint
    GCSStore = _package().GCSStore
    with _opening(f"gs://{bucket}"):
        store = GCSStore(
            bucket, config=cast("GCSConfig", config), client_options=_client(settings, endpoint), retry_config=_retry()
        )
    return Objects(f"gs://{bucket}", store, etag_is_md5=False)


def open_az(container: str, settings: Mapping[str, Any]) -> Objects:
    """Azure Blob Storage; the account is `account_name` of the settings, or the environment's."""
    account = settings.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not account:
        raise LoaderError(f"az://{container}: expected account_name in its storage key or AZURE_STORAGE_ACCOUNT_NAME")
    names = ("account_key", "sas_key", "tenant_id", "client_id", "client_secret")
    config: dict[str, Any] = {name: settings[name] for name in names if settings.get(name)}
    config["account_name"] = account
    if settings.get("anonymous"):
        config["skip_signature"] = True
    endpoint = settings.get("endpoint_url") or ""
    if endpoint:
        config["endpoint"] = endpoint
    AzureStore = _package().AzureStore
    with _opening(f"az://{container}"):
        store = AzureStore(
            container,
            config=cast("AzureConfig", config),
            client_options=_client(settings, endpoint),
            retry_config=_retry(),
        )
    return Objects(f"az://{account}/{container}", store, etag_is_md5=False)


def open_http(url: str, settings: Mapping[str, Any]) -> WebFile:
    """A query, which may be a signature, is sent and not told."""
    HTTPStore = _package().HTTPStore
    name = shown(url)
    with _opening(name):
        store = HTTPStore(url, client_options=_client(settings, url), retry_config=_retry())
    return WebFile(name, store, etag_is_md5=False)


def _package() -> Any:
    try:
        import obstore.store
    except ImportError:
        raise LoaderError(INSTALL) from None
    return obstore.store


@contextmanager
def _opening(name: str) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, ValueError, TypeError) as error:
        raise LoaderError(f"{name}: its settings cannot be used: {_first_line(error)}") from None


def _client(settings: Mapping[str, Any], url: str) -> ClientConfig:
    options: ClientConfig = {
        "timeout": timedelta(seconds=REQUEST_S),
        "read_timeout": timedelta(seconds=STALL_S),
        "allow_http": url.startswith("http://"),
        "allow_invalid_certificates": not settings.get("verify_ssl", True),
    }
    if settings.get("certificate"):
        options["root_certificate"] = settings["certificate"]
    if settings.get("headers"):
        options["default_headers"] = settings["headers"]
    return options


def _retry() -> RetryConfig:
    return {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=STALL_S),  # who stalls is asked again by us, who may be stopping
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
