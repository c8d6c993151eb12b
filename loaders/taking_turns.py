"""Frameworks whose loading is Python code with process-wide state load one model at a time."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_log: Final = logging.getLogger("loaders")
_turn: Final = threading.Lock()


@contextmanager
def framework_load(path: Path, ignore: type[Warning] | None = None) -> Iterator[None]:
    """Wait for the turn; what the framework warns of meanwhile is logged once per text, except category `ignore`.

    `torch.export.load` keeps its deserializer in a global, and `warnings.catch_warnings` is not thread-safe: two at
    once could leave each other's filters behind. Little is lost, such loads hold the interpreter lock most of the time.
    """
    with _turn:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for text in {str(each.message): None for each in caught if not (ignore and issubclass(each.category, ignore))}:
            _log.warning("%s: %s", path, text)
