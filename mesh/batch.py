"""Requests of one kind (`mesh.rowwise`) that are run together, and how that is done.

What fails together is run one by one: a bad request fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

from loaders.base import InferError, LoadedModel, Tensor
from mesh.errors import InvalidRequest, MeshError, ModelFailed
from mesh.resident import Resident
from mesh.rowwise import rows_of, stack
from mesh.workers import InLine, Job, Pace
from placement.cache import Copy
from placement.records import Priority

log = logging.getLogger(__name__)

Results = dict[str, Tensor]

MOST_ROWS: Final = 128
"""Of a batch, where the model's settings do not say."""
MOST_BYTES: Final = 8 << 20
"""Of a batch's requests: what is larger gains little by company, and copying it costs."""


class Item:
    """One request in a batch."""

    __slots__ = ("future", "inputs", "rows", "size_bytes")

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
        outputs: Sequence[str],
        first: Item,
        in_line: InLine,
        priority: Priority,
    ) -> None:
        self.copy = copy
        self.priority = priority
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

    def add(self, item: Item) -> bool:
        """Whether there was room, and time."""
        with self._lock:
            rows, size_bytes = self.rows + item.rows, self._size_bytes + item.size_bytes
            if self._begun or rows > most_rows(self._resident) or size_bytes > MOST_BYTES:
                return False
            self.items.append(item)
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
