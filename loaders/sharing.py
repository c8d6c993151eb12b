"""What models of one architecture have in common: kept for as long as a model in this process uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Shared(Protocol):
    """Something that models have in common."""

    digest: str
    """Of the architecture."""
    models: int
    """That use it; counted by `InUse`."""


S = TypeVar("S", bound=Shared)


class InUse(Generic[S]):
    """Those that models use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_use: dict[str, S] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._in_use

    def take(self, digest: str, build: Callable[[], S]) -> tuple[S, bool]:
        """The architecture for one more model, and whether it is its first. Each `take` is made up for by one `drop`.

        Raises:
            LoaderError: from `build`.
        """
        with self._lock:  # building one takes little time; whoever waits most likely wants the same
            architecture = self._in_use.get(digest)
            is_first = architecture is None
            if architecture is None:
                architecture = self._in_use[digest] = build()
            architecture.models += 1
            return architecture, is_first

    def drop(self, architecture: S) -> None:
        """One model less."""
        with self._lock:
            architecture.models -= 1
            if not architecture.models:
                del self._in_use[architecture.digest]

    def in_use(self) -> list[S]:
        """For those who watch."""
        with self._lock:
            return list(self._in_use.values())
