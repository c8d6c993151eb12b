"""Models that end the process they run in, again and again: such a one is not loaded anew for each request."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from placement.records import ModelId

MOST: Final = 3
WITHIN_S: Final = 60.0


class Crashes:
    """When models were lost of late."""

    def __init__(self) -> None:
        self._times_s: dict[ModelId, deque[float]] = {}

    def add(self, model_id: ModelId) -> None:
        """The model was lost now."""
        self._times_s.setdefault(model_id, deque(maxlen=MOST)).append(time.monotonic())

    def forget(self, model_id: ModelId) -> None:
        """It is another model now, or none."""
        self._times_s.pop(model_id, None)

    def reason(self, model_id: ModelId) -> str:
        """Why the model is not to be loaded now; empty: it is."""
        times_s = self._times_s.get(model_id)
        if times_s is None or len(times_s) < MOST:
            return ""
        if times_s[0] < time.monotonic() - WITHIN_S:
            return ""
        return f"it was lost {MOST} times within {WITHIN_S:.0f} s: its process ended, or its server forgot it"
