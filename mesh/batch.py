"""One batch: requests that are run together, and what becomes of each.

What fails together is run one by one: a bad request fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from loaders.base import InferError, LoadedModel, NoMemory, Tensor
from loaders.base import ModelLost as Lost
from mesh.company import MOST_MODELS, MOST_ROWS_EACH, Company
from mesh.errors import MODEL_FAILURES, InvalidRequest, MeshError, ModelFailed, ModelLost, NoRoom, NotHere
from mesh.in_line import InLine, Pace
from mesh.resident import Resident
from mesh.rowwise import Kind, rows_of, stack
from mesh.workers import Job
from placement.cache import Copy
from placement.records import Priority

log = logging.getLogger(__name__)

Results = dict[str, Tensor]

MOST_ROWS: Final = 32
"""Of a batch in a thread, where the model's settings do not say: all of it waits for all of it."""
MOST_BYTES: Final = 8 << 20
"""Of a batch's requests: what is larger gains little by company, and copying it costs."""


class Item:
    """One request in a batch."""

    __slots__ = ("batch", "future", "inputs", "rows", "size_bytes")

    batch: Batch

    def __init__(
        self, inputs: Mapping[str, Tensor], rows: int, size_bytes: int, future: asyncio.Future[Results]
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.size_bytes = size_bytes
        self.future = future


class Batch:
    """Requests of one kind that wait to be run together; the loop adds and removes until a thread begins."""

    def __init__(
        self,
        copy: Copy,
        resident: Resident,
        kind: Kind,
        priority: Priority,
        items: list[Item],
        in_line: InLine,
    ) -> None:
        self.copy = copy
        self.resident = resident
        self.kind = kind
        self.priority = priority
        self.key = id(copy), kind, priority
        """What requests have in common that may join."""
        self.items = items
        self.rows = sum(item.rows for item in items)
        self.due_s = math.inf
        """Loop time at which it is sent to the threads."""
        self.timer: asyncio.Handle | None = None
        self.job: Job[list[Results | MeshError]] | None = None
        self.others: list[tuple[Batch, list[Results | MeshError]]] = []
        """Batches of other models that were run with this one, and what came of them."""
        self._in_line = in_line
        self._size_bytes = sum(item.size_bytes for item in items)
        self._begun = False
        self._lock = threading.Lock()
        for item in items:
            item.batch = self

    def add(self, item: Item) -> bool:
        """Whether there was room, and time."""
        with self._lock:
            rows, size_bytes = self.rows + item.rows, self._size_bytes + item.size_bytes
            if self._begun or rows > most_rows(self.resident) or size_bytes > MOST_BYTES:
                return False
            self.items.append(item)
            item.batch = self
            self.rows, self._size_bytes = rows, size_bytes
            return True

    def leave(self, item: Item) -> bool:
        """Nobody waits for the request any more. Whether the batch has nothing left to begin."""
        with self._lock:
            if self._begun:
                return False
            self.items.remove(item)
            self.rows -= item.rows
            self._size_bytes -= item.size_bytes
            return not self.items

    def parts(self, count: int) -> list[Batch]:
        """As many batches of about as many requests each, instead of this one."""
        return [
            Batch(self.copy, self.resident, self.kind, self.priority, self.items[n::count], self._in_line)
            for n in range(count)
        ]

    def begin(self) -> list[Mapping[str, Tensor]]:
        """Nothing is added from now on; the requests."""
        with self._lock:
            self._begun = True
            return [item.inputs for item in self.items]

    def work_alone(self) -> list[Results | MeshError]:
        """Run what has come."""
        return infer_together(self.resident, self.begin(), self.kind[0])

    def work(self) -> list[Results | MeshError]:
        """Run what has come; with it, where that pays, what has come for other models of the family."""
        requests, outputs = self.begin(), self.kind[0]
        company = self.resident.company
        others = list(self._others(company)) if company is not None else []
        if company is None or not others:
            return infer_together(self.resident, requests, outputs)
        batches = [(self, requests), *((other, other.begin()) for other in others)]
        answers = _infer_jointly(company, [(batch.resident, requests) for batch, requests in batches], outputs)
        self.others = list(zip(others, answers[1:], strict=True))
        return answers[0]

    def _others(self, company: Company) -> Iterator[Batch]:
        """Batches of the same kind and class that wait, which are not run by anybody else from now on."""
        waiting = company.waiting.get((self.kind, self.priority))
        if waiting is None:
            return
        waiting.pop(self, None)
        if self.rows > MOST_ROWS_EACH or not company.tried.get(self.kind) or not company.pays(1 + len(waiting)):
            return
        models = {id(self.resident)}
        for other in list(waiting):
            if id(other.resident) in models or other.rows > MOST_ROWS_EACH or len(models) == MOST_MODELS:
                continue
            if other.job is not None and other.job.withdraw():
                waiting.pop(other, None)
                models.add(id(other.resident))
                yield other

    @property
    def pace(self) -> Pace:
        """Of requests as large as all of these."""
        return self._in_line.pace(self.copy.model.model_id, self._size_bytes)

    def measured(self, elapsed_s: float) -> None:
        company = self.resident.company
        if company is not None and self.others:
            company.ran([self.pace, *(other.pace for other, _ in self.others)], elapsed_s)
        else:
            self.pace.measured(elapsed_s)


def most_rows(resident: Resident) -> int:
    """Of one run."""
    return resident.settings.max_batch_size or MOST_ROWS


def enough_rows(resident: Resident) -> int:
    """For which no batch waits longer."""
    return min((*resident.settings.preferred_batch_sizes, most_rows(resident)))


def infer_together(
    resident: Resident, requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
) -> list[Results | MeshError]:
    """Run requests as one, or if that fails one by one: the results of each, or why there are none."""
    if len(requests) > 1:
        try:
            results = resident.model.infer(stack(requests), outputs)
        except Lost as error:  # one of them may have done it: together again they would do it again
            return [(ModelLost if error.began else NotHere)(str(error)) for _ in requests]
        except MODEL_FAILURES as error:
            log.debug("a batch failed, its requests are run one by one: %s", error)
        else:
            rows = [rows_of(request) for request in requests]
            if all(results[name].shape[:1] == (sum(rows),) for name in outputs):
                return _parted(requests, results)
            resident.together = False
    answers: list[Results | MeshError] = []
    for request in requests:
        try:
            answers.append(infer(resident.model, request, outputs))
        except MeshError as error:
            answers.append(error)
    return answers


def _infer_jointly(
    company: Company, batches: Sequence[tuple[Resident, Sequence[Mapping[str, Tensor]]]], outputs: Sequence[str]
) -> list[list[Results | MeshError]]:
    """Run batches of several models in one call, or if that fails one model after another."""
    try:
        models, stacked = [resident.model for resident, _ in batches], [stack(requests) for _, requests in batches]
        results = company.family.infer_many(models, stacked, outputs)
    except MODEL_FAILURES as error:
        log.debug("a joint run failed, its models are run one by one: %s", error)
        return [infer_together(resident, requests, outputs) for resident, requests in batches]
    return [_parted(requests, result) for (_, requests), result in zip(batches, results, strict=True)]


def _parted(requests: Sequence[Mapping[str, Tensor]], results: Results) -> list[Results | MeshError]:
    """The rows of each request."""
    rows = [rows_of(request) for request in requests]
    return [
        {name: result[end - size : end] for name, result in results.items()}
        for size, end in zip(rows, accumulate(rows), strict=True)
    ]


def infer(model: LoadedModel, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Results:
    """Run a model. Whatever it raises is this request's failure, not the pod's.

    Raises:
        InvalidRequest, ModelFailed
        NoRoom: memory ran out.
        ModelLost, NotHere: the copy is of no use any more; NotHere: and the request was never begun.
    """
    try:
        return model.infer(inputs, outputs)
    except Lost as error:
        raise (ModelLost if error.began else NotHere)(str(error)) from None
    except (NoMemory, MemoryError) as error:
        raise NoRoom(f"memory ran out in the run: {error or 'the allocation was refused'}") from None
    except InferError as error:
        raise (InvalidRequest if error.bad_input else ModelFailed)(str(error)) from None
    except MODEL_FAILURES as error:
        log.exception("a model broke")
        raise ModelFailed(f"the model broke: {type(error).__name__}: {error}") from None
