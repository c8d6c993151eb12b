"""One session per skeleton, for as long as a model in this process uses it."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from loaders.artifacts import reading
from loaders.base import Signature
from loaders.onnx_file import NODE_BYTES, SESSION_BYTES
from loaders.prepare import Damaged
from loaders.sharing import InUse

SKELETON_FILE: Final = "skeleton.onnx"
WEIGHTS_FILE: Final = "model.weights"
PREPACKED_FILE: Final = "prepacked.onnx"
FACTS_FILE: Final = "facts.json"


@cache
def machine() -> str:
    """What a skeleton is good for: the instruction set, by which ONNX Runtime lays convolutions out."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured when a model was split."""

    nodes: int
    saving: float
    """Part of a run's time that prepacked weights spare."""
    machine: str

    @property
    def session_bytes(self) -> int:
        """What a session takes beside weights."""
        return SESSION_BYTES + NODE_BYTES * self.nodes


def read_facts(folder: Path) -> Facts:
    """
    Raises:
        LoaderError: they cannot be read.
        Damaged: they are not what `split` writes, or of another kind of machine.
    """
    with reading(folder / FACTS_FILE):
        text = (folder / FACTS_FILE).read_bytes()
    try:
        facts = Facts(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise Damaged(f"{FACTS_FILE} is damaged: {error}", retryable=True) from error
    if facts.machine != machine():
        raise Damaged("it was prepared on another kind of CPU", retryable=True)
    return facts


class Architecture:
    """A skeleton's session, and what it takes and gives."""

    def __init__(self, digest: str, session: Any, signature: Signature, facts: Facts) -> None:
        self.digest = digest
        self.session = session
        self.signature = signature
        """Without the weights."""
        self.facts = facts
        self.models = 0
        """That use it."""


architectures: Final = InUse[Architecture]()
"""Of this process."""
