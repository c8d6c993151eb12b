"""ModelMesh's and KServe's `storage-config`: what each storage key opens a store with. Secrets are never told.

A directory with a file for each key, as a Kubernetes secret is mounted, or one JSON file; each key's value is a JSON
object (KServe, "Storage credentials"). It is read at every use, so that rotated secrets are taken up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loaders.base import LoaderError

MAX_BYTES: Final = 1 << 20

_TEXTS: Final = (
    *("type", "access_key_id", "secret_access_key", "session_token", "endpoint_url", "region"),
    *("bucket", "default_bucket", "certificate", "ca_bundle"),
    *("private_key", "private_key_id", "client_email"),
    *("account_name", "container", "account_key", "sas_key", "tenant_id", "client_id", "client_secret"),
    *("name", "url", "token"),
    *("namenode", "rootpath", "user", "user_proxy", "tls_cert", "tls_key", "tls_ca", "kerberos_principal"),
)
_FLAGS: Final = ("anonymous", "verify_ssl", "etag_md5", "tls_skip_verify")


def settings_for(config: Path | None, key: str, scheme: str) -> Mapping[str, Any]:
    """The settings of a storage key; without a key those of `default_<scheme>` or `default`, else none: the environment
    and the workload's identity are used.

    Raises:
        LoaderError: there is no such key, or its value is not of the expected form; no value is in the message.
    """
    if config is None:
        if key:
            raise LoaderError(f"storage key {key!r}: this pod has no storage config (--storage-config)")
        return {}
    for name in (key,) if key else (f"default_{scheme}", "default"):
        said = _read(config, name)
        if said is not None:
            return _checked(name, said)
    if key:
        raise LoaderError(f"storage key {key!r} is not in the storage config", retryable=True)
    return {}


def _read(config: Path, key: str) -> Any:
    """The value of a key, or None. A name with a slash is none: keys of Kubernetes secrets have none."""
    try:
        if not config.is_dir():
            entries = _parsed("the storage config", config)
            if not isinstance(entries, dict):
                raise LoaderError("the storage config is not a JSON object")
            return entries.get(key)
        path = config / key
        return _parsed(f"storage key {key!r}", path) if _is_name(key) and path.is_file() else None
    except OSError as error:
        raise LoaderError(f"the storage config cannot be read: {error.strerror}", retryable=True) from None


def _is_name(key: str) -> bool:
    return Path(key).name == key and key.isprintable() and key not in (".", "..")


def _parsed(where: str, path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        if len(data) <= MAX_BYTES:
            return json.loads(data)
    except (ValueError, RecursionError):
        pass
    raise LoaderError(f"{where} is not a JSON object of at most {MAX_BYTES} bytes")


def _checked(key: str, said: Any) -> dict[str, Any]:
    where = f"storage key {key!r}"
    if isinstance(said, str):  # one JSON file that was made of a secret: the values are JSON texts
        said = _object_in(said)
    if not isinstance(said, dict):
        raise LoaderError(f"{where} is not a JSON object")
    settings: dict[str, Any] = {}
    for name in _TEXTS:
        value = said.get(name)
        if value is not None and not isinstance(value, str):
            raise LoaderError(f"{where}: {name} is not a string")
        if value:
            settings[name] = value
    for name in _FLAGS:
        if name in said:
            settings[name] = _flag(where, name, said[name])
    headers = said.get("headers")
    if headers is not None:
        if isinstance(headers, str):  # as KServe's secrets for HDFS and the web have it
            headers = _object_in(headers)
        if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
            raise LoaderError(f"{where}: headers is not an object of strings")
        settings["headers"] = headers
    for one, other in (("access_key_id", "secret_access_key"), ("secret_access_key", "access_key_id")):
        if one in settings and other not in settings:
            raise LoaderError(f"{where} has {one} without {other}")
    bundle = settings.pop("ca_bundle", "")
    if bundle and "certificate" not in settings:
        try:
            settings["certificate"] = Path(bundle).read_text()
        except (OSError, ValueError):
            raise LoaderError(f"{where}: the file ca_bundle cannot be read", retryable=True) from None
    return settings


def _object_in(text: str) -> Any:
    """What a JSON text says; None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _flag(where: str, name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):  # as KServe's users write them
        return value.lower() in ("true", "1")
    if type(value) is not bool:
        raise LoaderError(f"{where}: {name} is neither true nor false")
    return value
