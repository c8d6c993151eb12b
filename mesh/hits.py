"""Inference on models that are loaded here, known to be fast, and asked for in a way that is known: the usual hit.

What of a request differs from others before it are its tensors' bytes and its id. So such requests are gathered while
the loop reads, and served when it has read all there was: with nothing to wait for, they need no coroutine, and what
there is to decide is decided once for all that are alike. Whatever is not of this kind, or does not go well, is left to
the handler (`mesh.inference`), which says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from mesh.directory import NAMING, Directory
from mesh.driver import Driver, now_ms
from mesh.errors import MODEL_FAILURES, MeshError
from mesh.histogram import Histogram
from mesh.in_line import Pace
from mesh.plans import Plan, Tensors, answered, answered_together, split
from mesh.resident import Resident
from mesh.router import CREATED, HOP, MODEL, PRIORITY, Router, priority_of
from mesh.rpc import HOLDER, Call, Caller, Head
from placement.cache import Copy
from placement.lifecycle import CopyState
from placement.records import ModelId
from protos.inference_pb2 import ModelInferRequest

log = logging.getLogger(__name__)

_MODEL_NAME: Final = ModelInferRequest.MODEL_NAME_FIELD_NUMBER
_MATTER: Final = NAMING | {HOP, f"{HOP}-bin", MODEL, MODEL.removesuffix("-bin"), CREATED, f"{CREATED}-bin", PRIORITY}
"""Headers on which it depends which model a call means, or that may be wrong."""
_MEMO: Final = "hits"
_LARGEST_BYTES: Final = 64 << 10
"""Larger requests cost so much that a coroutine more does not count, and may only pass through."""
_MOST_ROWS: Final = 128
_MOST_BYTES: Final = 256 << 10
"""Of requests that are run as one on the loop: larger ones gain nothing by it, and copying them costs."""

_Waiting = tuple[Caller, Any, bytes, bytes, Tensors, float, float]
"""Caller, call, message, the id's field, tensors, deadline, time of arrival."""


class _Group:
    """Requests that differ in nothing but their ids and tensors."""

    __slots__ = ("copy", "pace", "plan", "resident", "size_bytes", "waiting")

    def __init__(self, copy: Copy, resident: Resident, plan: Plan, pace: Pace, size_bytes: int) -> None:
        self.copy = copy
        self.resident = resident
        self.plan = plan
        self.pace = pace
        """This and the next: of one request."""
        self.size_bytes = size_bytes
        self.waiting: list[_Waiting] = []


