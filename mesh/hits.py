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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loaders.base import Tensor
from mesh.company import MOST_ROWS_EACH, Company, JointRun
from mesh.directory import NAMING, Directory
from mesh.driver import Driver, now_ms
from mesh.errors import MODEL_FAILURES, Code, MeshError, encoded
from mesh.histogram import Histogram
from mesh.in_line import Pace
from mesh.plans import Plan, Tensors, answered, answered_together, split
from mesh.resident import Resident
from mesh.router import CREATED, HOP, MODEL, PRIORITY, Router, priority_of
from mesh.rowwise import Kind
from mesh.rpc import HOLDER, SERVED, Call, Caller, Head
from mesh.split import Split
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

    __slots__ = ("cell", "copy", "drawn", "headers", "pace", "plan", "resident", "served", "size_bytes", "waiting")

    def __init__(
        self,
        copy: Copy,
        resident: Resident,
        plan: Plan,
        pace: Pace,
        size_bytes: int,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        self.copy = copy
        self.resident = resident
        self.plan = plan
        self.pace = pace
        """This and the next: of one request."""
        self.size_bytes = size_bytes
        self.waiting: list[_Waiting] = []
        self.served = 0
        """Of those waiting, from the first on."""
        self.headers = headers
        """Of the answers."""
        self.drawn = ""
        """The vmodel whose requests are split, if it is one side of one ..."""
        self.cell: Histogram | None = None
        """... and where that side's latencies go."""

    def first(self) -> dict[str, Tensor]:
        """The inputs of the first that waits."""
        return self.plan.arrays(self.waiting[0][4])


class Hits:
    """Takes ModelInfer calls from front ends: `take` is a `mesh.rpc.Quick`."""

    def __init__(self, driver: Driver, router: Router, directory: Directory, ok: Histogram, sides: Split) -> None:
        """`ok` is where latencies go, `sides` where those of vmodels with a canary go too."""
        self._driver = driver
        self._engine = driver.engine
        self._in_line = driver.in_line
        self._batcher = driver.batcher
        self._router = router
        self._directory = directory
        self._ok = ok
        self._sides = sides
        self._in_transition = driver.engine.view.in_transition
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
        drawn = None
        if not naming and name in self._in_transition:
            drawn = self._directory.draw(name, head)
            if drawn is not None:
                naming = drawn  # one group for each side
        group = self._groups.get((key, naming))
        if group is None:
            if drawn is not None:
                group = self._group(drawn[0], key, tensors, len(message))
                self._is_side(group, name, *drawn)
            else:
                model_id = self._directory.known_name(name) if not naming else self._named(head, message)
                group = self._group(model_id, key, tensors, len(message))
            if group is None:
                return False
            if not self._groups:
                self._loop.call_soon(self._turn)
            self._groups[key, naming] = group
        elif not group.plan.fits(tensors):
            if drawn is not None:
                self._directory.give_back(name, drawn[0])
            return False
        group.waiting.append((caller, call, message, id_field, tensors, deadline, time.perf_counter()))
        return True

    def _is_side(self, group: _Group | None, vmodel_id: str, model_id: ModelId, side: str) -> None:
        if group is None:
            self._directory.give_back(vmodel_id, model_id)
            return
        group.drawn = vmodel_id
        group.headers = (*self._headers, (SERVED, encoded(model_id)))
        group.cell = self._sides.cell(vmodel_id, side, Code.OK)

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
        return _Group(copy, resident, plan, pace, size_bytes, self._headers)

    def _turn(self) -> None:
        """All that came was read: serve it."""
        groups, self._groups = self._groups, {}
        callers: dict[Caller, None] = {}
        now_s, used_ms = self._loop.time(), now_ms()
        if len(groups) > 1:
            try:
                self._serve_jointly(groups.values(), callers, now_s)
            except Exception:
                log.exception("models are run one by one")
        for group in groups.values():
            try:
                if group.served < len(group.waiting):
                    self._serve(group, callers, now_s)
                self._engine.served(group.copy, group.served, used_ms)
            except Exception:
                log.exception("requests are left to their handler")
            for caller, call, message, *_ in group.waiting[group.served :]:
                if group.drawn:
                    self._directory.give_back(group.drawn, group.copy.model.model_id)
                caller.give_back(call, message)
            self._driver.unpin(group.copy)
        for caller in callers:
            caller.flush()

    def _serve_jointly(self, groups: Iterable[_Group], callers: dict[Caller, None], now_s: float) -> None:
        """Answer requests to several models of a family in one run each time, where that is right and pays."""
        families: dict[tuple[int, Kind], list[_Group]] = {}
        for group in groups:
            company = group.resident.company
            if company is not None and 0 < group.plan.rows <= MOST_ROWS_EACH:
                families.setdefault((id(company), group.plan.kind), []).append(group)
        for (_, kind), alike in families.items():
            company = alike[0].resident.company
            if company is None or not company.pays(len(alike)):
                continue
            ready = [group for group in alike if group.waiting[0][5] > now_s and self._may_join(group)]
            if not self._batcher.may_join(company, kind, [(each.copy, each.resident, each.first) for each in ready]):
                continue
            most = company.most_in_line(alike[0].pace.typical_s)
            for begin in range(0, len(ready), most) if most > 1 else ():
                chosen = ready[begin : begin + most]
                if len(chosen) < 2 or not self._in_line.has_time or not self._run_jointly(company, chosen, callers):
                    break

    def _may_join(self, group: _Group) -> bool:
        return self._batcher.may_batch(group.copy, group.resident, group.plan.kind, group.first)

    def _run_jointly(self, company: Company, groups: Sequence[_Group], callers: dict[Caller, None]) -> bool:
        """Whether the run went well."""
        taken = [group.waiting[: MOST_ROWS_EACH // group.plan.rows] for group in groups]
        requests = [
            group.first()
            if len(waiting) == 1
            else group.plan.stacked([tensors for _, _, _, _, tensors, _, _ in waiting])
            for group, waiting in zip(groups, taken, strict=True)
        ]
        models, outputs = [group.resident.model for group in groups], groups[0].plan.outputs
        began_s = time.perf_counter()
        try:
            results = company.family.infer_many(models, requests, outputs)
        except MODEL_FAILURES:  # one of them is to blame, which shows when each is run alone
            return False
        finally:
            run = JointRun(company, [group.pace for group in groups])
            self._in_line.ran(run, time.perf_counter() - began_s)
        self._batcher.joint.observe(len(groups))
        for group, waiting, result in zip(groups, taken, results, strict=True):
            responses = _answers(group.plan, [id_field for _, _, _, id_field, _, _, _ in waiting], result)
            if responses is not None:
                self._batcher.sizes.observe(len(waiting))
                self._settle(group, waiting, responses, callers)
        return True

    def _serve(self, group: _Group, callers: dict[Caller, None], now_s: float) -> None:
        """Answer requests, as many at once as may be, beginning with the first that has no answer."""
        model_id, waiting = group.copy.model.model_id, group.waiting
        most = self._most(group) if len(waiting) > 1 else 1
        count, pace = 1, group.pace
        while group.served < len(waiting):
            if most > 1:
                left = len(waiting) - group.served
                count, pace = self._in_line.together(model_id, group.size_bytes, min(most, left))
            if not count or not self._batcher.runs_in_line(pace):
                break
            chunk = waiting[group.served : group.served + count]
            _, _, _, id_fields, tensors, deadlines, _ = zip(*chunk, strict=True)
            responses = self._run(group, pace, id_fields, tensors) if min(deadlines) > now_s else None
            if responses is None:
                break
            self._settle(group, chunk, responses, callers)

    def _settle(
        self, group: _Group, chunk: Sequence[_Waiting], responses: Sequence[bytes], callers: dict[Caller, None]
    ) -> None:
        ended_s = time.perf_counter()
        for (caller, call, _, _, _, _, since_s), response in zip(chunk, responses, strict=True):
            caller.settle(call, group.headers, response)
            callers[caller] = None
            self._ok.observe(ended_s - since_s)
            if group.cell is not None:
                group.cell.observe(ended_s - since_s)
        group.served += len(chunk)

    def _most(self, group: _Group) -> int:
        """How many requests one run may be for."""
        plan = group.plan
        if not plan.rows or 2 * group.size_bytes > _MOST_BYTES:
            return 1
        if not self._batcher.may_batch(group.copy, group.resident, plan.kind, group.first):
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
        return _answers(plan, id_fields, results)


def _answers(plan: Plan, id_fields: Sequence[bytes], results: Mapping[str, Tensor]) -> Sequence[bytes] | None:
    """The responses; None: one of them at least is like no answer before it."""
    if len(id_fields) > 1:
        return answered_together(plan, id_fields, results)
    response = answered(plan, id_fields[0], results)
    return None if response is None else (response,)
