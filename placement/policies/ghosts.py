"""What a policy remembers of models that are not loaded any more: in a ring that grows with what was loaded at once."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from placement.records import ModelId

V = TypeVar("V")

PER_COPY: Final = 4
"""Models remembered for each copy that was loaded at the most."""


class Ghosts(Generic[V]):
    def __init__(self, per_copy: int = PER_COPY) -> None:
        self._per_copy = per_copy
        self._values: dict[ModelId, V] = {}
        """The one that went first comes first."""
        self._most_loaded = 1

    def __len__(self) -> int:
        return len(self._values)

    def put(self, model_id: ModelId, value: V, loaded: int) -> None:
        """A copy went; `loaded` were there with it."""
        self._values.pop(model_id, None)
        self._values[model_id] = value
        self._most_loaded = max(self._most_loaded, loaded)
        if len(self._values) > self._per_copy * self._most_loaded:
            del self._values[next(iter(self._values))]

    def pop(self, model_id: ModelId) -> V | None:
        """What is known of a model that comes back; None: nothing."""
        return self._values.pop(model_id, None)
