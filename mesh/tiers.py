"""The tiers below the engine's books: what a load reads and leaves, where what is given up goes. All of it blocks.

*Disk* is the cache of fetched models. What the engine holds there is a claim on an entry, which is checked: the cache
is its node's, so another pod's fetch may have taken its room (`gone`). The cache counts its files itself; the engine's
books have no more for them than it has promised, which goes by memory. Models in the pod's own file system have none.

*Host* is the slab of a `Store`, for models whose weights can lie anywhere (`loaders.memory.tiered`). A model that is
held there stays as it is but for its bytes on the device: bringing it back is one copy, and nothing is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from loaders.base import LoaderError
from loaders.memory.store import Store
from loaders.memory.tiered import TieredModel
from loaders.storage.source import Fetched
from mesh.models import Models
from mesh.resident import Resident
from placement.messages import Demote, DropHeld, StartLoad
from placement.records import ModelId, Tier

log = logging.getLogger(__name__)


class Tiers:
    """Of one pod. Two calls for the same model and tier never overlap: the engine asks for one at a time."""

    def __init__(self, models: Models, store: Store | None = None) -> None:
        self.store = store
        self._models = models
        self._on_disk: dict[ModelId, Fetched] = {}
        self._in_host: dict[ModelId, tuple[Resident, TieredModel]] = {}

    @property
    def is_lost(self) -> str:
        """Why the device is not used any more; empty: it is, or there is none."""
        return "" if self.store is None else self.store.lost

    def load(self, action: StartLoad) -> tuple[Resident, Mapping[Tier, int]]:
        """The model loaded, and the bytes that lie in the tiers it was to be kept in.

        Raises:
            LoaderError: see `Models.load`.
        """
        model, model_id = action.model, action.model.model_id
        if action.source is Tier.HOST:
            resident, tiered = self._in_host[model_id]
            tiered.promote()
            return resident, {}
        fetched = self._on_disk[model_id] if action.source is Tier.DISK else None
        resident = self._models.load(model, fetched, keep_in_host=Tier.HOST in action.keep)
        kept: dict[Tier, int] = {}
        weights = resident.model
        if isinstance(weights, TieredModel) and weights.in_host:
            if weights.size_bytes <= action.keep[Tier.HOST]:
                self._in_host[model_id] = resident, weights
                kept[Tier.HOST] = weights.size_bytes
            else:  # less was promised, by what its files take
                weights.drop(weights.store.host)
        if resident.fetched is not None:
            if Tier.DISK in action.keep:
                kept[Tier.DISK] = min(resident.fetched.size_bytes, action.keep[Tier.DISK])
            if Tier.DISK in kept or action.source is Tier.DISK:  # whose store may have had a new version
                self._on_disk[model_id] = resident.fetched
        return resident, kept

    def unload(self, model_id: ModelId, resident: Resident, keep: Tier | None) -> bool:
        """Give up a copy on the device; whether it lies in the tier below, as was asked for."""
        tiered = resident.model
        if not isinstance(tiered, TieredModel):
            resident.unload()
            return False
        kept = keep is Tier.HOST and self._copied_down(model_id, resident, tiered)
        assert self.store is not None
        tiered.drop(self.store.device)
        return kept

    def demote(self, action: Demote) -> bool:
        """From the host to disk, where the files are still, or not."""
        fetched = self._in_host[action.model_id][0].fetched
        if fetched is None or not self._models.storage.has(fetched):
            return False
        self._on_disk[action.model_id] = fetched
        return True

    def drop(self, action: DropHeld) -> None:
        """
        Raises:
            LoaderError: the disk does not give the bytes back.
        """
        if action.tier is Tier.HOST:
            assert self.store is not None
            _, tiered = self._in_host.pop(action.model_id)
            tiered.drop(self.store.host)
            return
        fetched = self._on_disk.pop(action.model_id)
        if fetched not in list(self._on_disk.values()):  # models may have the same files
            self._models.storage.release(fetched)

    def gone(self) -> list[ModelId]:
        """Models that are said to be on disk, and are not."""
        has = self._models.storage.has
        return [model_id for model_id, fetched in list(self._on_disk.items()) if not has(fetched)]

    def forget(self, model_id: ModelId) -> None:
        """It is not on disk any more, by the engine's books neither."""
        self._on_disk.pop(model_id, None)

    def close(self) -> None:
        """Nothing is loaded any more, or will be."""
        for _, tiered in self._in_host.values():
            tiered.unload()
        self._in_host.clear()

    def _copied_down(self, model_id: ModelId, resident: Resident, tiered: TieredModel) -> bool:
        try:
            tiered.demote()
        except LoaderError as error:
            log.warning("model %s is not kept in host memory: %s", model_id, error)
            return False
        self._in_host[model_id] = resident, tiered
        return True
