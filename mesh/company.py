"""Models of one family in this pod: whether requests to several of them may be run in one call, and whether that pays.

Both are tried, not believed: the first time it would be of use, answers of a joint run are compared with those of each
model alone; and from then on, the time of each joint run with what its models take alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loaders.base import Family
from mesh.in_line import FAST_S, Pace
from mesh.rowwise import Kind
from placement.records import Priority

if TYPE_CHECKING:
    from mesh.batch import Batch

MOST_ROWS_EACH: Final = 8
"""Of one model in a joint run, so that nobody waits long for another tenant's rows: all get as many as the most."""
MOST_MODELS: Final = 64
_BAR_S: Final = 30.0
"""For how long joint runs of about so many models are not made, after they were found slower."""


class Company:
    """What is known of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tried: dict[Kind, bool] = {}
        """Whether joint runs of a kind of requests were found to answer alike; False: that is being tried."""
        self.waiting: dict[tuple[Kind, Priority], dict[Batch, None]] = {}
        """Batches for which no thread was free yet, the first that came first."""
        self._each_s = 0.0
        self._gains: dict[int, float] = {}
        """By order of magnitude of the number of models: times by which a joint run was faster, of late."""
        self._barred_until_s: dict[int, float] = {}

    def pays(self, models: int) -> bool:
        """Whether a joint run of so many models is expected to be faster than one after another."""
        magnitude = models.bit_length()
        if models < 2 or self._gains.get(magnitude, 2.0) < 1:
            return models > 1 and time.perf_counter() > self._barred_until_s[magnitude]
        return True

    def most_in_line(self, alone_s: float) -> int:
        """Models of a run on the loop that is expected to be fast; `alone_s`: what one of them takes."""
        return min(MOST_MODELS, int(FAST_S / (self._each_s or alone_s or FAST_S)))

    def ran(self, paces: Sequence[Pace], elapsed_s: float) -> None:
        """Models with these paces were run in one call."""
        models, magnitude = len(paces), len(paces).bit_length()
        for pace in paces:
            pace.shared(elapsed_s / models)
        each_s, gain = elapsed_s / models, sum(pace.typical_s for pace in paces) / elapsed_s
        self._each_s += (each_s - self._each_s) / 8 if self._each_s else each_s
        if not all(pace.typical_s for pace in paces):
            return
        before = self._gains.get(magnitude, 2.0)
        gain = self._gains[magnitude] = before + (gain - before) / 8 if before >= 1 else gain
        if gain < 1:
            self._barred_until_s[magnitude] = time.perf_counter() + _BAR_S


class JointRun:
    """Is told how long a joint run took."""

    __slots__ = ("_company", "_paces")

    def __init__(self, company: Company, paces: Sequence[Pace]) -> None:
        self._company = company
        self._paces = paces

    def measured(self, elapsed_s: float) -> None:
        self._company.ran(self._paces, elapsed_s)