class Hits:
    """Takes ModelInfer calls from front ends: `take` is a `mesh.rpc.Quick`."""

    def __init__(self, driver: Driver, router: Router, directory: Directory, ok: Histogram) -> None:
        """`ok` is where latencies go."""
        self._driver = driver
        self._engine = driver.engine
        self._in_line = driver.in_line
        self._batcher = driver.batcher
        self._router = router
        self._directory = directory
        self._ok = ok
        self._loop = asyncio.get_running_loop()
        self._groups: dict[tuple[bytes, Any], _Group] = {}
        """What came in this turn of the loop."""
        self._headers = ((HOLDER, driver.engine.pod_id),)

    def take(self, caller: Caller, call: Any, head: Head, message: bytes, deadline: float) -> bool:
        """Whether the call will be answered, or given back, before the loop waits again."""
        found = split(message) if len(message) <= _LARGEST_BYTES else None
        if found is None:
            return False
        key, name, id_field, tensors = found
        naming = head.memo.get(_MEMO)
        if naming is None:
            naming = head.memo[_MEMO] = tuple([pair for pair in head.metadata if pair[0] in _MATTER])
        group = self._groups.get((key, naming))
        if group is None:
            model_id = self._directory.known_name(name) if not naming else self._named(head, message)
            group = self._group(model_id, key, tensors, len(message))
            if group is None:
                return False
            if not self._groups:
                self._loop.call_soon(self._turn)
            self._groups[key, naming] = group
        elif not group.plan.fits(tensors):
            return False
        group.waiting.append((caller, call, message, id_field, tensors, deadline, time.perf_counter()))
        return True

    def _named(self, head: Head, message: bytes) -> ModelId | None:
        """The model that is meant where headers have a say in it; None: not to be told at once."""
        call = Call(head.path, head.metadata, 0, keys=head.keys, memo=head.memo)
        try:
            priority_of(call)  # nothing waits here, so it only must not be wrong
            known = self._router.known(call, message, _MODEL_NAME)
        except MeshError:
            return None
        return known[0] if known is not None else None

    def _group(self, model_id: ModelId | None, key: bytes, tensors: Tensors, size_bytes: int) -> _Group | None:
        """A group for requests like this one, its copy pinned; None: they cannot be served here and now."""
        copy = self._engine.cache.copies.get(model_id) if model_id is not None else None
        if copy is None or model_id is None or copy.state is not CopyState.LOADED:
            return None
        resident = self._driver.resident(model_id)
        plan = resident.plans.get(key, tensors)
        if plan is None or not plan.answer or resident.settings.max_queue_delay_us:
            return None
        pace = self._in_line.pace(model_id, size_bytes)
        if not pace.in_line:
            return None
        self._driver.pin(copy)
        return _Group(copy, resident, plan, pace, size_bytes)

    def _turn(self) -> None:
        """All that came was read: serve it."""
        groups, self._groups = self._groups, {}
        callers: dict[Caller, None] = {}
        now_s, used_ms = self._loop.time(), now_ms()
        for group in groups.values():
            served = 0
            try:
                served = self._serve(group, callers, now_s)
                self._engine.served(group.copy, served, used_ms)
            except Exception:
                log.exception("requests are left to their handler")
            for caller, call, message, *_ in group.waiting[served:]:
                caller.give_back(call, message)
            self._driver.unpin(group.copy)
        for caller in callers:
            caller.flush()

    def _serve(self, group: _Group, callers: dict[Caller, None], now_s: float) -> int:
        """Answer requests, as many at once as may be; how many were, beginning with the first."""
        model_id, waiting = group.copy.model.model_id, group.waiting
        most = self._most(group) if len(waiting) > 1 else 1
        count, pace = 1, group.pace
        served = 0
        while served < len(waiting):
            if most > 1:
                count, pace = self._in_line.together(model_id, group.size_bytes, min(most, len(waiting) - served))
            if not count or not self._batcher.runs_in_line(pace):
                break
            chunk = waiting[served : served + count]
            _, _, _, id_fields, tensors, deadlines, _ = zip(*chunk, strict=True)
            responses = self._run(group, pace, id_fields, tensors) if min(deadlines) > now_s else None
            if responses is None:
                break
            ended_s = time.perf_counter()
            for (caller, call, _, _, _, _, since_s), response in zip(chunk, responses, strict=True):
                caller.settle(call, self._headers, response)
                callers[caller] = None
                self._ok.observe(ended_s - since_s)
            served += count
        return served

    def _most(self, group: _Group) -> int:
        """How many requests one run may be for."""
        plan, (_, _, _, _, tensors, _, _) = group.plan, group.waiting[0]
        if not plan.rows or 2 * group.size_bytes > _MOST_BYTES:
            return 1
        if not self._batcher.may_batch(group.copy, group.resident, plan.kind, lambda: plan.arrays(tensors)):
            return 1
        return max(
            min((group.resident.settings.max_batch_size or _MOST_ROWS) // plan.rows, _MOST_BYTES // group.size_bytes), 1
        )

    def _run(
        self, group: _Group, pace: Pace, id_fields: Sequence[bytes], tensors: Sequence[Tensors]
    ) -> Sequence[bytes] | None:
        """The responses; None: one of them at least would be an error, or like no answer before it."""
        plan, count = group.plan, len(tensors)
        inputs = plan.arrays(tensors[0]) if count == 1 else plan.stacked(tensors)
        began_s = time.perf_counter()
        try:
            results = group.resident.model.infer(inputs, plan.outputs)
        except MODEL_FAILURES:  # the handler meets it again, and reports it
            return None
        finally:
            self._in_line.ran(pace, time.perf_counter() - began_s)
        self._batcher.sizes.observe(count)
        if count > 1:
            return answered_together(plan, id_fields, results)
        response = answered(plan, id_fields[0], results)
        return None if response is None else (response,)
