"""What one tier below the device holds: bytes of models that are not loaded, or not from there.

    PROMISED -> FILLING | GONE
    FILLING -> HELD | GONE
    HELD -> DROPPING
    DROPPING -> GONE

PROMISED   room is promised; the drops that make it are not finished
FILLING    a transfer writes it: a load that leaves a copy here, or what is given up in the tier above
HELD       a load may read it
DROPPING   not to be read by anybody new; its bytes count until the drop has finished
GONE       nothing is left of it
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from placement.books import Books, Life
from placement.policies.base import EvictionPolicy, Worth
from placement.records import ModelRecord, Tier


class HoldState(Enum):
    __hash__ = object.__hash__  # as `CopyState`

    PROMISED = "promised"
    FILLING = "filling"
    HELD = "held"
    DROPPING = "dropping"
    GONE = "gone"


class HoldMove(Enum):
    FILL = "room free, filling started"
    KEEP = "filled"
    ABANDON = "not filled"
    DROP = "evicted, moved or removed"
    DROPPED = "drop finished"


_S, _M = HoldState, HoldMove

TRANSITIONS: Final[dict[HoldState, dict[HoldMove, HoldState]]] = {
    _S.PROMISED: {_M.FILL: _S.FILLING, _M.ABANDON: _S.GONE},
    _S.FILLING: {_M.KEEP: _S.HELD, _M.ABANDON: _S.GONE},
    _S.HELD: {_M.DROP: _S.DROPPING},
    _S.DROPPING: {_M.DROPPED: _S.GONE},
    _S.GONE: {},
}


@dataclass(eq=False, slots=True)
class Holding:
    """One model's bytes in one tier, from the moment room is promised for them."""

    tier: Tier
    model: ModelRecord
    size_bytes: int
    """At most, until HELD; exact from then on."""
    since_ms: int
    used_ms: int
    """Where it enters the tier's eviction order."""
    uses: int = 1
    reload_ms: float = 1.0
    run_ms: float = 0.0
    slo_ms: float = 100.0
    """These four: as the policy has them."""
    state: HoldState = HoldState.PROMISED
    pins: int = 0
    """Transfers that read it; it is not evicted, and dropped only after their end."""
    doomed: bool = False
    """The model is gone, but a transfer writes it: it goes as soon as that has ended."""
    source: Holding | None = None
    """What is copied here when that is given up, in the tier above."""
    drop_started: bool = False

    def __repr__(self) -> str:
        return f"<{self.model.model_id} in {self.tier} {self.state.value} {self.size_bytes}B pins={self.pins}>"

    @property
    def worth(self) -> Worth:
        return Worth(self.size_bytes, self.reload_ms, self.run_ms, self.slo_ms)


class Holdings(Books[HoldState, HoldMove, Holding]):
    """The books of one lower tier."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        super().__init__(capacity_bytes, policy, _LIFE)

    def __repr__(self) -> str:
        b = self.bytes_in
        return (
            f"held={b(_S.HELD)} filling={b(_S.FILLING)} dropping={b(_S.DROPPING)} promised={b(_S.PROMISED)} "
            f"of {self.capacity_bytes}"
        )

    def may_fill(self, holding: Holding) -> bool:
        """Whether what was promised to it is free."""
        return holding.size_bytes <= self.free_bytes


_LIFE: Final = Life(
    TRANSITIONS,
    resident=frozenset({_S.FILLING, _S.HELD, _S.DROPPING}),
    committed=frozenset({_S.PROMISED, _S.FILLING, _S.HELD}),
    settled=_S.HELD,
    gone=_S.GONE,
)
