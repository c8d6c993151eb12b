"""The few calls to the Kubernetes API that the operator makes beside kopf's watching."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import aiohttp
import kopf

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 20.0
GROUP: Final = "/apis/serving.kserve.io/v1beta1"

_TRIES: Final = 4
_PAUSE_S: Final = 0.5
_MOST_PAUSE_S: Final = 30.0
_BUSY: Final = (429, 500, 502, 503, 504)
_MERGE: Final = "application/merge-patch+json"


class KubeError(Exception):
    """The API server refused, or did not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP; 0: it did not answer."""


class KubeClient:
    """One API server. `login` says where it is and who we are; it is asked again when it does not know us any more."""

    def __init__(self, login: Callable[[], kopf.ConnectionInfo]) -> None:
        self._login = login
        self._session: aiohttp.ClientSession | None = None
        self._server = ""
        self.namespace = "default"
        """Ours."""
        self.calls = 0
        """Made since the start."""

    async def connect(self) -> None:
        """Log in.

        Raises:
            kopf.LoginError: there are no credentials.
        """
        connection = self._login()
        old = self._session
        self._server, self.namespace = connection.server, connection.default_namespace or self.namespace
        tls = connection.as_ssl_context() if connection.server.startswith("https") else False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=32),
            headers={"User-Agent": "densemesh-operator", **connection.as_http_headers()},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            trust_env=connection.trust_env,
        )
        if old is not None:
            await old.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> dict[str, Any] | None:
        """An object; None: there is none.

        Raises:
            KubeError
        """
        try:
            return await self._call("GET", path, None)
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Add an object to a collection.

        Raises:
            KubeError
        """
        return await self._call("POST", path, body, "application/json")

    async def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into an object; with `metadata.resourceVersion` in it only into that version.

        Raises:
            KubeError: 409 if it has changed.
        """
        return await self._call("PATCH", path, body, _MERGE)

    async def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Put an object in the place of the version that it names.

        Raises:
            KubeError: 409 if it has changed.
        """
        return await self._call("PUT", path, body, "application/json")

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, content_type: str = ""
    ) -> dict[str, Any]:
        """Tried again while the server is busy or does not answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if content_type else {}
        for attempt in range(1, _TRIES + 1):
            assert self._session is not None
            pause_s = _PAUSE_S * 2**attempt
            self.calls += 1
            try:
                async with self._session.request(method, self._server + path, data=data, headers=headers) as response:
                    text = await response.text()
                    if response.status < 300:
                        return cast("dict[str, Any]", json.loads(text))
                    failure = KubeError(response.status, _message(text) or f"HTTP {response.status}")
                    pause_s = max(pause_s, _seconds(response.headers.get("Retry-After")))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failure = KubeError(0, f"the API server does not answer: {error or type(error).__name__}")
            if failure.status == 401 and attempt == 1:  # a token that has expired
                await self.connect()
                continue
            if (failure.status and failure.status not in _BUSY) or attempt == _TRIES:
                raise failure
            log.info("%s %s: %s; again in %.1f s", method, path, failure, pause_s)
            await asyncio.sleep(min(pause_s, _MOST_PAUSE_S))
        raise AssertionError("the last attempt returns or raises")


def path_of(namespace: str, name: str = "", part: str = "") -> str:
    """Of an InferenceService."""
    path = f"{GROUP}/namespaces/{namespace}/inferenceservices"
    return "/".join(filter(None, (path, name, part)))


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that makes `new` of `old`; empty: they are equal."""
    patch: dict[str, Any] = dict.fromkeys(old.keys() - new.keys())
    for name, value in new.items():
        was = old.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            if inner := merge_patch(was, value):
                patch[name] = inner
        elif name not in old or was != value:
            patch[name] = value
    return patch


def _message(text: str) -> str:
    try:
        return str(json.loads(text).get("message", ""))
    except (ValueError, AttributeError):
        return text[:200]


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isascii() and header.isdigit() else 0.0
