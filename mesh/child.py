"""Child processes that die with us, and ports for them: what `densemesh up`, the demo and the tests start."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

# Runs in the child before the program does, and becomes it: prctl(PR_SET_PDEATHSIG, SIGKILL) survives an exec.
# preexec_fn would run in a forked copy of a process with threads, where locks may be held by threads that no longer
# exist.
_LAUNCHER: Final = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def spawn(
    command: Sequence[str], *, output: IO[bytes] | int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program by its absolute path; stdout and stderr go to `output`.

    It dies with its parent, even one that is killed (on Linux; elsewhere it then stays behind). The kernel takes the
    thread that started it for the parent, so call this from one that stays, such as the main thread. Ctrl-C does not
    reach it: whoever started it decides when it ends.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
    options: dict[str, Any] = {"env": dict(environment)} if environment is not None else {}
    return subprocess.Popen(
        [*launcher, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0, **options
    )


_given: Final[set[int]] = set()
"""Ports of this process's servers, past and to come."""


def free_ports(count: int) -> list[int]:
    """Ports below the range that connections are made from: a client that looks for a dead server could otherwise be
    given the server's own port to call from, connect to itself, and keep it. No port is given twice: a server may not
    have taken its own yet."""
    draw, ports = random.Random(), list[int]()
    while len(ports) < count:
        port = draw.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            ports.append(port)
    return ports
