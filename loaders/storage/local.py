"""`pvc://<claim>/path`: volumes that are mounted in every pod, each in a directory of its claim's name."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.base import LoaderError
from loaders.storage.archive import inside


def claim_path(root: Path, claim: str, key: str) -> Path:
    """The path that is mounted at `root/<claim>`.

    Raises:
        LoaderError: it leads out of the volume, also by a symbolic link, or the claim is not mounted (retryable).
    """
    volume = inside(root, claim)
    path = inside(volume, key) if key else volume
    if not volume.is_dir():
        raise LoaderError(f"pvc://{claim}: the claim is not mounted in this pod at {volume}", retryable=True)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(volume)):
        raise LoaderError(f"pvc://{claim}/{key} leads out of the volume")
    return path
