"""What a pod's loaders do: what is in memory and in the tiers below it, in true bytes, and what is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from placement.messages import (
    Demote,
    Demoted,
    DropHeld,
    EstimateSize,
    HeldDropped,
    LoadFailed,
    LoadFinished,
    SizeEstimated,
    StartLoad,
    StartUnload,
    UnloadFinished,
)
from placement.records import ModelId, ModelRecord, Tier
from placement.simulator.checks import Violation
from placement.simulator.clock import ticks

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod

_ESTIMATE_MS: Final = 2.0
_UNLOAD_MS: Final = 1.0
TIER_SHARE: Final = {Tier.HOST: 0.05, Tier.DISK: 0.3, None: 1.0}
"""How long a load takes from there, next to one from the store."""


@dataclass(eq=False, slots=True)
class Resident:
    """A model in memory."""

    model: ModelRecord
    size_bytes: int
    users: int = 0
    """Requests that run on it."""


class Loader:
    """Of one pod's process: its answers are nothing to the next process of that name."""

    def __init__(self, pod: SimPod) -> None:
        self.memory: dict[ModelId, Resident] = {}
        self.loading: dict[ModelId, StartLoad] = {}
        self.lower: dict[Tier, dict[ModelId, tuple[ModelRecord, int]]] = {tier: {} for tier in pod.engine.copies.lower}
        """What lies below the device: of which registration, and how large."""
        self.unloading: dict[ModelId, StartUnload] = {}
        self.demoting: dict[ModelId, Demote] = {}
        self._pod = pod
        self._world = pod.world

    def estimate(self, action: EstimateSize) -> None:
        self._later(_ESTIMATE_MS, self._estimated, action.model)

    def _estimated(self, model: ModelRecord) -> None:
        self._pod.step(SizeEstimated(model.model_id, self._world.estimate_bytes(model)))

    def load(self, action: StartLoad) -> None:
        model_id = action.model.model_id
        if model_id in self.loading or model_id in self.memory:
            raise Violation("a model is loaded once", "it is loaded already", self._pod, model_id)
        if action.source is not None:
            self._reads(action.source, action.model)
        self.loading[model_id] = action
        ms, fails = self._world.load(self._pod, action)
        self._later(ms, self._load_failed if fails else self._loaded, action)

    def _loaded(self, action: StartLoad) -> None:
        model = action.model
        if action.source is not None:
            self._reads(action.source, model)
        del self.loading[model.model_id]
        size_bytes = self._world.true_bytes(model)
        self.memory[model.model_id] = Resident(model, size_bytes)
        kept = {}
        for tier, most in action.keep.items():
            if size_bytes <= most and self._world.chaos.keeps():
                kept[tier] = size_bytes
                self._keep(tier, model, size_bytes)
        self._pod.step(LoadFinished(model.model_id, size_bytes, kept))

    def _load_failed(self, action: StartLoad) -> None:
        del self.loading[action.model.model_id]
        self._pod.step(LoadFailed(action.model.model_id, "broken", self._pod.rng.random() < 0.5))

    def unload(self, action: StartUnload) -> None:
        self.unloading[action.model_id] = action
        copy_ms = 0.0 if action.keep is None else self._copy_ms(action.model_id, action.keep)
        self._later(_UNLOAD_MS + copy_ms, self._unloaded, action)

    def _unloaded(self, action: StartUnload) -> None:
        del self.unloading[action.model_id]
        resident = self.memory.pop(action.model_id)
        kept = action.keep is not None and self._world.chaos.keeps()
        if kept and action.keep is not None:
            self._keep(action.keep, resident.model, resident.size_bytes)
        self._pod.step(UnloadFinished(action.model_id, kept))

    def demote(self, action: Demote) -> None:
        self.demoting[action.model_id] = action
        self._later(self._copy_ms(action.model_id, action.target), self._demoted, action)

    def _copy_ms(self, model_id: ModelId, target: Tier) -> float:
        """Down takes as long as up."""
        return self._world.models[model_id].load_ms * TIER_SHARE[target]

    def _demoted(self, action: Demote) -> None:
        del self.demoting[action.model_id]
        kept = self._world.chaos.keeps()
        if kept:
            self._keep(action.target, *self.lower[action.source][action.model_id])
        self._pod.step(Demoted(action.model_id, action.target, kept))

    def drop(self, action: DropHeld) -> None:
        self._later(_UNLOAD_MS, self._dropped, action)

    def _dropped(self, action: DropHeld) -> None:
        del self.lower[action.tier][action.model_id]
        self._pod.step(HeldDropped(action.model_id, action.tier))

    def _reads(self, tier: Tier, model: ModelRecord) -> None:
        held = self.lower[tier].get(model.model_id)
        if held is None or held[0].created != model.created:
            said = f"{tier.value} holds {held and held[0]}"
            raise Violation("a load reads what it was promised", said, self._pod, model.model_id)

    def _keep(self, tier: Tier, model: ModelRecord, size_bytes: int) -> None:
        if model.model_id in self.lower[tier]:
            raise Violation("a tier holds a model once", tier.value, self._pod, model.model_id)
        self.lower[tier][model.model_id] = model, size_bytes

    def _later(self, ms: float, call: Callable[[Any], None], action: Any) -> None:
        self._world.clock.after(ticks(ms), self._if_alive, (call, action))

    def _if_alive(self, what: tuple[Callable[[Any], None], Any]) -> None:
        if self._pod.alive:
            self._pod.sync()
            what[0](what[1])
