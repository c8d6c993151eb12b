"""Whether a conversion may take a model's place: it must answer as it does, and sooner by more than it is larger.

Labels must be equal; floating-point answers within `TOLERANCE` of the larger of their magnitude and 1, or for outputs
that are not probabilities of the median magnitude of all; what one refuses the other must. That is tried, in the child,
on rows that a preparer found telling: around thresholds and training data, at random, far out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from loaders.base import InferError, LoadedModel, Tensor
from loaders.prepare import NotPreparable

TOLERANCE: Final = 1e-5
_GAIN: Final = 0.8
"""A conversion takes at most this share of the model's own time, times what it takes more of memory."""
_SMALL_BYTES: Final = 1 << 20
"""Growing to this is free: a small session's fixed bytes must not keep a model of three coefficients slow."""
_ROUNDS, _MOST_ROUNDS = 5, 40
_LEAST_S: Final = 2e-3
"""What each timing of a few runs takes at least."""
_MOST_RUNS: Final = 200

Request = Mapping[str, Tensor]


def check_agreement(own: LoadedModel, conversion: LoadedModel, probes: Sequence[Request]) -> None:
    """
    Raises:
        NotPreparable: they differ; says where.
    """
    outputs = [spec.name for spec in own.signature.outputs]
    answered = 0
    for probe in probes:
        expected, found = _answers(own, probe, outputs), _answers(conversion, probe, outputs)
        if isinstance(expected, str) or isinstance(found, str):
            if isinstance(expected, str) != isinstance(found, str):
                said = expected if isinstance(expected, str) else found
                raise NotPreparable(f"only {'the model' if said is expected else 'its conversion'} refuses: {said}")
            continue
        answered += 1
        for name in outputs:
            _compare(name, expected[name], found[name])
    if not answered:
        raise NotPreparable("the model answers none of the probes")


def check_gain(own: LoadedModel, conversion: LoadedModel, rows: Sequence[Request]) -> None:
    """
    Raises:
        NotPreparable: for one of these requests it is not sooner, or not by as much as it is larger.
    """
    larger = max(1.0, conversion.size_bytes / max(own.size_bytes, _SMALL_BYTES))
    outputs = own.signature.default_outputs or [spec.name for spec in own.signature.outputs]
    for request in rows:
        count = len(next(iter(request.values())))
        model_s, conversion_s = np.inf, np.inf
        for n in range(_MOST_ROUNDS):  # by turns, so that what else the machine does meets both
            model_s = min(model_s, _timed(own, request, outputs))
            conversion_s = min(conversion_s, _timed(conversion, request, outputs))
            if n >= _ROUNDS - 1 and not 0.8 < conversion_s * larger / (_GAIN * model_s) < 1.25:
                break  # a narrow case is remembered for good as well, and deserves a longer look
        if conversion_s * larger > _GAIN * model_s:
            times = f"{conversion_s * 1e6:.0f} us against {model_s * 1e6:.0f} us for {count} row{'s' * (count > 1)}"
            memory = f", at {larger:.1f} times the memory" if larger > 1 else ""
            raise NotPreparable(f"its conversion is not faster: {times}{memory}")


def _answers(model: LoadedModel, probe: Request, outputs: Sequence[str]) -> dict[str, Tensor] | str:
    """Or why the request is refused.

    Raises:
        NotPreparable: the model fails in another way.
    """
    try:
        with np.errstate(all="ignore"):
            return model.infer(probe, outputs)
    except InferError as error:
        if error.bad_input:
            return str(error)
        raise NotPreparable(f"a probe makes it fail: {error}") from None


def _compare(name: str, expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        told = f"{found.dtype} {list(found.shape)} for {expected.dtype} {list(expected.shape)}"
        raise NotPreparable(f"its conversion answers {name} as {told}")
    if expected.dtype.kind != "f":
        differ = int((expected != found).sum())
        if differ:
            raise NotPreparable(f"its conversion answers {differ} of {expected.size} {name} differently")
        return
    with np.errstate(all="ignore"):
        finite = np.abs(expected[np.isfinite(expected)])
        allowed = TOLERANCE * np.maximum(np.abs(expected), max(1.0, float(np.median(finite)) if finite.size else 1.0))
        same = (np.abs(found - expected) <= allowed) | (found == expected) | (np.isnan(found) & np.isnan(expected))
    if not same.all():
        worst = float(np.nanmax(np.where(same, 0.0, np.abs(found - expected))))
        raise NotPreparable(f"its conversion's {name} is off by up to {worst:.2g}")


def _timed(model: LoadedModel, request: Request, outputs: Sequence[str]) -> float:
    """Seconds of one run, over as many as make them tellable."""
    runs, started = 0, time.perf_counter()
    while True:
        model.infer(request, outputs)
        runs += 1
        elapsed_s = time.perf_counter() - started
        if elapsed_s >= _LEAST_S or runs >= _MOST_RUNS:
            return elapsed_s / runs
