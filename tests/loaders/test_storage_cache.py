"""The disk cache's invariants (docs/ARCHITECTURE.md, Models from stores): never over its size, never what is in use,
nothing half-fetched after a crash, one fetch for several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loaders.base import LoaderError
from loaders.storage.cache import Cache, Lease, Room


def cache_in(root: Path, max_bytes: int | None = 100) -> Cache:
    return Cache(root, max_bytes, threading.Event())


def digest(number: int) -> str:
    return f"{number:064x}"


def get(cache: Cache, number: int, size_bytes: int = 40) -> Lease:
    def fill(folder: Path, room: Room) -> None:
        (folder / "files").mkdir()
        (folder / "files" / "m").write_bytes(bytes(size_bytes))

    return cache.get(digest(number), size_bytes, fill)


def kept(root: Path) -> list[int]:
    return sorted(int(path.name, 16) for path in root.iterdir() if path.is_dir())


def test_the_least_recently_used_goes_and_never_what_is_in_use(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    first = get(cache, 1)
    get(cache, 2).close()
    os.utime(tmp_path / f"{digest(1)}.lock", (1, 1))
    get(cache, 3).close()
    assert kept(tmp_path) == [1, 3]  # 1 is older, and in use
    assert (first.folder / "m").stat().st_size == 40
    first.close()
    os.utime(tmp_path / f"{digest(1)}.lock", (1, 1))
    get(cache, 4).close()
    assert kept(tmp_path) == [3, 4]
    assert cache.used_bytes() == 80


def test_a_use_counts_until_its_end(tmp_path: Path) -> None:
    """Decision 11."""
    cache = cache_in(tmp_path)
    first = get(cache, 1)
    get(cache, 2).close()
    for number in (1, 2):
        os.utime(tmp_path / f"{digest(number)}.lock", (number, number))
    first.close()
    get(cache, 3).close()
    assert kept(tmp_path) == [1, 3]


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with pytest.raises(LoaderError, match="take 101 bytes, the model cache may have 100") as caught:
        get(cache, 1, 101)
    assert not caught.value.retryable
    lease = get(cache, 1, 80)
    with pytest.raises(LoaderError, match="models in use have 80 of the model cache's 100") as caught:
        get(cache, 2, 30)
    assert caught.value.retryable
    assert kept(tmp_path) == [1]
    lease.close()


def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path, room: Room) -> None:
        (folder / "files").mkdir()
        raise LoaderError("denied")

    cache = cache_in(tmp_path)
    with pytest.raises(LoaderError, match="denied"):
        cache.get(digest(1), 40, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_an_archive_counts_as_what_it_unpacks_to(tmp_path: Path) -> None:
    def fill(folder: Path, room: Room) -> None:
        (folder / "files").mkdir()
        (folder / "files" / "m").write_bytes(bytes(90))

    cache = cache_in(tmp_path)
    get(cache, 1).close()
    cache.get(digest(2), 10, fill).close()
    assert kept(tmp_path) == [2]
    assert cache.used_bytes() == 90


def test_threads_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    begun, fills = threading.Event(), []

    def fill(folder: Path, room: Room) -> None:
        fills.append(folder)
        assert begun.wait(10)
        (folder / "files").mkdir()

    cache = cache_in(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, digest(1), 0, fill) for _ in range(4)]
        begun.set()
        for future in waiting:
            future.result().close()
    assert len(fills) == 1


_CRASH = """
import os, sys, threading
from pathlib import Path
from loaders.storage.cache import Cache
def fill(folder, room):
    (folder / "files").mkdir()
    (folder / "files" / "m").write_bytes(bytes(10))
    if sys.argv[2] == "crash":
        os._exit(7)
lease = Cache(Path(sys.argv[1]), 100, threading.Event()).get("%064x" % 1, 40, fill)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_crash_in_a_fetch_leaves_nothing_at_the_next_start(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    get(cache, 2).close()
    cache.close()
    ended = subprocess.run([sys.executable, "-c", _CRASH, str(tmp_path), "crash"], check=False)
    assert ended.returncode == 7
    assert (tmp_path / f"{digest(1)}.partial" / "files" / "m").exists()
    cache = cache_in(tmp_path)
    assert kept(tmp_path) == [2]
    assert cache.used_bytes() == 40


def test_what_another_process_uses_stays(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", _CRASH, str(tmp_path), "hold"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LoaderError, match="models in use have 10"):
            get(cache_in(tmp_path), 2, 95)
        assert kept(tmp_path) == [1]
    get(cache_in(tmp_path), 2, 95).close()
    assert kept(tmp_path) == [2]


def test_entries_that_are_not_whole_are_removed_at_start(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    for number in (1, 2):
        get(cache, number).close()
    cache.close()
    (tmp_path / digest(1) / "files" / "m").write_bytes(b"cut")
    assert cache_in(tmp_path, None).used_bytes() == 40
    assert kept(tmp_path) == [2]


def test_an_entry_serves_before_it_is_on_disk_and_is_dropped_if_the_machine_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = threading.Event(), os.fsync

    def late(file: int) -> None:
        assert synced.wait(10)
        sync(file)

    monkeypatch.setattr(os, "fsync", late)
    cache = cache_in(tmp_path)
    lease = get(cache, 1)
    assert (lease.folder / "m").stat().st_size == 40
    assert cache_in(tmp_path).used_bytes() == 40  # somebody uses it
    lease.close()
    get(cache, 2).close()
    cache_in(tmp_path)  # what another start finds now is what is left if the machine dies now
    assert kept(tmp_path) == []
    get(cache, 2).close()
    synced.set()
    cache.close()
    assert cache_in(tmp_path).used_bytes() == 40
    assert kept(tmp_path) == [2]


def test_an_entry_that_cannot_be_synced_does_not_outlast_the_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    cache = cache_in(tmp_path)
    get(cache, 1).close()
    cache.close()
    assert "Input/output error" in caplog.text
    cache_in(tmp_path)
    assert kept(tmp_path) == []
