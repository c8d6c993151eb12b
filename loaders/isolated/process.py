"""Our side of `loaders.isolated.worker`: a process that may crash, hang or talk nonsense without harm to this one."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from loaders.base import InferError, LoaderError, ModelLost, Tensor
from loaders.isolated import worker
from loaders.isolated.worker import FrameError

_log: Final = logging.getLogger("loaders.isolated")

_KEPT_VARIABLES: Final = (
    *("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "SSL_CERT_FILE", "TMPDIR", "TZ"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
)
"""Of this process's environment; the rest may hold secrets that are none of the model's."""
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_UNLOAD_S: Final = 2.0
"""For a model's own `unload`, and for a killed process to be gone."""
_LINES_A_SECOND: Final = 50
_LINE_CHARS: Final = 500
_READ_BYTES: Final = 16 << 10

_spawner: Final = ThreadPoolExecutor(1, "spawn")
"""The kernel ends a child with the thread that started it (PR_SET_PDEATHSIG), so that is one which stays."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model's process is run."""

    directory: Path
    """The model; the process's working directory."""
    model_id: str
    implementation: str = ""
    """`module.Class`, or empty: what `model.py` has."""
    module: str = ""
    """The path of a file of ours in place of `model.py`."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Given to the model's own `load`."""
    outputs: tuple[Any, ...] = ()
    """Declared beside the model."""
    python: str = sys.executable
    threads: int = 1
    memory_bytes: int = 2 << 30
    timeout_ms: int = 30_000
    load_timeout_ms: int = 60_000
    env: Mapping[str, str] = field(default_factory=dict)


