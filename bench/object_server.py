"""The store of `bench.storage`, as a job: files of a directory as objects of the bucket `b`, by what S3 needs of HTTP.

`python -m bench.object_server DIRECTORY [BYTES_PER_S]` tells its port. Bodies go from the page cache to the socket by
sendfile, so that the store costs little beside what is measured. `BYTES_PER_S` is that of all connections together.
ETags are those of uploads in parts, or MD5 digests under `md5/`. `GET /last` tells when the last byte of a body was
handed to the kernel, as CLOCK_MONOTONIC in seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading
import time
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from bench.jobs import tell

_RANGE: Final = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)
_PACED_BYTES: Final = 256 << 10
_HEAD_BYTES: Final = 1 << 16


class _Store:
    def __init__(self, root: Path, bytes_per_s: float) -> None:
        self._root = root
        self._bytes_per_s = bytes_per_s
        self._pace = threading.Lock()
        self._free_s = 0.0
        self._last_s = 0.0

    def serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        try:
            with connection:
                while True:
                    while b"\r\n\r\n" not in data:
                        received = connection.recv(_HEAD_BYTES)
                        if not received:
                            return
                        data += received
                    head, _, data = data.partition(b"\r\n\r\n")
                    self._answer(connection, head + b"\r\n")
        except OSError:
            pass  # the client has what it wanted

    def _answer(self, connection: socket.socket, head: bytes) -> None:
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        url = urlsplit(target)
        key = unquote(url.path).removeprefix("/b").strip("/")
        if url.path == "/last":
            return _send(connection, "200 OK", str(self._last_s).encode())
        if not key:
            return _send(connection, "200 OK", self._listing(parse_qs(url.query).get("prefix", [""])[0]))
        path = self._root / key
        if not path.is_file():
            return _send(connection, "404 Not Found", b"" if method == "HEAD" else b"<Error/>")
        return self._object(connection, method, key, head)

    def _object(self, connection: socket.socket, method: str, key: str, head: bytes) -> None:
        file = os.open(self._root / key, os.O_RDONLY)
        try:
            size = end = os.fstat(file).st_size
            start, told = 0, "HTTP/1.1 200 OK\r\n"
            if found := _RANGE.search(head):
                start, end = int(found[1]), min(int(found[2]) + 1, size)
                told = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n"
            told += f"Content-Length: {end - start}\r\nETag: {_etag(self._root, key)}\r\n"
            connection.sendall(f"{told}Last-Modified: {formatdate(usegmt=True)}\r\n\r\n".encode())
            while method == "GET" and start < end:
                start += os.sendfile(connection.fileno(), file, start, self._turn(end - start))
                self._last_s = time.monotonic()
        finally:
            os.close(file)

    def _turn(self, count: int) -> int:
        """Wait until some more bytes may go; how many."""
        if not self._bytes_per_s:
            return count
        count = min(count, _PACED_BYTES)
        with self._pace:
            now_s = time.monotonic()
            self._free_s = max(now_s, self._free_s) + count / self._bytes_per_s
            wait_s = self._free_s - now_s
        time.sleep(wait_s)
        return count

    def _listing(self, prefix: str) -> bytes:
        found = "".join(
            f"<Contents><Key>{path.relative_to(self._root)}</Key><LastModified>2025-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>{_etag(self._root, str(path.relative_to(self._root)))}</ETag><Size>{path.stat().st_size}</Size>"
            "</Contents>"
            for path in sorted((self._root / prefix).rglob("*"))
            if path.is_file()
        )
        return f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()


@cache
def _etag(root: Path, key: str) -> str:
    if key.startswith("md5/"):
        with (root / key).open("rb") as file:
            return f'"{hashlib.file_digest(file, "md5").hexdigest()}"'
    return f'"{hashlib.md5(key.encode()).hexdigest()}-7"'


def _send(connection: socket.socket, status: str, body: bytes) -> None:
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def main() -> None:
    store = _Store(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        tell({"port": listener.getsockname()[1]})
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=store.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
