"""What the leader keeps true of the whole mesh: copies that are to be kept, those that went with their pod, free room,
pods that are empty beside full ones.

Level-based: the leader walks through all models, some at each tick, and judges them by the view as it is; a leader that
follows begins anew. At the end of a walk it has some loaded, those used last first.

    kept      fewer than `min_copies`: on any pod that can, evicting if need be
    lost      the last copy went with its pod: where room is free or the coldest copy was used before it
    ahead     never loaded, or not in this leader's time: where room beyond a reserve is free (ModelMesh: proactive
              loading), once the mesh has had time to settle
    balance   in use on the fullest pod only, while another is half empty: a copy there; the old one goes as `scaling`
              has it, or stays if it is worth it

What was unloaded by a pod that is still there (evicted, idle, given up by hand) is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest
from itertools import islice
from typing import Final

from placement.messages import Action, LoadOn
from placement.peers import Peers
from placement.records import ModelId, ModelRecord, PodId
from placement.scaling import RESERVE
from placement.view import ClusterView

SCANNED: Final = 500
"""Models looked at in one tick."""
PER_TICK: Final = 8
"""Copies asked for in one tick."""
PER_WALK: Final = 64
MOVES: Final = 2
"""Of balance, in one walk."""
SETTLE_MS: Final = 120_000
"""After which a leader loads ahead (ModelMesh: 2 min)."""
AHEAD_EVERY_MS: Final = 60_000
FULL: Final = 0.9
EMPTY: Final = 0.5
_NEVER_MS: Final = 1 << 62

_Candidate = tuple[int, ModelId]
"""When it was last used, and which. Those used at one time are candidates each (ModelMesh keeps one: MM.java:6393)."""


class Upkeep:
    """Of the pod that leads."""

    def __init__(self, view: ClusterView, peers: Peers) -> None:
        self._view = view
        self._peers = peers
        self._since_ms = 0
        """Since when this pod leads; 0: it does not."""
        self._walk: Iterator[ModelId] = iter(())
        self._lost: list[_Candidate] = []
        self._ahead: list[_Candidate] = []
        self._crowded: list[_Candidate] = []
        self._loads_ahead = False
        self._ahead_ms = 0
        self._fullest: PodId | None = None

    def rest(self) -> None:
        """Another pod leads."""
        self._since_ms = 0

    def plan(self, now_ms: int, actions: list[Action]) -> None:
        """The leader's wishes now."""
        if not self._since_ms:
            self._since_ms = now_ms
            self._begin(now_ms)
        asked = len(actions)
        batch = list(islice(self._walk, SCANNED))
        for model_id in batch:
            model = self._view.models.get(model_id)
            if model is not None and len(actions) - asked < PER_TICK:
                self._judge(model, now_ms, actions)
        if len(batch) < SCANNED:
            self._end(now_ms, actions)
            self._begin(now_ms)

    def _begin(self, now_ms: int) -> None:
        self._walk = iter(list(self._view.models))
        self._lost, self._ahead, self._crowded = [], [], []
        self._loads_ahead = now_ms - self._since_ms >= SETTLE_MS and now_ms - self._ahead_ms >= AHEAD_EVERY_MS
        self._fullest = self._crowded_pod()

    def _judge(self, model: ModelRecord, now_ms: int, actions: list[Action]) -> None:
        model_id, copies = model.model_id, self._view.copies(model.model_id)
        if model.stopped:
            return
        if model.min_copies:
            there = {*self._peers.holders(model_id), *self._peers.to_come(model_id, now_ms)}
            for _ in range(model.min_copies - len(there)):
                wish = self._peers.ask(model, now_ms, cold_ms=0)
                if wish is None:
                    return
                actions.append(wish)
        elif not copies:
            unloaded = self._view.unloaded(model_id)
            if unloaded is None:
                if self._loads_ahead and not self._peers.is_asked(model_id):
                    self._ahead.append((model.last_used_ms, model_id))
            elif unloaded[0] not in self._view.pods and not self._peers.is_asked(model_id):
                self._lost.append((unloaded[1], model_id))
        elif (
            self._fullest is not None
            and self._fullest in copies
            and len(copies) == 1
            and not self._peers.is_asked(model_id)
        ):
            self._crowded.append((copies[self._fullest].used_ms, model_id))

    def _end(self, now_ms: int, actions: list[Action]) -> None:
        """Have some of what was found loaded, what was used last first."""
        wishes: list[LoadOn | None] = []
        for used_ms, model in self._newest(self._lost, PER_WALK):
            cold_ms = max(0, now_ms - used_ms)
            wishes.append(self._peers.ask(model, now_ms, cold_ms=cold_ms, used_ms=used_ms))
        if self._loads_ahead:
            self._ahead_ms = now_ms
        for used_ms, model in self._newest(self._ahead, PER_WALK):
            wish = self._peers.ask(model, now_ms, cold_ms=_NEVER_MS, reserve=RESERVE, used_ms=used_ms or 1)
            if wish is None and not model.requires:
                break  # it is full
            wishes.append(wish)
        for used_ms, model in self._newest(self._crowded, MOVES):
            wishes.append(self._peers.ask(model, now_ms, cold_ms=_NEVER_MS, reserve=EMPTY, used_ms=used_ms))
        actions += filter(None, wishes)

    def _newest(self, found: list[_Candidate], most: int) -> Iterator[tuple[int, ModelRecord]]:
        for used_ms, model_id in nlargest(most, found):
            yield used_ms, self._view.models[model_id]

    def _crowded_pod(self) -> PodId | None:
        """The fullest pod, if it is nearly full while another is half empty."""
        pods = [pod for pod in self._view.pods.values() if not pod.draining]
        used = {pod.pod_id: pod.used_bytes / pod.capacity_bytes for pod in pods if pod.capacity_bytes}
        if not used or min(used.values()) > EMPTY or max(used.values()) < FULL:
            return None
        return max(used, key=lambda pod_id: (used[pod_id], pod_id))
