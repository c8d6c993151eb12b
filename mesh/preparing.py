"""Models that serve as their owners wrote them are prepared (`loaders.prepare`) one at a time, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from loaders.prepare import PREPARERS, WRAPPERS
from loaders.prepare.preparation import Outcome
from mesh.models import Models, format_of
from placement.records import ModelId, ModelRecord

log = logging.getLogger(__name__)

_BETTER: Final = (Outcome.PREPARED, Outcome.FOUND)


class Preparing:
    """The queue, and what came of it."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._pool = ThreadPoolExecutor(1, "prepare")
        self.outcomes: Counter[tuple[str, Outcome]] = Counter()
        """By format."""
        self.refusals: dict[ModelId, str] = {}
        """Why models were left as they are."""
        self.busy_s: Counter[str] = Counter()
        """By format, the time that jobs took."""

    async def has_better(self, model: ModelRecord, is_wanted: Callable[[], bool]) -> bool:
        """Whether a better form of the model is there now: made, if it can be and is wanted when its turn comes."""
        format_name = format_of(model)
        if format_name not in {**PREPARERS, **WRAPPERS} or not self._models.prepares:
            return False
        outcome, elapsed_s, said = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._prepare, model, is_wanted
        )
        self.refusals.pop(model.model_id, None)
        if said:
            self.refusals[model.model_id] = said
        if outcome is None:
            return False
        self.outcomes[format_name, outcome] += 1
        self.busy_s[format_name] += elapsed_s  # type: ignore[assignment]  # typeshed: Counter is of ints
        return outcome in _BETTER

    def close(self) -> None:
        """Wait for what is under way, which `Models.stop` has ended. Blocks."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, model: ModelRecord, is_wanted: Callable[[], bool]) -> tuple[Outcome | None, float, str]:
        started = time.monotonic()
        try:
            outcome = self._models.prepare(model, is_wanted)
        except Exception:
            log.exception("the preparation of model %s broke", model.model_id)
            outcome = Outcome.FAILED
        return outcome, time.monotonic() - started, self._models.unprepared
