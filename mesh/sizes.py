"""What models are expected to take, by what those before took (`loaders.sizing`), and how far off that was."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from loaders.base import Artifact
from loaders.sizing import Sizing, keys_of
from mesh.histogram import Histogram
from placement.records import ModelId

MAX_MODELS: Final = 4096
"""Estimated and not loaded yet."""
_BOUNDS: Final = (0.25, 0.5, 0.67, 0.75, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.33, 1.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class _Expected:
    form: str
    keys: tuple[str, ...]
    told_bytes: int
    """By the loader."""
    bytes: int
    """Corrected."""


class Sizes:
    """Of one pod's models. Thread-safe."""

    def __init__(self) -> None:
        self.errors: dict[str, Histogram] = {}
        """By format: measured over expected bytes of each model that could be measured."""
        self._sizing = Sizing()
        self._expected: OrderedDict[ModelId, _Expected] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, model_id: ModelId, form: str, artifact: Artifact, told_bytes: int) -> int:
        """Bytes a model will take, of which its loader tells `told_bytes`. `form`: its format, or its prepared form.

        Raises:
            LoaderError: see `loaders.sizing.keys_of`.
        """
        keys = keys_of(form, artifact, told_bytes)
        expected = _Expected(form, keys, told_bytes, self._sizing.corrected(keys, told_bytes))
        with self._lock:
            self._expected[model_id] = expected
            if len(self._expected) > MAX_MODELS:
                self._expected.popitem(last=False)
        return expected.bytes

    def settle(self, model_id: ModelId, form: str, size_bytes: int) -> int:
        """Bytes of a model that was loaded. A loader that could not measure tells what it told before: then the
        corrected figure is nearer to the truth."""
        with self._lock:
            expected = self._expected.pop(model_id, None)
            if expected is None or expected.form != form or not expected.keys:
                return size_bytes
            if size_bytes == expected.told_bytes:
                return expected.bytes
            self.errors.setdefault(form, Histogram(_BOUNDS)).observe(size_bytes / expected.bytes)
        self._sizing.learn(expected.keys, expected.told_bytes, size_bytes)
        return size_bytes
