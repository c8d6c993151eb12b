"""How many copies a model should have, and which holder gives its own up.

A copy's load is the share of its pod's run threads that its requests keep busy (arrivals times service time), and that
those which wait would take. Holders tell it coarsely, so that one of them can decide for all:

    more     the loads of all copies over `TARGET`, several at once if it comes to that; and a second one for a model
             that was used in most of the last minutes, so that it outlives its pod. (ModelMesh never gives one to a
             model that is used all the time: MM.java:5642.)
    room     a second one for steady use goes where room beyond a reserve is free, or where the coldest copy has not
             been used for an hour; one for load also where the coldest has not been used for a minute
    fewer    if those left would stay below `RELAXED`, which is less than `TARGET`, for some minutes
    idle     beyond `min_copies`, after the model's `idle_unload_s`

A holder gives its own copy up, nobody else's, and only if as many holders as are to stay have loaded theirs later:
then two can never both go, whatever their views lag. So a copy that is loaded elsewhere takes the place of an old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, exp
from typing import Final

from placement.cache import Cache, Copy
from placement.lifecycle import CopyState
from placement.limits import Limits
from placement.messages import Action, Runs
from placement.peers import Peers
from placement.records import ModelId, ModelRecord, PodId
from placement.selection import affinity
from placement.view import ClusterView

TARGET: Final = 70
"""Percent of its pod that one copy should take."""
RELAXED: Final = 45
SMOOTH_MS: Final = 5_000
"""Over which loads are averaged, and in which what waits should be worked off."""
WINDOW: Final = 10
"""Minutes."""
STEADY: Final = 7
"""Of those, used: a second copy is worth it."""
LAPSED: Final = 3
"""Fewer than these: no more."""
SPARE_MS: Final = 3_600_000
COLD_MS: Final = 60_000
RESERVE: Final = 1 / 8
"""Of a pod's capacity: left to what is asked for."""
COOL_MS: Final = 300_000
"""How long there must be too many copies before one goes; shorter where room is short."""
COOL_FULL_MS: Final = 60_000
AT_ONCE: Final = 8
"""Copies of one model asked for at one time."""
TELL_USED_MS: Final = 600_000
SCANNED: Final = 512
"""Copies looked at in one tick for whether they should go."""


