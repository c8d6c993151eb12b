"""`loaders.memory.mapping`: bytes of a file in memory for as long as somebody looks at them, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loaders.memory.mapping import map_file, populate


def is_mapped(path: Path) -> bool:
    return path.name in Path("/proc/self/maps").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mapped.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_it_is_mapped_until_the_last_view_is_gone(path: Path) -> None:
    with path.open("rb") as file:
        run = map_file(file.fileno(), 16384)
    populate(run)
    view = run[256:1024].view(np.uint32).reshape(2, 96)
    del run
    assert is_mapped(path)
    assert view[0, 0] == 0x03020100
    del view
    assert not is_mapped(path)


def test_it_is_read_only(path: Path) -> None:
    with path.open("rb") as file:
        run = map_file(file.fileno(), 16384)
    with pytest.raises(ValueError, match="read-only"):
        run[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        run[4:8].view(np.uint32)[0] = 1


def test_what_cannot_be_mapped_is_an_error(path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(-1, 4096)
    with path.open("rb") as file, pytest.raises(OSError, match="Invalid argument"):
        map_file(file.fileno(), 0)


def test_a_process_may_end_while_it_is_looked_at(path: Path) -> None:
    """Nothing is unmapped at exit: other threads may be running on it."""
    code = (
        "import sys, os\nfrom loaders.memory.mapping import map_file\n"
        "run = map_file(os.open(sys.argv[1], os.O_RDONLY), 16384)\n"
        "import atexit; atexit.register(lambda: print(int(run[255])))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True, env={**os.environ})
    assert done.stdout == b"255\n"
