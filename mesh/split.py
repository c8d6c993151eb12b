"""What became of the requests on either side of a vmodel, for as long as they are split: canary and active, compared.

Counted on the pods that clients ask, where the side is chosen. A vmodel's counts go with its canary, and `_MOST`
vmodels are told at a time, so that there are never many labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client.core import HistogramMetricFamily

from mesh.errors import Code, MeshError
from mesh.histogram import Histogram
from placement.records import ModelId
from placement.view import ClusterView

_BUCKETS_S: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)
_MOST: Final = 100
"""Vmodels."""

_Cells = dict[tuple[str, Code], Histogram]
"""By side and status."""


class Split:
    """Of one pod."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._cells: dict[str, tuple[ModelId, _Cells]] = {}
        """By vmodel, for which target."""

    @contextmanager
    def timed(self, vmodel_id: str, side: str) -> Iterator[None]:
        """A request is served inside."""
        started_s, code = time.perf_counter(), Code.CANCELLED  # also what a deadline looks like from inside
        try:
            yield
            code = Code.OK
        except MeshError as error:
            code = error.code
            raise
        finally:
            cell = self.cell(vmodel_id, side, code)
            if cell is not None:
                cell.observe(time.perf_counter() - started_s)

    def cell(self, vmodel_id: str, side: str, code: Code) -> Histogram | None:
        """Where a request's time goes; None: nowhere."""
        target = self._target(vmodel_id)
        known = self._cells.get(vmodel_id)
        if target is None:
            return None  # it has ended meanwhile
        if known is None or known[0] != target:
            self._cells = {name: cells for name, cells in self._cells.items() if self._target(name) == cells[0]}
            if len(self._cells) >= _MOST:
                return None
            known = self._cells[vmodel_id] = target, {}
        cell = known[1].get((side, code))
        if cell is None:
            cell = known[1][side, code] = Histogram(_BUCKETS_S)
        return cell

    def _target(self, vmodel_id: str) -> ModelId | None:
        """The target of a vmodel whose requests are split."""
        vmodel = self._view.vmodels.get(vmodel_id)
        return vmodel.target if vmodel is not None and (vmodel.canary or vmodel.canary_percent) else None

    def seconds(self) -> HistogramMetricFamily:
        """May be called from another thread."""
        family = HistogramMetricFamily(
            "densemesh_vmodel_request_seconds",
            "Time of requests to vmodels that have a canary, by side and gRPC status.",
            labels=("vmodel", "side", "code"),
        )
        for vmodel_id, (target, cells) in list(self._cells.items()):
            if target == self._target(vmodel_id):
                for (side, code), cell in list(cells.items()):
                    family.add_metric((vmodel_id, side, code.name), cell.buckets(), cell.sum)
        return family
