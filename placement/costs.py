"""What loading costs on this pod, learned from its own loads.

Per source a load takes `fixed_ms + size_bytes / bandwidth`, fitted by least squares whose weights halve every
`_HALF_LIFE` loads, so that a disk that becomes slow shows. The start values count as a few loads of their own and fade
like those. What a model itself took last time from there tells more than the line does: half of the answer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from placement.records import ModelId, Tier

MIN_MS: Final = 0.1
"""No load is free: the resolution of what is measured is 1 ms."""
MAX_BYTES_PER_MS: Final = 10**9
"""1 TB/s: what is told of loads whose size makes no difference."""
MAX_MODELS: Final = 65_536
"""Models whose own loads are remembered, those loaded last."""
_HALF_LIFE: Final = 32
_FADE: Final = 0.5 ** (1 / _HALF_LIFE)


Source = Tier | None
"""Where a load's bytes come from; None: the store."""

_START: Final[dict[Source, tuple[float, float]]] = {
    Tier.HOST: (1.0, 10e6),
    Tier.DISK: (10.0, 1e6),
    None: (50.0, 1e5),
}
"""Before anything is measured: fixed ms, and bytes per ms, on the careful side of what such links give (10 GB/s,
1 GB/s, 100 MB/s)."""
_START_BYTES: Final = (1e6, 1e9)
"""Sizes of the loads that the start values stand for."""


class _Line:
    """ms = fixed + slope * bytes, by weighted least squares."""

    def __init__(self, fixed_ms: float, bytes_per_ms: float) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        for size_bytes in _START_BYTES:
            self.observe(size_bytes, fixed_ms + size_bytes / bytes_per_ms)

    def observe(self, size_bytes: float, took_ms: float) -> None:
        """Errors count relative to the time a load took, or a single large model would set the line for all."""
        weight = 1.0 / max(MIN_MS, took_ms) ** 2
        self._weight = self._weight * _FADE + weight
        self._x = self._x * _FADE + weight * size_bytes
        self._y = self._y * _FADE + weight * took_ms
        self._xx = self._xx * _FADE + weight * size_bytes * size_bytes
        self._xy = self._xy * _FADE + weight * size_bytes * took_ms

    def fit(self) -> tuple[float, float]:
        """Fixed ms, and ms per byte. Neither is ever negative: then the other alone explains what was seen."""
        spread = self._weight * self._xx - self._x * self._x
        if spread > 1e-9 * self._xx * self._weight:
            slope = (self._weight * self._xy - self._x * self._y) / spread
            if slope < 0:
                return self._y / self._weight, 0.0
            fixed_ms = (self._y - slope * self._x) / self._weight
            if fixed_ms >= 0:
                return fixed_ms, slope
        # Sizes that do not differ tell nothing of a fixed part.
        return (0.0, self._xy / self._xx) if self._xx else (self._y / self._weight, 0.0)


class LoadCosts:
    """Times of this pod's loads."""

    def __init__(self) -> None:
        self._lines = {source: _Line(*start) for source, start in _START.items()}
        self._last: OrderedDict[ModelId, tuple[Source, int, float]] = OrderedDict()

    def observe(self, model_id: ModelId, source: Source, size_bytes: int, took_ms: float) -> None:
        """A load has ended well."""
        took_ms = max(MIN_MS, took_ms)
        self._lines[source].observe(size_bytes, took_ms)
        self._last[model_id] = (source, size_bytes, took_ms)
        self._last.move_to_end(model_id)
        if len(self._last) > MAX_MODELS:
            self._last.popitem(last=False)

    def line(self, source: Source) -> tuple[int, int]:
        """Fixed ms, and bytes per ms (`PodRecord.load_fixed_ms`, `load_bytes_per_ms`)."""
        fixed_ms, ms_per_byte = self._lines[source].fit()
        return round(fixed_ms), min(MAX_BYTES_PER_MS, round(1 / max(ms_per_byte, 1 / MAX_BYTES_PER_MS)))

    def reload_ms(self, model_id: ModelId, source: Source, size_bytes: int) -> float:
        """What loading the model would take, without waiting for others."""
        fixed_ms, ms_per_byte = self._lines[source].fit()
        expected_ms = max(MIN_MS, fixed_ms + ms_per_byte * size_bytes)
        known = self._last.get(model_id)
        return (expected_ms + known[2]) / 2 if known is not None and known[:2] == (source, size_bytes) else expected_ms
