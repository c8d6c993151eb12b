"""Models that compute with views of their weights, wherever those lie: loaded into the tiers of a store.

A loader of such models is a `TieredLoader`. What it makes of an artifact is all of the model but its weights; the store
brings those, and takes them away again, and the rest stays for as long as any tier of memory has them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

from loaders.base import Artifact, Loader, ModelLost, Signature, Tensor
from loaders.memory.buffers import Source
from loaders.memory.dedup import ModelKey
from loaders.memory.device import DeviceLost
from loaders.memory.layout import Layout
from loaders.memory.slots import Slot
from loaders.memory.store import Store
from loaders.memory.tier import NoRoom, Tier, TooLarge


class Weightless(Source, Protocol):
    """A model without its weights, and the way to those in its files."""

    @property
    def signature(self) -> Signature: ...

    @property
    def layout(self) -> Layout:
        """`contents.layout`, told without reading any weights."""
        ...

    def run(self, slot: Slot, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """As `LoadedModel.infer`, with the weights in a slot; what is to be made once per slot is kept there.

        Raises:
            InferError
            DeviceLost: the device is gone.
        """
        ...

    def let_go(self) -> None:
        """Of the files: the weights are not read again."""
        ...

    def close(self) -> None:
        """Give all memory back; called once."""
        ...


@runtime_checkable
class TieredLoader(Loader, Protocol):
    """Loads models whose weights may lie anywhere."""

    def weights_bytes(self, artifact: Artifact) -> int:
        """That a store will take for it (`Layout.size_bytes`), from its files alone as `estimate_bytes`; at least 1.

        Raises:
            LoaderError: see `Loader.estimate_bytes`.
        """
        ...

    def weightless(self, artifact: Artifact) -> Weightless:
        """
        Raises:
            LoaderError: see `Loader.load`.
        """
        ...


class TieredModel:
    """A model whose weights are in one tier of a store at least, and run while they are on the device."""

    waits: Final = 0

    def __init__(self, store: Store, key: ModelKey, rest: Weightless) -> None:
        self.store = store
        self.key = key
        self._rest = rest
        self.signature = rest.signature
        self.size_bytes = max(rest.layout.size_bytes, 1)
        self._tiers: set[Tier] = set()
        self._lock = threading.Lock()

    def bring(self, *, keep_in_host: bool) -> None:
        """Read the weights from the files onto the device, and if asked for into the host's memory; no room for them
        there is no failure.

        Raises:
            LoaderError: see `Store.load`; nothing stays behind.
        """
        if keep_in_host and self._fill():
            try:
                self.promote()
            except BaseException:
                self.store.drop(self.key, self.store.host)
                self._tiers.clear()
                raise
        else:
            self.store.load(self.key, self._rest)
            self._tiers.add(self.store.device)

    @property
    def in_host(self) -> bool:
        return self.store.host in self._tiers

    def promote(self) -> None:
        """
        Raises:
            LoaderError: see `Store.promote`.
        """
        self.store.promote(self.key)
        self._tiers.add(self.store.device)

    def demote(self) -> None:
        """
        Raises:
            LoaderError: see `Store.demote`.
        """
        self.store.demote(self.key)
        self._tiers.add(self.store.host)

    def drop(self, tier: Tier) -> None:
        """Out of one tier; the rest of the model goes with the last."""
        with self._lock:
            self.store.drop(self.key, tier)
            self._tiers.discard(tier)
            if not self._tiers:
                self._rest.close()

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once, with the weights held where they are.

        Raises:
            InferError: see `Weightless.run`.
            ModelLost: the device is gone; another pod may run it.
        """
        try:
            with self.store.using(self.key) as slot:
                return self._rest.run(slot, inputs, outputs)
        except DeviceLost as error:
            raise ModelLost(str(error), began=False) from error

    def unload(self) -> None:
        """Out of all tiers."""
        for tier in list(self._tiers):
            self.drop(tier)

    def _fill(self) -> bool:
        try:
            self.store.fill(self.key, self._rest)
        except (NoRoom, TooLarge):
            return False
        self._tiers.add(self.store.host)
        return True


def load_tiered(
    store: Store, key: ModelKey, loader: TieredLoader, artifact: Artifact, *, keep_in_host: bool
) -> TieredModel:
    """A model on the store's device.

    Raises:
        LoaderError: see `Loader.load` and `Store.load`; nothing stays behind.
    """
    rest = loader.weightless(artifact)
    model = TieredModel(store, key, rest)
    try:
        model.bring(keep_in_host=keep_in_host)
    except BaseException:
        rest.close()
        raise
    rest.let_go()
    return model
