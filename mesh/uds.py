"""Unix sockets: the address as gRPC writes it, and the file that a server which was killed has left behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path


def free(address: str) -> Path:
    """The path of `unix:path` or `unix:///path`, ready to be bound: a socket that nobody listens on is removed.

    Raises:
        OSError: somebody does, it is no socket, or it cannot be removed.
    """
    path = Path(address.removeprefix("unix:").removeprefix("//"))
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "it exists and is no socket")
    except FileNotFoundError:
        return path
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(os.fspath(path))
    if answer != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    path.unlink(missing_ok=True)
    return path
