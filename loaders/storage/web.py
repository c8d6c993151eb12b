"""GET over HTTP with the standard library, for stores that are asked in ways that obstore does not know."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Final

from loaders.base import LoaderError
from loaders.storage import store
from loaders.storage.base import RangesNotSupported

MAX_JSON_BYTES: Final = 32 << 20
_MAX_ERROR_BYTES: Final = 1 << 16
_CHUNK_BYTES: Final = 1 << 20
_PAUSE_S: Final = 0.2
_NEXT: Final = re.compile(r'<([^>]+)>\s*;[^,]*\brel="?next\b')
"""RFC 8288."""


class Web:
    """One server and those it redirects to, which are not told what only the first may know."""

    def __init__(self, name: str, settings: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """`name`: of the store, in messages; `headers`: may be secret.

        Raises:
            LoaderError: the certificates of the settings cannot be used.
        """
        self._name = name
        self._headers = headers
        if any(mark in value for value in headers.values() for mark in "\r\n"):
            raise LoaderError(f"{name}: a line break in a header or a token")
        try:
            context = ssl.create_default_context(cadata=settings.get("certificate"))
            if not settings.get("verify_ssl", True):
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if settings.get("tls_ca"):
                context.load_verify_locations(settings["tls_ca"])
            if settings.get("tls_cert"):
                context.load_cert_chain(settings["tls_cert"], settings.get("tls_key"))
        except OSError as error:  # SSLError is one
            raise LoaderError(f"{name}: a certificate, tls_ca, tls_cert or tls_key cannot be used: {error}") from None
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)

    def json(self, url: str, where: str = "") -> tuple[Any, str]:
        """A small answer, and the URL of the next page of it if there is one; tried again if that may help. `where`: in
        the store, for messages.

        Raises:
            FileNotFoundError: status 404.
            LoaderError: with the server's reason.
        """
        for attempt in range(1, store.RETRIES + 1):
            try:
                with self._asked(url, {}, where) as answer:
                    data = answer.read(MAX_JSON_BYTES + 1)
                    link = _NEXT.search(answer.headers.get("Link", ""))
                return (json.loads(data) if len(data) <= MAX_JSON_BYTES else None), (link[1] if link else "")
            except (ValueError, RecursionError):
                raise LoaderError(f"{self._at(where)}: the server's answer is not JSON", retryable=True) from None
            except LoaderError as error:
                if not error.retryable or attempt == store.RETRIES:
                    raise
                time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError

    def read(self, url: str, where: str, size_bytes: int, headers: Mapping[str, str] | None = None) -> memoryview:
        """The body of one part, at most `size_bytes`.

        Raises:
            RangesNotSupported: one was asked for and the whole is sent.
            LoaderError: with the server's reason.
        """
        with self._missing_told(where), self._asked(url, headers or {}, where) as answer:
            if headers and "Range" in headers and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                raise RangesNotSupported
            data, filled = memoryview(bytearray(size_bytes)), 0
            for chunk in _chunks(answer, size_bytes):
                data[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
            return data[:filled]

    def stream(self, url: str, where: str) -> Iterator[memoryview]:
        """The whole body.

        Raises:
            LoaderError: with the server's reason.
        """
        with self._missing_told(where), self._asked(url, {}, where) as answer:
            for chunk in _chunks(answer, None):
                yield memoryview(chunk)

    def _at(self, where: str) -> str:
        return f"{self._name}/{where}" if where else self._name

    @contextmanager
    def _missing_told(self, where: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise LoaderError(f"{self._at(where)}: there is no such file", retryable=True) from None

    @contextmanager
    def _asked(self, url: str, headers: Mapping[str, str], where: str) -> Iterator[http.client.HTTPResponse]:
        request = urllib.request.Request(url, headers=dict(headers))
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)
        try:
            with self._opener.open(request, timeout=store.STALL_S) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                if error.code == http.HTTPStatus.NOT_FOUND:
                    raise FileNotFoundError(where) from None
                raise self._told(where, error.code, _reason(error)) from None
        except urllib.error.URLError as error:
            raise self._told(where, 0, str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._told(where, 0, str(error) or type(error).__name__) from None

    def _told(self, where: str, status: int, reason: str) -> LoaderError:
        reason = store.shown(next(iter(reason.strip().splitlines()), "no reason was given"))[:300]
        if status in (401, 403):
            return LoaderError(
                f"{self._at(where)}: access is denied ({reason})", retryable="StandbyException" in reason
            )
        if status:
            retryable = not 400 <= status < 500 or status in (408, 429)
            return LoaderError(f"{self._at(where)}: status {status}: {reason}", retryable=retryable)
        told = f"the store cannot be reached, stalls or breaks off ({reason})"
        return LoaderError(f"{self._at(where)}: {told}", retryable=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """On the same server with the same headers, elsewhere with the range alone; never to another kind of URL."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, "it redirects to what is not on the web", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and _origin(newurl) == _origin(req.full_url):
            for name, value in req.unredirected_hdrs.items():
                request.add_unredirected_header(name, value)
        return request


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _chunks(answer: http.client.HTTPResponse, size_bytes: int | None) -> Iterator[bytes]:
    """A body that comes in time, no more than `size_bytes` of it."""
    until_s = time.monotonic() + store.REQUEST_S
    while size_bytes is None or size_bytes > 0:
        chunk = answer.read(_CHUNK_BYTES if size_bytes is None else min(size_bytes, _CHUNK_BYTES))
        if not chunk:
            return
        if time.monotonic() > until_s:
            raise TimeoutError(f"longer than {store.REQUEST_S:.0f} s")
        size_bytes = None if size_bytes is None else size_bytes - len(chunk)
        yield chunk


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own: Hadoop's RemoteException, a hub's `error`."""
    if said := error.headers.get("X-Error-Message"):
        return str(said)
    try:
        body = json.loads(error.read(_MAX_ERROR_BYTES))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return str(error.reason)
    if isinstance(body, dict) and isinstance(remote := body.get("RemoteException"), dict):
        return f"{remote.get('exception')}: {remote.get('message')}"
    said = body.get("error") if isinstance(body, dict) else None
    return said if isinstance(said, str) else str(error.reason)
