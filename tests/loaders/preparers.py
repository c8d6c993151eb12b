"""A preparer that does well or badly, for a real child, and the form that it makes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loaders.base import Artifact, Signature, Tensor, TensorSpec
from loaders.prepare import Damaged, NotPreparable

FORM = "copied"


def copy(artifact: Artifact, folder: Path) -> None:
    """Prepare by copying, or fail as the model's text says."""
    _begin(artifact)
    print("converters talk")
    print("and warn", file=sys.stderr)
    match artifact.path.read_bytes():
        case b"refuse":
            (folder / "half").write_text("done")
            raise NotPreparable("it has no copy")
        case b"break":
            raise ValueError("no such\n operator")
        case b"hang":
            time.sleep(600)
        case b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"swell":
            bytearray(6 << 30)
        case b"polite":
            artifact.path.with_name("nice").write_text(str(os.nice(0)))
    shutil.copy(artifact.path, folder / "copy")


def refuse(artifact: Artifact, folder: Path) -> None:
    """Never prepare."""
    _begin(artifact)
    raise NotPreparable("nothing has a copy")


def hang(artifact: Artifact, folder: Path) -> None:
    """Never end."""
    _begin(artifact)
    time.sleep(600)


def _begin(artifact: Artifact) -> None:
    """A file beside the model tells the processes, job by job."""
    with artifact.path.with_name("jobs").open("a") as jobs:
        jobs.write(f"{os.getpid()}\n")


class CopiedLoader:
    """Of that form: its size is the file's length."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        return (artifact.path / "copy").stat().st_size

    def load(self, artifact: Artifact) -> Copied:
        if (artifact.path / "copy").read_bytes().startswith(b"damaged"):
            raise Damaged("the copy is damaged")
        return Copied(self.estimate_bytes(artifact))


class Copied:
    """Answers what it was asked."""

    waits = 0

    def __init__(self, size_bytes: int) -> None:
        self.signature = Signature(
            (TensorSpec("INPUT0", "FP32", (-1, -1)),),
            (TensorSpec("OUTPUT0", "FP32", (-1, -1)),),
            "copied",
            lenient=True,
        )
        self.size_bytes = size_bytes

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(outputs, next(iter(inputs.values())))

    def unload(self) -> None:
        pass
