"""Where the processes of models come from: one for each interpreter, which has imported numpy and forks
(`worker.nurse`). So a model's process begins in 8 ms instead of 100, and shares what it does not change."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, Final

from loaders.base import LoaderError
from loaders.isolated import worker

_KEPT_VARIABLES: Final = (
    *("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "SSL_CERT_FILE", "TMPDIR", "TZ"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
)
"""Of this process's environment; the rest may hold secrets that are none of a model's."""
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_START_S: Final = 30.0
_ANSWER_S: Final = 20.0
_KILLED: Final = -9

_spawner: Final = ThreadPoolExecutor(1, "spawn")
"""The kernel ends a child with the thread that started it (PR_SET_PDEATHSIG), so that is one which stays."""

Key = tuple[str, int, tuple[tuple[str, str], ...]]


class Nursery:
    """A process that others are forked from. It begins with the first of them and ends with the last, unless it is the
    usual one."""

    _all: ClassVar[dict[Key, Nursery]] = {}
    _turn: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, python: str, threads: int, env: Mapping[str, str]) -> Nursery:
        """That of an interpreter and its environment."""
        key = python, threads, tuple(sorted(env.items()))
        with cls._turn:
            return cls._all.setdefault(key, cls(key))

    def __init__(self, key: Key) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._children = 0
        self._socket: socket.socket | None = None

    def start(self, directory: Path, model: int, output: int) -> int:
        """The number of a new process for a model; `model` and `output` are its socket and what it writes to.

        Raises:
            LoaderError: the interpreter does not start, or the system has no room for another process (retryable).
        """
        with self._lock:
            for _ in range(2):  # it may have been killed
                try:
                    answer = self._ask({"directory": str(directory)}, [model, output])
                except OSError:
                    self._end()
                    continue
                if "error" in answer:
                    raise LoaderError(f"no process for the model: {answer['error']}", retryable=True)
                self._children += 1
                return int(answer["pid"])
        raise LoaderError(f"{self._key[0]} starts, and starts no processes")

    def reap(self, pid: int) -> int:
        """The status of a process that has ended: its own, or less than 0 for a signal."""
        with self._lock:
            self._children -= 1
            try:
                if self._socket is None:
                    return _KILLED  # as all its children are when it is gone
                return int(self._ask({"reap": pid}, []).get("status", _KILLED))
            except OSError:
                self._end()
                return _KILLED
            finally:
                if not self._children and self._key != (sys.executable, 1, ()):
                    self._end()

    def _begin(self) -> socket.socket:
        python, threads, env = self._key
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment = {**kept, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), **dict(env)}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, TemporaryFile() as errors:
            try:
                self._popen = _spawner.submit(_spawn, python, environment, theirs.fileno(), errors).result()
            except OSError as error:
                ours.close()
                raise LoaderError(f"{python} cannot be started: {error}") from None
            theirs.close()
            self._socket = ours
            ours.settimeout(_START_S)
            try:
                ready = ours.recv(1)
            except OSError:
                ready = b""
            if not ready:
                self._end()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                reason = next((line for line in reversed(lines) if line.strip()), "it said nothing")
                raise LoaderError(f"{python} cannot run models: {reason[:500]}")
            ours.settimeout(_ANSWER_S)
            return ours

    def _ask(self, told: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        asked = self._socket or self._begin()
        socket.send_fds(asked, [json.dumps(told).encode()], descriptors)
        answer = asked.recv(1024)
        if not answer:
            raise ConnectionResetError
        found: dict[str, Any] = json.loads(answer)
        return found

    def _end(self) -> None:
        if self._socket is None:
            return
        self._socket.close()
        self._socket = None
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def _spawn(python: str, environment: Mapping[str, str], descriptor: int, errors: Any) -> subprocess.Popen[bytes]:
    # -I: neither the script's directory, which is ours, nor PYTHON* variables nor the user's packages
    command = [python, "-I", "-B", "-u", "-X", "faulthandler", worker.__file__, str(descriptor), str(os.getpid())]
    return subprocess.Popen(
        command,
        env=dict(environment),
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        process_group=0,
    )
