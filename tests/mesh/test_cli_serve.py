"""`densemesh serve` and `densemesh up` as processes. Authority: issue 2, "What a user gets": every setting is a flag,
a variable and a key of the file; wrong values are answered in one sentence; Ctrl-C leaves nothing running."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from mesh.local_cluster import LocalPod

TIMEOUT_S = 60.0

Result = subprocess.CompletedProcess[str]


def densemesh(*words: str, **variables: str) -> Result:
    command = [sys.executable, "-m", "mesh", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **variables}
    )


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes a test has started; none outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(started: list[subprocess.Popen[str]], *words: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mesh", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    started.append(process)
    return process


def read_until(process: subprocess.Popen[str], stream: IO[str] | None, pattern: str) -> str:
    """What a process says up to and with the line that matches."""
    assert stream is not None
    said = ""
    too_late = threading.Timer(TIMEOUT_S, process.kill)
    too_late.start()
    try:
        while not re.search(pattern, said):
            line = stream.readline()
            assert line, said
            said += line
    finally:
        too_late.cancel()
    return said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--grpc-port", "x"], "'--grpc-port'.*'x' is not a valid integer"),
        (["--grpc-port", "70000"], "--grpc-port: expected a port from 0 to 65535, found 70000"),
        (["--capacity", "lots"], "--capacity: expected a size such as 512MiB or 2GiB, found 'lots'"),
        (["--models", "/no/such"], "--models: '/no/such' is not a directory"),
        (["--registry", "zoo://keeper"], "--registry: expected a URL that starts with one of memory://, etcd://"),
        (["--nonsense"], "No such option '--nonsense'"),
        (["extra"], "unexpected extra argument"),
        (["--config", "/no/such.toml"], "'--config'.*: /no/such.toml: No such file or directory"),
    ],
)
def test_a_wrong_value_is_answered_in_one_sentence(words: list[str], says: str) -> None:
    done = densemesh("serve", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("densemesh: ")
    assert re.search(says, line)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grpc_port = ", "is not TOML: "),
        ("gprc_port = 1", "unknown setting 'gprc_port'; expected any of models, registry, "),
        ('grpc_port = "many"', "'many' is not a valid integer"),
        ('capacity = "many"', "--capacity: expected a size"),
        ("\udcff", "is not TOML: 'utf-8' codec"),
    ],
)
def test_a_wrong_file_is_answered_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pod.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    done = densemesh("serve", "--config", str(file))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("registry", "says"),
    [
        ("etcd://", "--registry: expected host"),
        ("etcds://h/p?ca=/no/such.pem", "--registry: /no/such.pem: No such file"),
        ("memory://a-b", "--registry: expected memory://"),
    ],
)
def test_a_registry_that_cannot_be_is_wrong_usage(registry: str, says: str) -> None:
    done = densemesh("serve", "--registry", registry, "--grpc-port", "0", "--metrics-port", "0")
    assert (done.returncode, says in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("which", ["grpc", "metrics"])
def test_a_port_that_is_taken(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"grpc": "0", "metrics": "0", which: port}
        words = (f"--{name}-port={number}" for name, number in ports.items())
        done = densemesh("serve", "--host", "127.0.0.1", *words)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"port 127.0.0.1:{port} cannot be opened: " in last
    assert last.startswith("densemesh: the ")
    assert "Traceback" not in done.stderr


def test_flags_win_over_variables_over_the_file_over_defaults(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    file = tmp_path / "pod.toml"
    file.write_text('capacity = "1MiB"\nload_slots = 3\nrun_threads = 5\ngrpc_port = 0\nmetrics_port = 0\n')
    variables = {"DENSEMESH_CONFIG": str(file), "DENSEMESH_RUN_THREADS": "6", "DENSEMESH_LOAD_SLOTS": "4"}
    words = ("--load-slots", "7", "--registry", "memory://", "--host", "127.0.0.1")
    process = start(started, "serve", *words, **variables)
    said = read_until(process, process.stderr, r"serves gRPC on 127\.0\.0\.1:\d+").splitlines()
    assert 'capacity = "1MiB"  # file' in said
    assert "run_threads = 6  # environment" in said
    assert "load_slots = 7  # flag" in said
    assert "lease_ttl_s = 15.0  # default" in said
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0


def test_a_password_is_not_printed() -> None:
    done = densemesh("serve", "--registry", "etcds://root:secret@host/p?ca=/no/such.pem")
    assert 'registry = "etcds://root:***@host/p?ca=/no/such.pem"  # flag' in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_pod(tmp_path: Path, number: signal.Signals) -> None:
    other = LocalPod("other", "memory://", tmp_path / "log", {})
    other.start()
    assert other.pid is not None
    deadline_s = time.monotonic() + TIMEOUT_S
    while "serves gRPC" not in other.log.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    os.kill(other.pid, number)
    assert other.wait() == 0
    assert "Traceback" not in other.log.read_text()


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that contain a text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_is_a_mesh_until_ctrl_c_and_leaves_nothing(
    started: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    up = start(started, "up", "--pods", "2", DENSEMESH_TLS_CA="/no/such")  # which is for other pods
    said = read_until(up, up.stdout, "Ctrl-C stops the mesh")
    registry = re.search(r"registry (etcd://(127\.0\.0\.1:\d+)/\S+), logs in (\S+)", said)
    target = re.search(r"pod-2 +gRPC (\S+)", said)
    assert registry is not None
    assert target is not None
    status = densemesh("status", "--target", target[1])
    assert "pod-1" in status.stdout
    assert "pod-2" in status.stdout
    assert len(processes_with(registry[1])) == 2  # the pods
    assert len(processes_with(registry[2])) == 3  # and etcd
    up.send_signal(number)
    assert up.wait(TIMEOUT_S) == 0
    assert processes_with(registry[2]) == []
    assert not Path(registry[3]).exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--pods", "0"], "0 is not in the range"), (["--models", "/no/such"], "'/no/such' is not a directory")],
)
def test_up_with_a_wrong_value(words: list[str], says: str) -> None:
    done = densemesh("up", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line


def test_nothing_to_do_is_help() -> None:
    done = densemesh()
    assert done.returncode == 0
    for command in ("serve", "up", "register", "unregister", "status", "vmodel", "ensure-loaded"):
        assert command in done.stdout


def test_an_unknown_command() -> None:
    done = densemesh("sevre")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_as_many_files_may_be_open_as_the_system_allows(started: list[subprocess.Popen[str]]) -> None:
    """Models hold one or two each: a thousand of them are more than the usual soft limit."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(few, 256), most))
    try:
        process = start(started, "serve", "--grpc-port", "0", "--metrics-port", "0", "--host", "127.0.0.1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    read_until(process, process.stderr, "serves gRPC")
    line = next(line for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines() if "open files" in line)
    soft, hard = line.split()[3:5]
    assert soft == hard
