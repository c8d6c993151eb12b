"""An object store on loopback that speaks the few calls of S3 we use (HEAD and ranged GET of an object, ListObjectsV2,
error documents; Amazon S3 API reference), and has faults."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MODIFIED: Final = "Tue, 21 Oct 2025 07:28:00 GMT"


class ObjectServer(ThreadingHTTPServer):
    """One bucket, `b`, read by path style; its objects can be read over plain HTTP as well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        """Other than the MD5 of an object."""
        self.faults: Counter[str] = Counter()
        """How many more GETs of objects go wrong that way: `500`, `reset`, `stall`, `short`."""
        self.denied = False
        self.ranges = self.heads = True
        self.seen: list[tuple[str, str, str]] = []
        """(method, path, Range) of each request."""
        self.released = threading.Event()
        """Ends stalls."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what is tested."""

    def gets(self, key: str) -> int:
        return sum(method == "GET" and path == f"/b/{key}" for method, path, _ in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.seen.append((self.command, unquote(url.path), self.headers.get("Range", "")))
        bucket, _, key = unquote(url.path)[1:].partition("/")
        if bucket != "b":
            self._error(404, "NoSuchBucket", "The specified bucket does not exist")
        elif self.server.denied or (self.command == "HEAD" and not self.server.heads):
            self._error(403, "AccessDenied", "Access Denied.")
        elif not key:
            self._list(parse_qs(url.query).get("prefix", [""])[0])
        elif key not in self.server.objects:
            self._error(404, "NoSuchKey", "The specified key does not exist.")
        else:
            self._object(key)

    def _object(self, key: str) -> None:
        data = self.server.objects[key]
        etag = self.server.etags.get(key) or f'"{hashlib.md5(data).hexdigest()}"'
        fault = next(iter(+self.server.faults), "") if self.command == "GET" else ""
        self.server.faults[fault] -= 1
        if fault == "500":
            return self._error(500, "InternalError", "We encountered an internal error. Please try again.")
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        start, end = 0, len(data)
        asked = self.headers.get("Range", "")
        if asked and self.server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", MODIFIED)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("stall", "short"):
            end = (start + end) // 2
        self.wfile.write(data[start:end])
        if fault == "stall":
            self.server.released.wait(60)
        self.close_connection = bool(fault)
        return None

    def _list(self, prefix: str) -> None:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2025-10-21T07:28:00.000Z</LastModified>"
            f'<ETag>"{hashlib.md5(data).hexdigest()}"</ETag><Size>{len(data)}</Size></Contents>'
            for key, data in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        self._send(200, f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>")

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>")

    def _send(self, status: int, body: str) -> None:
        data = f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[ObjectServer]:
    server = ObjectServer()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
