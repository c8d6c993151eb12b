"""Which of a vmodel's two models a request goes to, while its target is not active and has a share of the requests.

    key      by a hash of the key that the request has: the same side on every pod for as long as the share stands, and
             a share that grows moves keys to the target only
    else     by turns, so that a few hundred requests have the share they should: multiples of the golden ratio, which
             spread evenly without a period that a client's own could match (Weyl 1916; Knuth, TAOCP 3, 6.4)

A target that is loaded nowhere gets nothing. Who names a side (`densemesh-tag`) gets that one, and does not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from hashlib import blake2b
from typing import Final

from placement.records import ModelId, PodId, VModelRecord

_BITS: Final = 64
_GOLDEN: Final = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio."""


class Sides:
    """Of one pod."""

    def __init__(self, pod_id: PodId, is_loaded: Callable[[ModelId], object]) -> None:
        self._first = _hash(pod_id)  # that pods do not take their turns in step
        self._is_loaded = is_loaded
        self._turns: dict[str, int] = {}
        """By vmodel, where in [0, 2^64) its last request without a key was."""
        self._returned: dict[str, list[ModelId]] = {}
        """Turns that were taken and not used; they come next, so that shares stay right."""

    def choose(self, vmodel: VModelRecord, key: str | None) -> ModelId:
        """The model that the next request for the vmodel goes to."""
        returned = self._returned.get(vmodel.vmodel_id) if key is None else None
        again = returned.pop() if returned else None
        if not vmodel.canary_percent or not self._is_loaded(vmodel.target):
            return vmodel.active
        if again is not None:
            return vmodel.target if again == vmodel.target else vmodel.active
        if key is not None:
            place = _hash(vmodel.vmodel_id, vmodel.target, key)
        else:
            place = self._turns.get(vmodel.vmodel_id, self._first) + _GOLDEN & (1 << _BITS) - 1
            self._turns[vmodel.vmodel_id] = place
        return vmodel.target if 100 * place < vmodel.canary_percent << _BITS else vmodel.active

    def give_back(self, vmodel_id: str, model_id: ModelId) -> None:
        """The request that was to go there asks anew."""
        self._returned.setdefault(vmodel_id, []).append(model_id)

    def forget(self, but: Container[str]) -> None:
        """Drop what is known of vmodels other than these."""
        self._turns = {vmodel_id: turn for vmodel_id, turn in self._turns.items() if vmodel_id in but}
        self._returned.clear()


def _hash(*parts: str) -> int:
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=_BITS // 8).digest())
