"""What truly lies in the tiers below a device, and the transfers in and out of them: checked against the books."""

from __future__ import annotations

from collections.abc import Mapping

from placement.holdings import Holdings, HoldState
from placement.messages import Demote, DropHeld, StartLoad
from placement.records import ModelId, ModelRecord, Tier


class Below:
    """Of one pod."""

    def __init__(self, books: Mapping[Tier, Holdings]) -> None:
        self.held: dict[Tier, dict[ModelId, tuple[int, int]]] = {tier: {} for tier in books}
        """Registration and true bytes; they go when a drop has finished."""
        self.reading: dict[ModelId, StartLoad] = {}
        """Loads under way, from wherever."""
        self.keeping: dict[ModelId, Tier] = {}
        """Unloads that are to leave a copy."""
        self.demoting: dict[ModelId, Demote] = {}
        self.dropping: set[tuple[ModelId, Tier]] = set()
        self._books = books
        self._registered: dict[ModelId, int] = {}
        """The registration of what is on the device."""

    def models(self) -> set[ModelId]:
        return {model_id for held in self.held.values() for model_id in held}

    def take(self, action: Demote | DropHeld) -> None:
        match action:
            case Demote(model_id):
                assert model_id not in self.demoting
                self.demoting[model_id] = action
            case DropHeld(model_id, tier):
                assert model_id in self.held[tier]
                assert (model_id, tier) not in self.dropping
                self.dropping.add((model_id, tier))

    def loaded(self, model: ModelRecord, kept: Mapping[Tier, int]) -> None:
        del self.reading[model.model_id]
        self._registered[model.model_id] = model.created
        for tier, size_bytes in kept.items():
            self._keep(model.model_id, tier, model.created, size_bytes)

    def unloaded(self, model_id: ModelId, size_bytes: int, kept: bool) -> None:
        tier = self.keeping.pop(model_id, None)
        if kept:
            assert tier is not None
            self._keep(model_id, tier, self._registered[model_id], size_bytes)

    def demoted(self, model_id: ModelId, target: Tier, kept: bool) -> None:
        source = self.demoting.pop(model_id).source
        if kept:
            self._keep(model_id, target, *self.held[source][model_id])

    def dropped(self, model_id: ModelId, tier: Tier) -> None:
        self.dropping.remove((model_id, tier))
        del self.held[tier][model_id]

    def check(self, memory: Mapping[ModelId, int]) -> None:
        """True bytes are the books'; with those on their way there they never exceed a tier. `memory`: the device's."""
        for tier, books in self._books.items():
            books.check()
            coming = [load.keep.get(tier, 0) for load in self.reading.values()]
            coming += [memory[model_id] for model_id, below in self.keeping.items() if below is tier]
            coming += [self.held[job.source][m][1] for m, job in self.demoting.items() if job.target is tier]
            there = {model_id: size_bytes for model_id, (_, size_bytes) in self.held[tier].items()}
            assert sum(there.values()) + sum(coming) <= books.capacity_bytes
            lying = (HoldState.HELD, HoldState.DROPPING)
            assert there == {m: h.size_bytes for m, h in books.entries.items() if h.state in lying}
        for model_id, load in self.reading.items():
            if load.source is not None:
                assert self.held[load.source][model_id][0] == load.model.created, "a load reads what it should not"
                assert (model_id, load.source) not in self.dropping, "dropped while it is read"
        for model_id, job in self.demoting.items():
            assert (model_id, job.source) not in self.dropping, "dropped while it is copied"

    def _keep(self, model_id: ModelId, tier: Tier, created: int, size_bytes: int) -> None:
        assert model_id not in self.held[tier], "held twice"
        self.held[tier][model_id] = created, size_bytes
