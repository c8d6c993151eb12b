"""The process that prepares, seen from the pod: started when there is work, one job at a time, never waited for longer
than the job's deadline. Whatever becomes of it, the pod lives."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any, Final

log: Final = logging.getLogger("loaders.prepare")

IDLE_S: Final = 60.0
"""The child ends when nothing has come for so long."""
MEMORY_BYTES: Final = 4 << 30
"""What it may allocate."""
_FRESH_S: Final = 0.8 * IDLE_S
"""A child that has waited longer may be about to end, and gets no job any more."""
_MOST_ANSWER_BYTES: Final = 65_536
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ChildFailed(Exception):
    """A job was not done, because of the child and not of what it found; says how."""


class Child:
    """Used by one thread, which must stay as long as this: the kernel takes it for the child's parent. Only `stop` may
    be called by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._used_s = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def run(self, request: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """Have one job done; blocks.

        Raises:
            ChildFailed: the deadline has passed, the child died, or `stop` was called.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # then there is no answer either
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            answer = _answer(process, time.monotonic() + deadline_s)
        except TimeoutError:
            self._end()
            raise ChildFailed(f"it was not done after {deadline_s:.0f} s") from None
        except ValueError as error:
            self._end()
            raise ChildFailed(f"the process that prepares {error}") from None
        self._used_s = time.monotonic()
        return answer

    def stop(self) -> None:
        """End it for good; a job under way fails. `close` comes after it."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """No job is under way any more, nor to come."""
        self.stop()
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (self.pid is None or time.monotonic() - self._used_s > _FRESH_S):
            self._end()
        with self._lock:
            if self._stopped:
                raise ChildFailed("the pod is stopping")
            if self._process is None:
                self._process = _spawn()
            return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def _spawn() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-W", "ignore", "-m", "loaders.prepare", str(os.getpid())]
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path)  # ours, in whatever way we came to it
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path, "ORT_DISABLE_TELEMETRY": "1"},
        process_group=0,
    )
    assert process.stderr is not None
    threading.Thread(target=_follow, args=(process, process.stderr), name="prepare-log", daemon=True).start()
    return process


def _follow(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """Log what it says, and see it off when it ends."""
    with said:
        while line := said.readline(4096):
            log.info("child %d: %s", process.pid, line.decode(errors="replace").rstrip())
    process.wait()


def _answer(process: subprocess.Popen[bytes], until_s: float) -> dict[str, Any]:
    """
    Raises:
        TimeoutError
        ValueError: there is no answer; says why.
    """
    assert process.stdout is not None
    poll, line = select.poll(), b""
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, until_s - time.monotonic()) * 1e3):
            raise TimeoutError
        part = os.read(process.stdout.fileno(), _MOST_ANSWER_BYTES)
        line += part
        if not part:
            status = process.wait()
            raise ValueError(f"was ended by signal {-status}" if status < 0 else f"ended with status {status}")
        if len(line) > _MOST_ANSWER_BYTES:
            raise ValueError("answers at length")
    answer: dict[str, Any] = json.loads(line)
    return answer
