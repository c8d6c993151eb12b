"""What models of one architecture took, against what was expected of them: the next one's estimate is corrected by it.

An estimate is multiplied by the median of the last `_KEPT` ratios measured/expected of its architecture; where the file
does not tell that, of models of its format and size. One ratio of 1 is always among them, so that a single measurement
counts half (on a logarithmic scale) and one outlier among several not at all. Pure: what is measured comes in calls.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from statistics import median
from typing import Final

from loaders.base import Artifact
from loaders.onnx_file import architecture

MAX_FACTOR: Final = 4.0
"""No estimate is corrected by more, either way."""
MAX_KEYS: Final = 4096
"""Architectures remembered, those measured last."""
_KEPT: Final = 8


def keys_of(format_name: str, artifact: Artifact, expected_bytes: int) -> tuple[str, ...]:
    """What an artifact is alike to, most like first; empty: there is nothing to learn. An ONNX graph is like those of
    its architecture alone: of one size are graphs whose estimates err either way.

    Raises:
        LoaderError: see `Loader.estimate_bytes`.
    """
    if format_name == "synthetic":  # takes what it is told to
        return ()
    if format_name == "onnx":
        return (architecture(artifact.path),)
    return (f"{format_name} {artifact.path.suffix} {expected_bytes.bit_length()}",)


class Sizing:
    """The ratios of one pod. Thread-safe."""

    def __init__(self) -> None:
        self._ratios: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def corrected(self, keys: tuple[str, ...], expected_bytes: int) -> int:
        """An estimate, by what is known."""
        with self._lock:
            known = next((self._ratios[key] for key in keys if key in self._ratios), None)
            factor = math.exp(median((0.0, *known))) if known else 1.0
        return max(1, round(expected_bytes * factor))

    def learn(self, keys: tuple[str, ...], expected_bytes: int, measured_bytes: int) -> None:
        """A model was loaded and measured; `expected_bytes`: as it was before it was corrected."""
        most = math.log(MAX_FACTOR)
        ratio = min(most, max(-most, math.log(max(1, measured_bytes) / max(1, expected_bytes))))
        with self._lock:
            for key in keys:
                self._ratios.setdefault(key, deque(maxlen=_KEPT)).append(ratio)
                self._ratios.move_to_end(key)
            while len(self._ratios) > MAX_KEYS:
                self._ratios.popitem(last=False)