class Process:
    """One model's process. One request at a time."""

    def __init__(self, settings: Settings) -> None:
        """Start it, and have it load the model: `told` is its answer.

        Raises:
            LoaderError: the model's own reason. Nothing is left behind.
        """
        self._settings = settings
        self._lock = threading.Lock()
        self._lost = ""
        self._last_line = ""
        ours, theirs = socket.socketpair()
        output, lines = socket.socketpair()
        with theirs, output:
            try:
                self._popen = _spawner.submit(_spawn, settings, theirs.fileno(), output.fileno()).result()
            except (OSError, ValueError) as error:
                ours.close()
                lines.close()
                raise LoaderError(f"{settings.python} cannot be started: {error}") from error
        self._socket, self._lines = ours, lines
        self._exit = os.pidfd_open(self._popen.pid)
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._poll.register(self._exit, select.POLLIN)
        self._logger = threading.Thread(target=self._log_lines, name=f"log-{self._popen.pid}", daemon=True)
        self._logger.start()
        try:
            told = {name: value for name, value in asdict(settings).items() if name not in ("directory", "env")}
            self.told, _ = self._exchange({"kind": "load", **told}, {}, settings.load_timeout_ms)
        except InferError as error:
            self.end()
            raise LoaderError(str(error)) from None
        except BaseException:
            self.end()
            raise

    @property
    def resident_bytes(self) -> int:
        """Memory of the process, pages that it shares with others counted in part (PSS)."""
        with suppress(OSError), open(f"/proc/{self._popen.pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
        return 0

    def infer(self, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: the model's own reason.
            ModelLost: the process has died, or was ended because it did not answer in time or answered nonsense.
        """
        with self._lock:
            if not self._lost and self._ready(0):  # nobody has asked it anything
                self._ended("")
            if self._lost:
                raise ModelLost(self._lost, began=False)
            return self._exchange({"kind": "infer", "outputs": outputs}, inputs, self._settings.timeout_ms)[1]

    def end(self) -> None:
        """Let the model end what it has to; then nothing of it is left, whatever it has started."""
        with self._lock:
            if not self._lost:
                with suppress(InferError):
                    self._exchange({"kind": "unload"}, {}, int(_UNLOAD_S * 1e3))
            self._kill()
            self._socket.close()
            os.close(self._exit)
            with suppress(OSError):
                self._lines.shutdown(socket.SHUT_RDWR)
            self._logger.join()
            self._lines.close()

    def _exchange(
        self, head: Mapping[str, Any], tensors: Mapping[str, Tensor], timeout_ms: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        due_s = time.monotonic() + timeout_ms / 1e3

        def fill(buffer: memoryview) -> None:
            while buffer:
                self._await(due_s)
                got = self._socket.recv_into(buffer)
                if not got:
                    raise ConnectionResetError
                buffer = buffer[got:]

        try:
            self._socket.settimeout(timeout_ms / 1e3)
            worker.send(self._socket, head, tensors)
            answer, results = worker.receive(fill)
        except TimeoutError:
            task = {"load": "load", "unload": "unload"}.get(head["kind"], "answer")
            raise self._ended(f"the model did not {task} within {timeout_ms} ms, and its process was ended") from None
        except OSError:
            raise self._ended("") from None
        except FrameError as error:
            raise self._ended(f"the model's process was ended because it wrote to its socket: {error}") from None
        if "error" in answer:
            raise InferError(str(answer["error"])[:4096], bad_input=answer.get("bad_input") is True)
        return answer, results

    def _await(self, due_s: float) -> None:
        """Return when there is something to read."""
        ready = self._ready(due_s - time.monotonic())
        if not ready:
            raise TimeoutError
        if self._socket.fileno() not in ready:
            raise ConnectionResetError  # somebody whom it has started may still hold the other end

    def _ready(self, wait_s: float) -> list[int]:
        return [descriptor for descriptor, _ in self._poll.poll(max(wait_s, 0) * 1e3)]

    def _ended(self, why: str) -> ModelLost:
        """End what is of no use any more; without a reason the process tells it by how it ends."""
        if not why:
            self._poll.unregister(self._socket)
            why = "" if self._ready(_UNLOAD_S) else "the model's process was ended because it closed its socket"
        self._kill()
        self._lost = why or self._last_words()
        return ModelLost(self._lost, began=True)

    def _kill(self) -> None:
        """End the process and all that it has started. Its number is its own until somebody has waited for it."""
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def _last_words(self) -> str:
        status = self._popen.returncode
        self._logger.join(_UNLOAD_S)
        if status == -signal.SIGKILL:
            return "the model's process was killed by SIGKILL, as the kernel does where memory ends"
        if status < 0:
            return f"the model's process was killed by {signal.Signals(-status).name}"
        return f"the model's process ended with status {status}: {self._last_line or 'it said nothing'}"

    def _log_lines(self) -> None:
        """What it writes to stdout and stderr, in our log."""
        rest, since_s, lines, dropped = b"", time.monotonic(), 0, 0
        while True:
            try:
                data = self._lines.recv(_READ_BYTES)
            except OSError:
                data = b""
            *whole, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_CHARS or not data:
                whole, rest = [*whole, rest], b""
            for line in whole:
                text = line[:_LINE_CHARS].decode(errors="replace").rstrip()
                if not text:
                    continue
                self._last_line = text
                if time.monotonic() - since_s > 1:
                    if dropped:
                        _log.info("model %s: (%d lines are left out)", self._settings.model_id, dropped)
                    since_s, lines, dropped = time.monotonic(), 0, 0
                lines += 1
                if lines > _LINES_A_SECOND:
                    dropped += 1
                else:
                    _log.info("model %s: %s", self._settings.model_id, text)
            if not data:
                return
            if dropped:
                time.sleep(0.01)  # it may write as fast as it can


def _spawn(settings: Settings, descriptor: int, output: int) -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    threads = dict.fromkeys(_THREAD_VARIABLES, str(settings.threads))
    # -I: neither the script's directory, which is ours, nor PYTHON* variables nor the user's packages
    command = [settings.python, "-I", "-B", "-u", "-X", "faulthandler", worker.__file__, str(descriptor)]
    return subprocess.Popen(
        [*command, str(os.getpid())],
        cwd=settings.directory,
        env={**kept, **threads, **settings.env},
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        process_group=0,
    )
