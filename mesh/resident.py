"""A model in memory, and what is known of it there."""

from __future__ import annotations

from loaders.base import LoadedModel
from mesh.plans import Plans
from mesh.repository import ModelSettings
from mesh.rowwise import Kind, has_batch_dimension


class Resident:
    """A loaded model, what was registered with it, and what its requests have taught."""

    __slots__ = ("model", "plans", "settings", "together", "tried")

    def __init__(self, model: LoadedModel, settings: ModelSettings) -> None:
        self.model = model
        self.settings = settings
        self.plans = Plans()
        self.together = not settings.one_by_one and has_batch_dimension(model.signature)
        """Whether requests may be run together; False for good once one try has shown that they must not."""
        self.tried: dict[Kind, bool] = {}
        """Whether requests of a kind were found to be answered row by row; False: that is being tried."""