@dataclass(slots=True)
class Meter:
    """Of one loaded copy that was used lately."""

    percent: float = 0.0
    """Of this pod's run threads."""
    minutes: int = 0
    """The last `WINDOW` minutes in which it was used, as bits; the lowest is the current one."""
    minute: int = 0

    def add(self, percent: float, passed_ms: int) -> None:
        """What it took lately, averaged over `SMOOTH_MS`."""
        self.percent += (percent - self.percent) * (1.0 - exp(-passed_ms / SMOOTH_MS))

    def used(self, now_ms: int) -> None:
        self.minutes = self.used_minutes(now_ms) | 1
        self.minute = now_ms // 60_000

    def used_minutes(self, now_ms: int) -> int:
        """`minutes`, as of now."""
        return self.minutes << min(WINDOW, max(0, now_ms // 60_000 - self.minute)) & (1 << WINDOW) - 1


def copies_for(model: ModelRecord, percent: float, limit: int, *, steady: bool) -> int:
    """How many copies a model that is loaded should have, if all its copies together take so much and each should take
    `limit` at most."""
    count = max(ceil(percent / limit - 1e-9), 2 if steady else 1, model.min_copies)
    return min(count, max(1, model.max_copies)) if model.max_copies else count


class Scaling:
    """Of one pod's copies."""

    def __init__(self, pod_id: PodId, limits: Limits, view: ClusterView, cache: Cache, peers: Peers) -> None:
        self._pod_id = pod_id
        self._limits = limits
        self._view = view
        self._cache = cache
        self._peers = peers
        self._meters: dict[ModelId, Meter] = {}
        self._ticked_ms = 0
        self._too_many: dict[ModelId, int] = {}
        """Copies that may go, and since when."""
        self._scan: Iterator[ModelId] = iter(())
        self.kept_bytes = 0
        """Of the copies here that `is_kept`, as of the last time that all were looked at."""
        self._kept_so_far = 0

    def tick(self, runs: Runs, now_ms: int, actions: list[Action]) -> list[ModelId]:
        """Let time pass; `runs` is what ran since the last tick. Returns the copies that are to be told anew."""
        passed_ms = max(1, now_ms - self._ticked_ms) if self._ticked_ms else SMOOTH_MS
        self._ticked_ms = now_ms
        for model_id in runs:
            self._meters.setdefault(model_id, Meter())
        told: list[ModelId] = []
        for model_id, meter in list(self._meters.items()):
            copy = self._cache.copies.get(model_id)
            if copy is None or copy.state is not CopyState.LOADED:
                del self._meters[model_id]
                continue
            self._measure(copy, meter, runs.get(model_id), passed_ms, now_ms)
            if self._tell(copy, meter, now_ms):
                told.append(model_id)
            if meter.percent < 1 and not meter.used_minutes(now_ms):
                del self._meters[model_id]
            else:
                self._more(copy, meter, now_ms, actions)
        return told

    def is_kept(self, model_id: ModelId) -> bool:
        """Whether the copy here is not to be evicted for room."""
        model = self._view.models.get(model_id)
        if model is None or not (model.pinned or model.min_copies):
            return False
        return model.pinned or len(self._holders(model_id)) <= model.min_copies

    def surplus(self, now_ms: int) -> list[ModelId]:
        """The copies here that are to be given up now."""
        batch = list(islice(self._scan, SCANNED))
        entries = self._cache.copies
        self._kept_so_far += sum(entries[m].size_bytes for m in batch if m in entries and self.is_kept(m))
        if len(batch) < SCANNED:
            self.kept_bytes, self._kept_so_far = self._kept_so_far, 0
            self._scan = iter([copy.model.model_id for copy in self._cache.in_state(CopyState.LOADED)])
        copies = [entries.get(model_id) for model_id in {*batch, *self._too_many}]
        return sorted(copy.model.model_id for copy in copies if copy is not None and self._may_go(copy, now_ms))

    def _measure(self, copy: Copy, meter: Meter, ran: tuple[int, float] | None, passed_ms: int, now_ms: int) -> None:
        busy_ms = 0.0
        if ran is not None:
            count, busy_ms = ran
            meter.used(now_ms)
            copy.used_ms = max(copy.used_ms, now_ms)
            run_ms = busy_ms / count
            if abs(run_ms - copy.run_ms) > copy.run_ms / 4:
                copy.run_ms = run_ms
                self._cache.policy.revalue(copy.model.model_id, copy.worth)
        threads = self._limits.run_threads
        waiting = max(0, copy.pins - threads)
        meter.add(100 * (busy_ms / passed_ms + waiting * copy.run_ms / SMOOTH_MS) / threads, passed_ms)

    def _tell(self, copy: Copy, meter: Meter, now_ms: int) -> bool:
        """Whether others should hear of its load or its use: rarely, and not of what makes no difference."""
        percent = 0 if meter.percent < 10 else round(meter.percent)
        if abs(percent - copy.busy_percent) > max(5, copy.busy_percent // 4):
            copy.busy_percent = percent
        elif copy.used_ms - max(copy.told_ms, copy.since_ms) < TELL_USED_MS:
            return False
        copy.told_ms = copy.used_ms
        return True

    def _more(self, copy: Copy, meter: Meter, now_ms: int, actions: list[Action]) -> None:
        """Ask for further copies, if it is on this holder to decide."""
        model = self._view.models.get(copy.model.model_id)
        if model is None or (meter.percent < TARGET and model.max_copies == 1):
            return
        steady = meter.used_minutes(now_ms).bit_count() >= STEADY
        if meter.percent < TARGET and not steady and not copy.busy_percent:
            return
        model_id = model.model_id
        holders = self._holders(model_id)
        if max(holders, key=lambda pod_id: affinity(model_id, pod_id), default="") != self._pod_id:
            return
        total = self._total(model_id, meter)
        for_load = copies_for(model, total, TARGET, steady=False)
        wanted = copies_for(model, total, TARGET, steady=steady)
        coming = len({*holders, *self._peers.to_come(model_id, now_ms)})
        for have in range(coming, min(wanted, len(holders) + AT_ONCE)):
            cold_ms = COLD_MS if have < for_load else SPARE_MS
            reserve = 0.0 if have < for_load else RESERVE
            wish = self._peers.ask(model, now_ms, cold_ms=cold_ms, reserve=reserve)
            if wish is None:
                return
            actions.append(wish)

    def _may_go(self, copy: Copy, now_ms: int) -> bool:
        """Whether the copy here has been one too many for long enough."""
        model_id = copy.model.model_id
        model = self._view.models.get(model_id)
        if copy.state is not CopyState.LOADED or model is None or not self._is_too_many(copy, model, now_ms):
            self._too_many.pop(model_id, None)
            return False
        since_ms = self._too_many.setdefault(model_id, now_ms)
        if self._is_idle(copy, model, now_ms):
            return True
        cache = self._cache
        is_full = cache.capacity_bytes - cache.committed_bytes < RESERVE * cache.capacity_bytes
        return now_ms - since_ms >= (COOL_FULL_MS if is_full else COOL_MS)

    def _is_too_many(self, copy: Copy, model: ModelRecord, now_ms: int) -> bool:
        known = self._view.copies(model.model_id)
        if copy.pins or not (model.idle_unload_s or len(known) > (self._pod_id in known)):
            return False  # in use, or the only one, as most are
        if self._is_idle(copy, model, now_ms):
            keep = model.min_copies
        else:
            meter = self._meters.get(model.model_id, Meter())
            steady = meter.used_minutes(now_ms).bit_count() >= LAPSED
            keep = copies_for(model, self._total(model.model_id, meter), RELAXED, steady=steady)
        return self._later(copy) >= keep

    def _is_idle(self, copy: Copy, model: ModelRecord, now_ms: int) -> bool:
        idle_ms = now_ms - max(copy.used_ms, copy.since_ms)
        return bool(model.idle_unload_s) and not model.pinned and idle_ms >= model.idle_unload_s * 1_000

    def _later(self, copy: Copy) -> int:
        """Holders that have loaded theirs after this one, by an order on which all agree."""
        model_id = copy.model.model_id
        own = copy.since_ms, affinity(model_id, self._pod_id)
        records = self._view.copies(model_id)
        return sum(
            (records[pod_id].since_ms, affinity(model_id, pod_id)) > own
            for pod_id in self._holders(model_id)
            if pod_id != self._pod_id
        )

    def _holders(self, model_id: ModelId) -> list[PodId]:
        """Pods with a copy that serves and stays, this one among them if it has."""
        return self._peers.holders(model_id)

    def _total(self, model_id: ModelId, meter: Meter) -> float:
        """Percent of one pod that all copies take."""
        copies = self._view.copies(model_id)
        others = (pod_id for pod_id in self._holders(model_id) if pod_id != self._pod_id)
        return meter.percent + sum(copies[pod_id].busy_percent for pod_id in others)
