"""Our side of `loaders.isolated.worker`: a process that may crash, hang or talk nonsense without harm to this one."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from loaders.base import InferError, LoaderError, ModelLost, Tensor
from loaders.isolated import worker
from loaders.isolated.nursery import Nursery
from loaders.isolated.worker import FrameError

_log: Final = logging.getLogger("loaders.isolated")

_UNLOAD_S: Final = 2.0
"""For a model's own `unload`, and for a killed process to be gone."""
_LINES_A_SECOND: Final = 50
_LINE_CHARS: Final = 500
_READ_BYTES: Final = 16 << 10


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
        self._status: int | None = None
        self._nursery = Nursery.of(settings.python, settings.threads, settings.env)
        self._exit = -1
        try:
            with ExitStack() as undo:
                ours, theirs, lines, output = (undo.enter_context(each) for _ in "12" for each in socket.socketpair())
                self._pid = self._nursery.start(settings.directory, theirs.fileno(), output.fileno())
                undo.callback(self._kill)
                self._exit = os.pidfd_open(self._pid)
                undo.pop_all()
                theirs.close()
                output.close()
        except OSError as error:
            raise LoaderError(f"no process for the model: {error.strerror}", retryable=True) from None
        self._socket, self._lines = ours, lines
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._poll.register(self._exit, select.POLLIN)
        self._logger = threading.Thread(target=self._log_lines, name=f"log-{self._pid}", daemon=True)
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
        """Memory that ends with the process; it shares more with the one that it was forked from."""
        with suppress(OSError), open(f"/proc/{self._pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))
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

    def _exits(self, wait_s: float) -> bool:
        if self._exit < 0:
            return False
        poll = select.poll()
        poll.register(self._exit, select.POLLIN)
        return bool(poll.poll(wait_s * 1e3))

    def _ended(self, why: str) -> ModelLost:
        """End what is of no use any more; without a reason the process tells it by how it ends."""
        if not why:
            why = "" if self._exits(_UNLOAD_S) else "the model's process was ended because it closed its socket"
        self._kill()
        self._lost = why or self._last_words()
        return ModelLost(self._lost, began=True)

    def _kill(self) -> None:
        """End the process and all that it has started. Its number is its own until somebody has waited for it."""
        if self._status is None:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._exits(_UNLOAD_S)
            self._status = self._nursery.reap(self._pid)

    def _last_words(self) -> str:
        status = self._status or 0
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
                text = "".join(
                    each if each.isprintable() else " " for each in line[:_LINE_CHARS].decode(errors="replace")
                )
                if not text.strip():
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
