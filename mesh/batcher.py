"""Runs models: alone or with other requests in one call, on the loop or in a thread.

A request that cannot run on the loop waits with others of its kind (`mesh.rowwise`) as one batch. At the end of the
loop's turn the batch goes to the threads, in parts if several are idle, and requests join it until a thread begins it:
a batch is what has come while all threads were busy, and nobody waits for others where one is idle. Only where the
model's settings ask for a delay does it go later: when that has passed, enough has come, or a deadline is near.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

from loaders.base import Family, InferError, LoaderError, Tensor
from loaders.base import Member as FamilyMember
from mesh.batch import Batch, Item, Results, enough_rows, infer
from mesh.company import Company
from mesh.errors import MeshError, ModelLost, NoRoom, NotHere
from mesh.histogram import Histogram
from mesh.in_line import FAST_S, InLine, Pace
from mesh.limited import Limited
from mesh.resident import Resident
from mesh.rowwise import Kind, are_alike, is_rowwise, kind_of, rows_of
from mesh.workers import Workers
from placement.cache import Copy
from placement.records import Priority

log = logging.getLogger(__name__)

_TRY_S: Final = 0.25
"""Models whose runs take longer are tried, which takes four runs, only if their settings ask for batches."""
_KINDS: Final = 64
"""Kinds of requests that are tried for one model."""
_HEAD_BYTES: Final = 1024
"""Of a request, beside its tensors."""
_JOINED: Final = 8
"""Models that are tried together."""
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)


Member = tuple[Copy, Resident, Callable[[], Mapping[str, Tensor]]]
"""A copy, what is there of it, and inputs of a request to it."""


def _tried(resident: Resident, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> bool:
    """Whether the model answers row by row; if so, it is made ready for what that is good for."""
    if not is_rowwise(resident.model, inputs, outputs):
        return False
    if resident.company is not None and isinstance(resident.model, FamilyMember):
        try:
            resident.model.join()
            began_s = time.thread_time()
            resident.model.infer(inputs, outputs)
            resident.alone = sum(tensor.nbytes for tensor in inputs.values()), time.thread_time() - began_s
        except InferError:  # there was memory for a run a moment ago
            return False
        except LoaderError as error:
            log.warning("a model is run without others of its family: %s", error)
            resident.company = None
    return True


def _enter(pace: Pace, size_bytes: int, tried_bytes: int, tried_s: float) -> None:
    """Of a family there are many, each seldom asked: where threads are busy none would ever look as fast as it is."""
    if size_bytes <= 2 * tried_bytes + _HEAD_BYTES and tried_s < FAST_S / 2 and pace.may_try():
        pace.enter()
        pace.typical_s = tried_s


def _first(item: Item) -> Mapping[str, Tensor]:
    return item.inputs


class Batcher:
    """Runs the models of loaded copies."""

    def __init__(
        self,
        workers: Workers,
        in_line: InLine,
        pin: Callable[[Copy], None],
        unpin: Callable[[Copy], None],
        lost: Callable[[Copy], None],
        short: Callable[[Copy], None],
    ) -> None:
        """`pin` and `unpin` keep a copy in memory; `lost` is told of one whose model has gone, `short` of one whose run
        found no memory."""
        self._workers = workers
        self._in_line = in_line
        self._pin = pin
        self._unpin = unpin
        self._lost = lost
        self._short = short
        self._loop = asyncio.get_running_loop()
        self._latest: dict[tuple[int, Kind, Priority], Batch] = {}
        """Of each copy, kind and class of requests: what was begun last and has not ended."""
        self.sizes = Histogram(_SIZES)
        """Requests in one run of a model."""
        self.joint = Histogram(_SIZES)
        """Models in one call for several."""
        self._companies: WeakKeyDictionary[Family, Company] = WeakKeyDictionary()

    def runs_in_line(self, pace: Pace) -> bool:
        """Whether a run may be made on the loop now: it is known to be fast, and the turn has time for it."""
        return pace.in_line and self._in_line.has_time

    def may_batch(
        self, copy: Copy, resident: Resident, kind: Kind, inputs: Callable[[], Mapping[str, Tensor]] | None
    ) -> bool:
        """Whether requests of the kind may be run together. If that is not known, it is tried in a thread, with a
        request of the kind that has rows; None: it is not worth it."""
        if not resident.together:
            return False
        tried = resident.tried.get(kind)
        if tried is None and inputs is not None and len(resident.tried) < _KINDS:
            resident.tried[kind] = False
            self._pin(copy)
            given = inputs()
            job = self._workers_of(resident).submit(lambda: _tried(resident, given, kind[0]), Pace())

            def ended(rowwise: asyncio.Future[bool]) -> None:
                self._unpin(copy)
                resident.tried[kind] = rowwise.result()
                if not rowwise.result():
                    resident.together = False
                    log.info("model %s is not batched: together, requests give other answers", copy.model.model_id)

            job.future.add_done_callback(ended)
        return bool(tried)

    def may_join(self, company: Company, kind: Kind, members: Sequence[Member]) -> bool:
        """Whether requests of the kind, each of which may be batched, may be run in one call. If that is not known, it
        is tried in a thread."""
        tried = company.tried.get(kind)
        if tried is None and len(members) > 1 and len(company.tried) < _KINDS:
            company.tried[kind] = False
            members = members[:_JOINED]
            for copy, _, _ in members:
                self._pin(copy)
            models, requests = [resident.model for _, resident, _ in members], [first() for _, _, first in members]
            job = self._workers.submit(lambda: are_alike(company.family, models, requests, kind[0]), Pace())

            def ended(alike: asyncio.Future[bool]) -> None:
                for copy, _, _ in members:
                    self._unpin(copy)
                company.tried[kind] = alike.result()
                if not alike.result():
                    log.info("models like %s are run one by one", members[0][0].model.model_id)

            job.future.add_done_callback(ended)
        return bool(tried) and len(members) > 1

    def meet(self, resident: Resident) -> None:
        """A model was loaded; if it has a family, others are or may come."""
        model = resident.model
        if (most := resident.settings.max_concurrency) and resident.workers is None:
            resident.workers = Limited(self._workers, most)
            return
        if resident.together and isinstance(model, FamilyMember) and (family := model.family) is not None:
            company = self._companies.get(family)
            if company is None:
                company = self._companies[family] = Company(family)
            resident.company = company

    async def run(
        self,
        copy: Copy,
        resident: Resident,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        size_bytes: int,
        deadline: float,
        priority: Priority | None = None,
    ) -> Results:
        """Run a model on a request of about this size, on a copy that the caller has pinned; `priority`: the request's
        own, in place of its model's.

        A thread cannot be stopped: the copy stays pinned until it has ended, which may be after the caller was
        cancelled. What no thread has begun by then is never begun.

        Raises:
            InvalidRequest, ModelFailed
        """
        delay_s = resident.settings.max_queue_delay_us / 1e6
        pace = self._in_line.pace(copy.model.model_id, size_bytes)
        if resident.alone is not None and not pace.in_line:
            _enter(pace, size_bytes, *resident.alone)
        if not delay_s and self.runs_in_line(pace):
            self.sizes.observe(1)
            try:
                return self._in_line.run(pace, lambda: infer(resident.model, inputs, outputs))
            except MeshError as error:
                self._told(copy, (error,))
                raise
        kind, rows = kind_of(inputs, outputs), rows_of(inputs)
        item = Item(inputs, rows, size_bytes, self._loop.create_future())
        priority = priority or copy.model.priority
        batch = self._latest.get((id(copy), kind, priority)) if rows else None
        has_company = rows > 0 and (batch is not None or delay_s > 0)
        is_worth_it = delay_s > 0 or 0 < pace.typical_s < _TRY_S
        given = (lambda: inputs) if is_worth_it else None
        together = has_company and self.may_batch(copy, resident, kind, given)
        if batch is None or not together or not batch.add(item):
            if batch is not None:
                self._send_by(batch, -math.inf)  # it is full
            batch = Batch(copy, resident, kind, priority, [item], self._in_line)
            self._pin(copy)
            if rows:
                self._latest[batch.key] = batch
        now = self._loop.time()
        waits = together and batch.rows < enough_rows(resident) and now + delay_s < deadline
        self._send_by(batch, now + delay_s if waits else now)
        try:
            return await item.future
        except asyncio.CancelledError:
            if item.batch.leave(item):
                self._give_up(item.batch)
            raise

    def _send_by(self, batch: Batch, due_s: float) -> None:
        """Send the batch at this time, or at the end of the loop's turn if that is past; unless it was or will be."""
        if due_s >= batch.due_s:
            return
        batch.due_s = due_s
        if batch.timer is not None:
            batch.timer.cancel()
        now = self._loop.time()
        batch.timer = (
            self._loop.call_later(due_s - now, self._send, batch)
            if due_s > now
            else self._loop.call_soon(self._send, batch)
        )

    def _send(self, batch: Batch) -> None:
        batch.due_s, batch.timer = -math.inf, None
        if self.runs_in_line(batch.pace):
            self._ended(batch, self._in_line.run(batch, batch.work_alone))
            return
        workers = self._workers_of(batch.resident)
        parts = 1 if batch.resident.settings.max_queue_delay_us else min(workers.idle, len(batch.items))
        batches = batch.parts(parts) if parts > 1 else [batch]  # nobody waits for others while a thread does nothing
        if parts > 1:
            for part in batches:
                self._pin(part.copy)
            self._forget(batch)
        if (company := batch.resident.company) is not None and batch.rows:
            self._wait_with_others(company, batches)
        for part in batches:
            part.job = workers.submit(part.work, part, part.priority)
            part.job.future.add_done_callback(partial(self._done, part))

    def _wait_with_others(self, company: Company, batches: Sequence[Batch]) -> None:
        """Where another model's batch may be begun with these by the same thread."""
        batch = batches[0]
        if not self.may_batch(batch.copy, batch.resident, batch.kind, lambda: batch.items[0].inputs):
            return
        waiting = company.waiting.setdefault((batch.kind, batch.priority), {})
        if batch.kind not in company.tried:
            pair = [each for each in (next(iter(waiting), None), batch) if each is not None and each.items]
            if len({id(each.resident) for each in pair}) > 1:
                firsts = [partial(_first, each.items[0]) for each in pair]
                members = [(each.copy, each.resident, first) for each, first in zip(pair, firsts, strict=True)]
                self.may_join(company, batch.kind, members)
        waiting.update(dict.fromkeys(batches))

    def _workers_of(self, resident: Resident) -> Workers | Limited:
        return resident.workers or self._workers

    def _done(self, batch: Batch, results: asyncio.Future[list[Results | MeshError]]) -> None:
        answers = results.result()
        if batch.others:
            self.joint.observe(1 + len(batch.others))
        for other, others_answers in batch.others:
            self._ended(other, others_answers)
        self._ended(batch, answers)

    def _give_up(self, batch: Batch) -> None:
        """Nobody is left in a batch that was not begun."""
        if batch.timer is not None:
            batch.timer.cancel()
        if batch.job is None or batch.job.withdraw():
            self._forget(batch)

    def _ended(self, batch: Batch, results: list[Results | MeshError]) -> None:
        self._forget(batch)
        self._told(batch.copy, results)
        if batch.items:
            self.sizes.observe(len(batch.items))
        for item, result in zip(batch.items, results, strict=True):
            if item.future.done():
                continue
            if isinstance(result, MeshError):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

    def _told(self, copy: Copy, results: Iterable[Results | MeshError]) -> None:
        """What runs say of more than their requests."""
        for result in results:
            if isinstance(result, ModelLost | NotHere):
                return self._lost(copy)
            if isinstance(result, NoRoom):
                return self._short(copy)

    def _forget(self, batch: Batch) -> None:
        self._unpin(batch.copy)
        if (company := batch.resident.company) is not None:
            company.waiting.get((batch.kind, batch.priority), {}).pop(batch, None)
        if self._latest.get(batch.key) is batch:
            del self._latest[batch.key]
