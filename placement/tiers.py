"""The tiers below the device: what a load leaves there or takes from there, and where what is given up goes.

Host memory, if exclusive, is a victim cache: what the device gives up is copied down into it, and what is loaded from
it leaves it, so that a host smaller than the device still adds to it. If inclusive, loads leave a copy in it on their
way, and the device gives up without copying. What the host gives up goes to disk, unless it lies there already; loads
from the store leave a copy there (decision 7).

Room is made before a transfer starts, by giving up the coldest in that tier. Waiting goes one way only, from the device
down to the disk, which waits for nothing but drops: so no two transfers wait for each other. Where no room can be made,
nothing is kept, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from placement.cache import Cache, Copy
from placement.costs import LoadCosts
from placement.holdings import Holding, Holdings, HoldMove, HoldState
from placement.lifecycle import CopyState, IllegalMove
from placement.limits import HostMode
from placement.messages import Action, Demote, DropHeld
from placement.published import Published
from placement.records import ModelId, ModelRecord, Tier
from placement.stats import Stats
from placement.view import ClusterView, same_contents


class LowerTiers:
    """What host memory and disk of one pod hold, nearest first. Tiers without capacity do not exist."""

    def __init__(
        self,
        lower: Mapping[Tier, Holdings],
        host_mode: HostMode,
        cache: Cache,
        view: ClusterView,
        costs: LoadCosts,
        published: Published,
        stats: Stats,
    ) -> None:
        self._lower = lower
        self._host_is_exclusive = host_mode is HostMode.EXCLUSIVE
        self._cache = cache
        self._view = view
        self._costs = costs
        self._published = published
        self._stats = stats

    def held(self, model: ModelRecord) -> Holding | None:
        """The nearest bytes a load of the model may read; None: it reads from the store."""
        for holdings in self._lower.values():
            holding = holdings.entries.get(model.model_id)
            if holding is not None and holding.state is HoldState.HELD and same_contents(holding.model, model):
                return holding
        return None

    def reload_ms(self, model: ModelRecord, size_bytes: int, without: Tier = Tier.DEVICE) -> float:
        """What loading the model will take once a tier has given it up."""
        source = self._below(without)
        if source is None and without is Tier.DEVICE and (held := self.held(model)) is not None:
            source = held.tier
        return self._costs.reload_ms(model.model_id, source, size_bytes)

    def touch(self, model_id: ModelId, used_ms: int) -> None:
        """Somebody wants the model, or wanted it until it was given up in the tier above."""
        for holdings in self._lower.values():
            holding = holdings.entries.get(model_id)
            if holding is not None:
                holding.used_ms = max(holding.used_ms, used_ms)
                if holding.state is HoldState.HELD:
                    holdings.policy.touch(model_id, used_ms)

    def adopt(
        self, model_id: ModelId, registration: int, tier: Tier, size_bytes: int, now_ms: int, actions: list[Action]
    ) -> bool:
        """Take up what an earlier process of this pod has left in a tier. False: it is of no use, or does not fit."""
        model, holdings = self._view.models.get(model_id), self._lower[tier]
        room_bytes = holdings.capacity_bytes - max(holdings.committed_bytes, holdings.resident_bytes)
        if model is None or model.created != registration or model_id in holdings.entries or size_bytes > room_bytes:
            return False
        holding = Holding(tier, model, size_bytes, now_ms, model.last_used_ms)
        holding.reload_ms = self.reload_ms(model, size_bytes, without=tier)
        holdings.add(holding)
        for move in (HoldMove.FILL, HoldMove.KEEP):
            holdings.move(holding, move, now_ms)
        self._changed(model, actions)
        return True

    # Loads into the device

    def choose_source(self, copy: Copy) -> None:
        """What the load of a wanted copy will read. It stays until then, even if others want its room."""
        copy.source = self.held(copy.model)
        if copy.source is not None:
            copy.source.pins += 1

    def promise_load(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Make room for what the load will leave."""
        source = copy.source
        if not self._host_is_exclusive and (source is None or source.tier is not Tier.HOST):
            self._fill(Tier.HOST, copy, now_ms, actions)
        if source is None:
            self._fill(Tier.DISK, copy, now_ms, actions)

    def load_ended(self, copy: Copy, kept: Mapping[Tier, int], now_ms: int, actions: list[Action]) -> None:
        """The load has ended well; `kept`: what lies in which of the tiers it was to fill."""
        if not kept.keys() <= {fill.tier for fill in copy.fills}:
            raise IllegalMove(f"nobody asked to keep it in {list(kept)}: {copy!r}")
        source, copy.source = copy.source, None
        origin = None if source is None else source.tier
        self._stats.moved_bytes[origin, Tier.DEVICE] += copy.measured_bytes
        self._end_fills(copy, origin, kept, now_ms, actions)
        if source is not None:
            moves = source.tier is Tier.HOST and self._host_is_exclusive and not copy.doomed
            self._release(source, moves, now_ms, actions)

    def load_given_up(self, copy: Copy, spoilt: bool, now_ms: int, actions: list[Action]) -> None:
        """It did not start, or failed; `spoilt`: what it read may be to blame."""
        self._end_fills(copy, None, {}, now_ms, actions)
        source, copy.source = copy.source, None
        if source is not None:
            self._release(source, spoilt, now_ms, actions)

    # Unloads from the device

    def promise_unload(self, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        """Make room below for what the device gives up, unless it never came to serve."""
        self.touch(copy.model.model_id, copy.used_ms)
        below = self._below(Tier.DEVICE)
        if below is not None and copy.measured_bytes == copy.size_bytes and self._is_current(copy.model):
            self._fill(below, copy, now_ms, actions)

    def unload_ended(self, copy: Copy, kept: bool, now_ms: int, actions: list[Action]) -> None:
        if kept and not copy.fills:
            raise IllegalMove(f"nobody asked to keep it: {copy!r}")
        sizes = {fill.tier: fill.size_bytes for fill in copy.fills} if kept else {}
        self._end_fills(copy, Tier.DEVICE, sizes, now_ms, actions)

    # Both

    def may_start(self, copy: Copy) -> bool:
        """Whether the room promised for what a load or unload leaves is free."""
        return all(self._lower[fill.tier].may_fill(fill) for fill in copy.fills)

    def start(self, copy: Copy, now_ms: int) -> None:
        for fill in copy.fills:
            self._lower[fill.tier].move(fill, HoldMove.FILL, now_ms)

    # Between lower tiers

    def demoted(self, model_id: ModelId, target: Tier, kept: bool, now_ms: int, actions: list[Action]) -> None:
        fill = self._lower[target].entries[model_id]
        source, fill.source = fill.source, None
        if source is None or fill.state is not HoldState.FILLING:
            raise IllegalMove(f"nobody asked to copy it down: {fill!r}")
        self._end_fill(fill, source.tier, fill.size_bytes if kept else None, now_ms, actions)
        self._release(source, False, now_ms, actions)

    def dropped(self, model_id: ModelId, tier: Tier, now_ms: int) -> None:
        holding = self._lower[tier].entries[model_id]
        if not holding.drop_started:
            raise IllegalMove(f"nobody asked to drop it: {holding!r}")
        self._lower[tier].move(holding, HoldMove.DROPPED, now_ms)

    def lost(self, model_id: ModelId, tier: Tier, now_ms: int, actions: list[Action]) -> None:
        """It is not there any more. What a load reads is left to that load, which will find out."""
        holding = self._lower[tier].entries.get(model_id)
        if holding is not None and holding.state is HoldState.HELD and not holding.pins:
            self._lower[tier].move(holding, HoldMove.DROP, now_ms)
            self._lower[tier].move(holding, HoldMove.DROPPED, now_ms)
            self._changed(holding.model, actions)

    def forget(self, model_id: ModelId, now_ms: int, actions: list[Action]) -> None:
        """If the model was removed or registered anew: what is held of it goes."""
        for holdings in self._lower.values():
            holding = holdings.entries.get(model_id)
            if holding is None or self._is_current(holding.model):
                continue
            match holding.state:
                case HoldState.HELD:
                    self._drop(holding, now_ms, actions)
                case HoldState.FILLING:
                    holding.doomed = True
                case HoldState.PROMISED:
                    holdings.move(holding, HoldMove.ABANDON, now_ms)
                    if holding.source is not None:
                        self._release(holding.source, False, now_ms, actions)
                    else:
                        self._cache.copies[model_id].fills.remove(holding)

    def advance(self, now_ms: int, actions: list[Action]) -> None:
        """Start the copies down for which there is room now."""
        for holdings in self._lower.values():
            for fill in list(holdings.in_state(HoldState.PROMISED)):
                self._copy_down(fill, now_ms, actions)

    def _below(self, tier: Tier) -> Tier | None:
        """Where what a tier gives up is copied to."""
        down = {Tier.HOST: Tier.DISK, **({Tier.DEVICE: Tier.HOST} if self._host_is_exclusive else {})}
        below = down.get(tier)
        return below if below in self._lower else None

    def _is_current(self, model: ModelRecord) -> bool:
        registered = self._view.models.get(model.model_id)
        return registered is not None and same_contents(registered, model)

    def _fill(self, tier: Tier, copy: Copy, now_ms: int, actions: list[Action]) -> None:
        fill = self._promise(tier, copy, now_ms, actions)
        if fill is not None:
            copy.fills.append(fill)

    def _promise(self, tier: Tier, of: Copy | Holding, now_ms: int, actions: list[Action]) -> Holding | None:
        """Promise room for a model in a tier, giving up the coldest there; None: the tier has none to give, or some of
        the model already."""
        holdings = self._lower.get(tier)
        if holdings is None or of.model.model_id in holdings.entries or of.size_bytes > holdings.capacity_bytes:
            return None
        need_bytes = of.size_bytes - (holdings.capacity_bytes - holdings.committed_bytes)
        victims: list[Holding] = []
        with closing(holdings.evictable(now_ms)) as evictable:
            while need_bytes > 0:
                victim = next(evictable, None)
                if victim is None:
                    return None
                victims.append(victim)
                need_bytes -= victim.size_bytes
        for victim in victims:
            holdings.policy.evict(victim.model.model_id)
            self._drop(victim, now_ms, actions, copy_down=True)
        fill = Holding(tier, of.model, of.size_bytes, now_ms, of.used_ms, of.uses, run_ms=of.run_ms, slo_ms=of.slo_ms)
        holdings.add(fill)
        return fill

    def _copy_down(self, fill: Holding, now_ms: int, actions: list[Action]) -> None:
        if fill.source is not None and self._lower[fill.tier].may_fill(fill):
            self._lower[fill.tier].move(fill, HoldMove.FILL, now_ms)
            actions.append(Demote(fill.model.model_id, fill.source.tier, fill.tier))

    def _end_fills(
        self, copy: Copy, origin: Tier | None, kept: Mapping[Tier, int], now_ms: int, actions: list[Action]
    ) -> None:
        for fill in copy.fills:
            self._end_fill(fill, origin, kept.get(fill.tier), now_ms, actions)
        copy.fills.clear()

    def _end_fill(
        self, fill: Holding, origin: Tier | None, size_bytes: int | None, now_ms: int, actions: list[Action]
    ) -> None:
        """A transfer has left so many bytes in a tier; None: nothing."""
        holdings = self._lower[fill.tier]
        if size_bytes is None:
            holdings.move(fill, HoldMove.ABANDON, now_ms)
            return
        if size_bytes > fill.size_bytes:
            raise IllegalMove(f"{size_bytes} bytes where fewer were promised: {fill!r}")
        holdings.resize(fill, size_bytes)
        fill.reload_ms = self.reload_ms(fill.model, size_bytes, without=fill.tier)
        holdings.move(fill, HoldMove.KEEP, now_ms)
        self._stats.moved_bytes[origin, fill.tier] += size_bytes
        if fill.doomed:
            self._drop(fill, now_ms, actions)
        else:
            self._changed(fill.model, actions)

    def _release(self, source: Holding, drop: bool, now_ms: int, actions: list[Action]) -> None:
        """A transfer reads it no longer."""
        source.pins -= 1
        if drop and source.state is HoldState.HELD:
            self._drop(source, now_ms, actions)
        else:
            self._start_drop(source, actions)

    def _drop(self, holding: Holding, now_ms: int, actions: list[Action], *, copy_down: bool = False) -> None:
        """Give it up; with `copy_down`, to the tier below if that has room for it."""
        self._lower[holding.tier].move(holding, HoldMove.DROP, now_ms)
        self._changed(holding.model, actions)
        below = self._below(holding.tier) if copy_down else None
        fill = None if below is None else self._promise(below, holding, now_ms, actions)
        if fill is not None:
            fill.source = holding
            holding.pins += 1
            self._copy_down(fill, now_ms, actions)
        self._start_drop(holding, actions)

    def _start_drop(self, holding: Holding, actions: list[Action]) -> None:
        if holding.state is HoldState.DROPPING and not holding.pins:
            holding.drop_started = True
            actions.append(DropHeld(holding.model.model_id, holding.tier))

    def _changed(self, model: ModelRecord, actions: list[Action]) -> None:
        """Tell of it, and value the device's copy by where it would be loaded from now."""
        self._published.tell_held(model.model_id, actions)
        copy = self._cache.copies.get(model.model_id)
        if copy is not None and copy.state is CopyState.LOADED:
            copy.reload_ms = self.reload_ms(copy.model, copy.size_bytes)
            self._cache.policy.revalue(model.model_id, copy.worth)
