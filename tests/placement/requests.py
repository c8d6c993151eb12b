"""Requests to pods, as `mesh.router` lets them walk: each may wait between its steps, and go on when it is woken."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Final

from placement.cache import Copy
from placement.lifecycle import HAS_FAILED, IN_FLIGHT, CopyState
from placement.messages import CopyWanted, Forward, Hop, Join, LoadHere, Refuse, Serve, Why
from placement.records import ModelId, PodId, model_key
from tests.placement.pods import START_MS, Pod, Waiter
from tests.placement.registry import Registry

ATTEMPTS: Final = 6
"""mesh.router.ATTEMPTS"""

Walk = Generator[Waiter | None, None, None]
"""Yields a waiter to be woken by, or None while the model runs; ends when the request does."""


class Refused(Exception):
    """The request's error (`MeshError`)."""

    def __init__(self, why: Why | None, *, elsewhere: bool = True) -> None:
        super().__init__(why)
        self.elsewhere = elsewhere


class Requests:
    """To the pods of one mesh."""

    def __init__(self, pods: Mapping[PodId, Pod]) -> None:
        self.pods = pods
        self.now_ms = START_MS
        self.registry = Registry()
        self.unreachable: set[PodId] = set()
        self.requests: list[tuple[Walk, Waiter | None]] = []
        self.routes = dict.fromkeys(pods, 0)
        self.ended = 0

    def walk(self, pod: Pod, model_id: ModelId, hop: Hop, used_ms: int | None) -> Walk:
        engine = pod.engine
        exclude: set[PodId] = set()
        for _ in range(ATTEMPTS):
            self.routes[engine.pod_id] += 1
            route = engine.route(model_id, hop, exclude, self.now_ms, used_ms)
            try:
                match route:
                    case Serve(copy):
                        yield from self._serve(pod, copy)
                        return
                    case Join(copy):
                        if (yield from self._join(pod, copy)):
                            return
                    case LoadHere():
                        if (yield from self._load_here(pod, model_id, used_ms)):
                            return
                    case Forward(pod_id, onward):
                        assert hop is Hop.CLIENT, "a forward was forwarded"
                        assert pod_id != engine.pod_id
                        assert pod_id not in exclude
                        yield from self._forward(pod, pod_id, onward, model_id, used_ms)
                        return
                    case Refuse(Why.UNKNOWN_MODEL):
                        if not self.registry.fetch(pod, model_key(model_id)):
                            raise Refused(Why.UNKNOWN_MODEL, elsewhere=False)
                    case Refuse(why):
                        raise Refused(why)
            except Refused as error:
                if hop is not Hop.CLIENT or not error.elsewhere or isinstance(route, Refuse):
                    raise
                exclude.add(route.pod_id if isinstance(route, Forward) else engine.pod_id)
        raise Refused(None)

    def _serve(self, pod: Pod, copy: Copy) -> Walk:
        assert copy.state is CopyState.LOADED
        assert copy.model.model_id in pod.memory
        pod.engine.pin(copy)
        try:
            yield None
            assert copy.model.model_id in pod.memory, "unloaded under a request"
        finally:
            pod.unpin(copy)

    def _join(self, pod: Pod, copy: Copy) -> Generator[Waiter | None, None, bool]:
        pod.engine.join(copy)
        try:
            while copy.state in IN_FLIGHT and not copy.doomed:
                yield pod.wait(copy.model.model_id)
            if copy.state is CopyState.LOADED:
                yield from self._serve(pod, copy)
                return True
            if copy.state in HAS_FAILED:
                raise Refused(Why.LOAD_FAILED)
            return False
        finally:
            pod.unpin(copy)

    def _load_here(self, pod: Pod, model_id: ModelId, used_ms: int | None) -> Generator[Waiter | None, None, bool]:
        if model_id not in pod.view.models:
            raise Refused(Why.UNKNOWN_MODEL, elsewhere=False)
        pod.step(CopyWanted(model_id, self.now_ms if used_ms is None else used_ms))
        copy = pod.copy(model_id)
        assert copy.state is not CopyState.FAILED, "a failed load is tried again before its expiry"
        if copy.state in IN_FLIGHT and not copy.doomed:
            return (yield from self._join(pod, copy))
        yield pod.wait(model_id)
        return False

    def _forward(self, pod: Pod, pod_id: PodId, hop: Hop, model_id: ModelId, used_ms: int | None) -> Walk:
        reached = pod_id not in self.unreachable
        pod.engine.forward_started(pod_id)
        try:
            if not reached:
                raise Refused(Why.NO_POD)
            yield from self.walk(self.pods[pod_id], model_id, hop, used_ms)
        finally:
            pod.engine.forward_ended(pod_id, reached=reached, now_ms=self.now_ms)

    def go_on(self, walk: Walk) -> None:
        try:
            self.requests.append((walk, next(walk)))
        except (StopIteration, Refused):
            self.ended += 1
