"""What does one model cost here, prepared, and by its framework by hand, in one process? A job of `bench.formats`:
`python -m bench.timed KIND FILE SECONDS FOLDER`; FOLDER: for what is prepared.

Every figure is the median of rounds in which all ways take turns, each for SECONDS.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from bench.jobs import tell
from bench.zoo import ZOO, Array, Kind, Predict
from loaders import loader_for
from loaders.base import Artifact, LoadedModel
from loaders.datatypes import DTYPES
from loaders.memory.process import keep_message_buffers
from loaders.prepare.preparation import Preparation

_ROUNDS: Final = 5
_BATCHES: Final = (1, 32)

Way = Callable[[], Predict]


def main() -> int:
    warnings.simplefilter("ignore")
    logging.getLogger("loaders").addHandler(logging.NullHandler())
    keep_message_buffers()  # as a pod does
    name, path, seconds, folder = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    kind = ZOO[name]
    told: dict[str, Any] = {"kind": name, "disk_bytes": _disk_bytes(path), "ways": {}}
    loaded: dict[str, LoadedModel] = {}

    def taking_over(way: str, load: Callable[[], LoadedModel]) -> Predict:
        """The last one goes first, as what is loaded by hand does when nobody refers to it."""
        if way in loaded:
            loaded.pop(way).unload()
        loaded[way] = load()
        return _predict(loaded[way], kind)

    def ours() -> Predict:
        return taking_over("ours", lambda: loader_for(kind.format).load(Artifact(path)))

    ways: dict[str, Way] = {"by hand": lambda: kind.by_hand(path), "ours": ours}
    started_s = time.perf_counter()
    ours()(kind.rows(1))
    told["first_ms"] = (time.perf_counter() - started_s) * 1e3
    preparation = Preparation(folder, 1 << 30)
    preparation.prepare(kind.format, Artifact(path))
    found = preparation.find(kind.format, Artifact(path))
    if found is not None:
        told["form"] = found.form

        def prepared() -> Predict:
            return taking_over("prepared", found.load)

        for _ in range(2):  # the first takes what the framework itself needs
            prepared()
        told["prepared_bytes"] = loaded["prepared"].size_bytes
        ways["prepared"] = prepared
    ours()
    told["memory_bytes"] = loaded["ours"].size_bytes
    _measure(told["ways"], ways, kind, seconds)
    answers = {way: make()(kind.rows(32)) for way, make in ways.items()}
    for way, answer in answers.items():
        told["ways"][way]["difference"] = _difference(answer, answers["by hand"])
    tell(told)
    preparation.close()
    return 0


def _measure(told: dict[str, Any], ways: dict[str, Way], kind: Kind, seconds: float) -> None:
    """Load times in ms, and run times in us by rows."""
    figures: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for make in ways.values():
        make()(kind.rows(1))  # imports, and whatever happens once
    for _ in range(_ROUNDS):
        for way, make in ways.items():
            figures[way].setdefault("load_ms", []).append(_seconds_per(make, seconds) * 1e3)
            predict = make()
            for count in _BATCHES:
                rows = kind.rows(count)
                predict(rows)
                run_us = _seconds_per(lambda predict=predict, rows=rows: predict(rows), seconds) * 1e6  # type: ignore[misc]
                figures[way].setdefault(f"run_{count}_us", []).append(run_us)
            del predict  # threads of a session by hand spin for a while
    for way, found in figures.items():
        told[way] = {figure: median(values) for figure, values in found.items()}


def _seconds_per(work: Callable[[], object], seconds: float) -> float:
    """The median of single calls."""
    took_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while not took_s or (time.perf_counter() < end_s and len(took_s) < 10_000):
        started_s = time.perf_counter()
        work()
        took_s.append(time.perf_counter() - started_s)
    return median(took_s)


def _predict(model: LoadedModel, kind: Kind) -> Predict:
    signature = model.signature
    given = signature.inputs[0]
    dtype = np.dtype(kind.dtype) if signature.lenient else DTYPES[given.datatype]
    name = kind.output or signature.outputs[0].name
    return lambda rows: model.infer({given.name: rows.astype(dtype, copy=False)}, [name])[name]


def _difference(found: Array, expected: Array) -> float:
    """The largest, relative to the largest answer; infinite: of another shape, or a class that differs."""
    if found.size != expected.size:
        return float("inf")
    found, expected = found.reshape(expected.shape), np.asarray(expected)
    if expected.dtype.kind not in "fV":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    wide, wanted = found.astype(np.float64), expected.astype(np.float64)
    return float(np.max(np.abs(wide - wanted)) / max(1e-30, np.max(np.abs(wanted))))


def _disk_bytes(path: Path) -> int:
    if path.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    else:
        files = list(path.parent.glob(f"{path.stem}.*"))  # OpenVINO's weights lie beside
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    sys.exit(main())
