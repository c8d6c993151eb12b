"""Runs models: alone or with other requests in one call, on the loop or in a thread.

A request that cannot run at once waits with others of its kind (`mesh.rowwise`) as one batch. The batch goes to the
threads at the end of the loop's turn, or where the model's settings ask for a delay, when that has passed, when enough
has come or when a deadline is near; requests join it until a thread begins it. So a batch is what has come while the
threads were busy, and nobody waits longer for it than without.

What fails together is run one by one: a bad request fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

from loaders.base import InferError, LoadedModel, Tensor
from mesh.errors import InvalidRequest, MeshError, ModelFailed
from mesh.histogram import Histogram
from mesh.resident import Resident
from mesh.rowwise import Kind, is_rowwise, kind_of, rows_of, stack
from mesh.workers import InLine, Job, Pace, Workers
from placement.cache import Copy

log = logging.getLogger(__name__)

Results = dict[str, Tensor]

MOST_ROWS: Final = 128
"""Of a batch, where the model's settings do not say."""
MOST_BYTES: Final = 8 << 20
"""Of a batch's requests: what is larger gains little by company, and copying it costs."""
_KINDS: Final = 64
"""Kinds of requests that are tried for one model."""
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class _Item:
    """One request in a batch."""

    __slots__ = ("future", "inputs", "rows", "size_bytes")

    def __init__(
        self, inputs: Mapping[str, Tensor], rows: int, size_bytes: int, future: asyncio.Future[Results]
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.size_bytes = size_bytes
        self.future = future


class _Batch:
    """Requests of one kind that wait to be run together; the loop adds and removes until a thread begins."""

    def __init__(self, copy: Copy, resident: Resident, outputs: Sequence[str], first: _Item, in_line: InLine) -> None:
        self.copy = copy
        self.items = [first]
        self.rows = first.rows
        self.due_s = math.inf
        """Loop time at which it is sent to the threads."""
        self.timer: asyncio.Handle | None = None
        self.job: Job[list[Results | MeshError]] | None = None
        self._resident = resident
        self._outputs = outputs
        self._in_line = in_line
        self._size_bytes = first.size_bytes
        self._begun = False
        self._lock = threading.Lock()

    def add(self, item: _Item) -> bool:
        """Whether there was room, and time."""
        with self._lock:
            rows, size_bytes = self.rows + item.rows, self._size_bytes + item.size_bytes
            if self._begun or rows > most_rows(self._resident) or size_bytes > MOST_BYTES:
                return False
            self.items.append(item)
            self.rows, self._size_bytes = rows, size_bytes
            return True

    def leave(self, item: _Item) -> bool:
        """Nobody waits for the request any more. Whether the batch has nothing left to begin."""
        with self._lock:
            if self._begun:
                return False
            self.items.remove(item)
            self.rows -= item.rows
            self._size_bytes -= item.size_bytes
            return not self.items

    def work(self) -> list[Results | MeshError]:
        """Run what has come."""
        with self._lock:
            self._begun = True
        return infer_together(self._resident, [item.inputs for item in self.items], self._outputs)

    @property
    def pace(self) -> Pace:
        """Of requests as large as all of these."""
        return self._in_line.pace(self.copy.model.model_id, self._size_bytes)

    def measured(self, elapsed_s: float) -> None:
        self.pace.measured(elapsed_s)


class Batcher:
    """Runs the models of loaded copies."""

    def __init__(
        self, workers: Workers, in_line: InLine, pin: Callable[[Copy], None], unpin: Callable[[Copy], None]
    ) -> None:
        """`pin` and `unpin` keep a copy in memory."""
        self._workers = workers
        self._in_line = in_line
        self._pin = pin
        self._unpin = unpin
        self._loop = asyncio.get_running_loop()
        self._latest: dict[tuple[int, Kind], _Batch] = {}
        """Of each copy and kind of request: what was begun last and has not ended."""
        self.sizes = Histogram(_SIZES)
        """Requests in one run of a model."""

    def runs_in_line(self, pace: Pace) -> bool:
        """Whether a run may be made on the loop now: it is known to be fast, and nobody waits for a thread."""
        return pace.in_line and self._in_line.has_time and not self._workers.is_queueing

    def may_batch(self, copy: Copy, resident: Resident, kind: Kind, inputs: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Whether requests of the kind may be run together. If that is not known, it is tried in a thread, with a
        request of the kind that has rows."""
        if not resident.together:
            return False
        tried = resident.tried.get(kind)
        if tried is None and len(resident.tried) < _KINDS:
            resident.tried[kind] = False
            self._pin(copy)
            given = inputs()
            job = self._workers.submit(lambda: is_rowwise(resident.model, given, kind[0]), Pace())

            def ended(rowwise: asyncio.Future[bool]) -> None:
                self._unpin(copy)
                resident.tried[kind] = rowwise.result()
                if not rowwise.result():
                    resident.together = False
                    log.info("model %s is not batched: together, requests give other answers", copy.model.model_id)

            job.future.add_done_callback(ended)
        return bool(tried)

    async def run(
        self,
        copy: Copy,
        resident: Resident,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        size_bytes: int,
        deadline: float,
    ) -> Results:
        """Run a model on a request of about this size, on a copy that the caller has pinned.

        A thread cannot be stopped: the copy stays pinned until it has ended, which may be after the caller was
        cancelled. What no thread has begun by then is never begun.

        Raises:
            InvalidRequest, ModelFailed
        """
        delay_s = resident.settings.max_queue_delay_us / 1e6
        pace = self._in_line.pace(copy.model.model_id, size_bytes)
        if not delay_s and self.runs_in_line(pace):
            self.sizes.observe(1)
            return self._in_line.run(pace, lambda: infer(resident.model, inputs, outputs))
        kind, rows = kind_of(inputs, outputs), rows_of(inputs)
        batch = self._latest.get((id(copy), kind))
        has_company = bool(rows) and (batch is not None or delay_s > 0)
        together = has_company and self.may_batch(copy, resident, kind, lambda: inputs)
        item = _Item(inputs, rows, size_bytes, self._loop.create_future())
        if batch is None or not together or not batch.add(item):
            if batch is not None:
                self._send_by(batch, -math.inf)  # it is full
            batch = _Batch(copy, resident, outputs, item, self._in_line)
            self._pin(copy)
            if rows:
                self._latest[id(copy), kind] = batch
        now = self._loop.time()
        waits = together and batch.rows < enough_rows(resident) and now + delay_s < deadline
        self._send_by(batch, now + delay_s if waits else now)
        try:
            return await item.future
        except asyncio.CancelledError:
            if batch.leave(item):
                self._give_up(batch)
            raise

    def _send_by(self, batch: _Batch, due_s: float) -> None:
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

    def _send(self, batch: _Batch) -> None:
        batch.due_s, batch.timer = -math.inf, None
        if self.runs_in_line(batch.pace):
            self._ended(batch, self._in_line.run(batch, batch.work))
            return
        batch.job = self._workers.submit(batch.work, batch)
        batch.job.future.add_done_callback(lambda future: self._ended(batch, future.result()))

    def _give_up(self, batch: _Batch) -> None:
        """Nobody is left in a batch that was not begun."""
        if batch.timer is not None:
            batch.timer.cancel()
        if batch.job is None or batch.job.withdraw():
            self._forget(batch)

    def _ended(self, batch: _Batch, results: list[Results | MeshError]) -> None:
        self._forget(batch)
        if batch.items:
            self.sizes.observe(len(batch.items))
        for item, result in zip(batch.items, results, strict=True):
            if item.future.done():
                continue
            if isinstance(result, MeshError):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

    def _forget(self, batch: _Batch) -> None:
        self._unpin(batch.copy)
        for key, latest in list(self._latest.items()):
            if latest is batch:
                del self._latest[key]


def most_rows(resident: Resident) -> int:
    """Of one run."""
    return resident.settings.max_batch_size or MOST_ROWS


def enough_rows(resident: Resident) -> int:
    """For which no batch waits longer."""
    return min(*resident.settings.preferred_batch_sizes, most_rows(resident), MOST_ROWS)


def infer_together(
    resident: Resident, requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
) -> list[Results | MeshError]:
    """Run requests as one, or if that fails one by one: the results of each, or why there are none."""
    if len(requests) > 1:
        try:
            results = resident.model.infer(stack(requests), outputs)
        except Exception as error:
            log.debug("a batch failed, its requests are run one by one: %s", error)
        else:
            rows = [rows_of(request) for request in requests]
            if all(results[name].shape[:1] == (sum(rows),) for name in outputs):
                ends = list(accumulate(rows))
                return [
                    {name: result[end - size : end] for name, result in results.items()}
                    for size, end in zip(rows, ends, strict=True)
                ]
            resident.together = False
    answers: list[Results | MeshError] = []
    for request in requests:
        try:
            answers.append(infer(resident.model, request, outputs))
        except MeshError as error:
            answers.append(error)
    return answers


def infer(model: LoadedModel, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Results:
    """Run a model. Whatever it raises is this request's failure, not the pod's.

    Raises:
        InvalidRequest, ModelFailed
    """
    try:
        return model.infer(inputs, outputs)
    except InferError as error:
        raise (InvalidRequest if error.bad_input else ModelFailed)(str(error)) from None
    except Exception as error:
        log.exception("a model broke")
        raise ModelFailed(f"the model broke: {type(error).__name__}: {error}") from None
