"""Archives of unknown origin, unpacked into a directory of ours: regular files and directories only."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO, Final

from loaders.base import LoaderError

EXTENSIONS: Final = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_FILES: Final = 10_000
MAX_RATIO: Final = 100
"""Weights hardly shrink; what grows more than this, and over `FREE_BYTES`, is a bomb."""
FREE_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 1 << 20


def is_archive(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a stranger named, within `folder`.

    Raises:
        LoaderError: it would lie elsewhere, or nowhere.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255 for part in parts) or "\0" in name:
        raise LoaderError(f"file name {name[:200]!r} is refused: expected a relative path without '..'")
    return folder.joinpath(*parts)


def unpack(path: Path, folder: Path, max_bytes: int) -> int:
    """Unpack into a new directory; the bytes written.

    Raises:
        LoaderError: no archive, truncated, too large, or with a member that is refused.
        OSError: the disk is full.
    """
    limit = min(max_bytes, max(MAX_RATIO * path.stat().st_size, FREE_BYTES))
    folder.mkdir()
    members = _zip(path) if path.name.lower().endswith(".zip") else _tar(path)
    count = written = 0
    with _refused(path.name), closing(members):
        for name, source in members:
            count += 1
            if count > MAX_FILES:
                raise LoaderError(f"{path.name} holds more than {MAX_FILES} files")
            target = inside(folder, name)
            if source is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                while chunk := source.read(_CHUNK_BYTES):
                    written += len(chunk)
                    if written > limit:
                        raise LoaderError(f"{path.name} unpacks to more than {limit} bytes")
                    file.write(chunk)
    return written


def top(folder: Path) -> Path:
    """The directory that holds the model: `folder`, or the one directory in it, if that is all."""
    inner = [path for path in folder.iterdir() if path.name[0] != "." and path.name != "__MACOSX"]
    return inner[0] if len(inner) == 1 and inner[0].is_dir() else folder


def _zip(path: Path) -> Generator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = info.external_attr >> 28
            if kind not in (0, 0o4, 0o10):  # of st_mode: not told, directory, regular file
                raise LoaderError(f"{path.name}: {info.filename[:200]!r} is neither a file nor a directory")
            if info.is_dir():
                yield info.filename.rstrip("/"), None
            else:
                with archive.open(info) as source:
                    yield info.filename, source


def _tar(path: Path) -> Generator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(path, "r|*") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isdir():
                if name not in ("", "."):
                    yield name, None
            elif info.isreg():
                source = archive.extractfile(info)
                assert source is not None
                yield name, source
            else:
                raise LoaderError(f"{path.name}: {info.name[:200]!r} is neither a file nor a directory")


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise LoaderError(f"{name}: {Path(str(error.filename)).name!r} occurs twice") from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,  # zipfile: encrypted
        shutil.ReadError,
    ) as error:
        raise LoaderError(f"{name} cannot be unpacked: {error}") from None
