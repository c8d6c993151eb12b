"""Slots: what was made for a layout at an address, kept for the next model of that layout there.

Best fit gives a model the hole that one of its own architecture left, so in a fleet the same slots come again and
again: their views, and the modules and CUDA graphs that whoever runs models hangs on them, are made once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loaders.memory.device import Span
from loaders.memory.layout import Layout

MAX_SLOTS: Final = 4096


@dataclass(eq=False, slots=True)
class Slot:
    """A layout at an address of a device's arena."""

    layout: Layout
    spans: tuple[Span, ...]
    views: Mapping[str, Any]
    """Tensors by name, of the device's framework."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """For whoever runs models there: what must be remade if the address changes, but not if only the bytes do."""


class Slots:
    """The slots met last, up to a number. Thread-safe."""

    def __init__(self, views: Callable[[Layout, Sequence[Span]], Mapping[str, Any]]) -> None:
        self.made = 0
        """How many had to be made; the rest were met again."""
        self._views = views
        self._slots: OrderedDict[tuple[str, tuple[Span, ...]], Slot] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, layout: Layout, spans: tuple[Span, ...]) -> Slot:
        with self._lock:
            slot = self._slots.get((layout.key, spans))
            if slot is not None:
                self._slots.move_to_end((layout.key, spans))
                return slot
        slot = Slot(layout, spans, self._views(layout, spans))  # only the one model there can ask for it
        with self._lock:
            self.made += 1
            self._slots[layout.key, spans] = slot
            if len(self._slots) > MAX_SLOTS:
                self._slots.popitem(last=False)
        return slot
