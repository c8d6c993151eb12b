"""The life of one model copy on one pod, as one table. Every move that is not in it raises.

    QUEUED -> WAITING | FAILED | GONE
    WAITING -> LOADING | GONE
    LOADING -> SIZING | FAILED | OVERDUE
    OVERDUE -> SIZING | FAILED
    SIZING -> LOADED | UNLOADING
    LOADED -> UNLOADING
    UNLOADING -> GONE | FAILED
    FAILED -> GONE

QUEUED     wanted; its size is being estimated, or no load slot or room can be promised yet
WAITING    room is promised; the evictions that make it are not finished
LOADING    the loader works; the estimate's bytes are taken
OVERDUE    it has worked for too long: the load is told as failed, and its slot is another's, but its bytes are taken
           until it answers, since nothing can end it; what comes late serves after all
SIZING     loaded and measured; the books are being corrected, which may need evictions
LOADED     serves
UNLOADING  does not serve any more; its bytes count until the unload has finished; FAILED follows if it was given up
           because it turned out larger than there is room for
FAILED     cannot be loaded; holds no bytes; forgotten after its expiry, or when the model changes
GONE       nothing is left of it; when the model is wanted again, that is another copy
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, TypeVar


class CopyState(Enum):
    __hash__ = object.__hash__  # Enum's is written in Python, and states are looked up all the time

    QUEUED = "queued"
    WAITING = "waiting"
    LOADING = "loading"
    OVERDUE = "overdue"
    SIZING = "sizing"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    GONE = "gone"


class Move(Enum):
    PROMISE = "room promised"
    START = "room free, load started"
    FINISH = "load finished"
    EXPIRE = "load not finished in time"
    SETTLE = "books corrected"
    EVICT = "evicted or removed"
    UNLOADED = "unload finished"
    REJECT = "unload finished, not to be tried again at once"
    FAIL = "failed"
    DROP = "dropped"


class IllegalMove(AssertionError):
    """A bug: the engine asked for a move that the table does not have."""


_S, _M = CopyState, Move

TRANSITIONS: Final[dict[CopyState, dict[Move, CopyState]]] = {
    _S.QUEUED: {_M.PROMISE: _S.WAITING, _M.FAIL: _S.FAILED, _M.DROP: _S.GONE},
    _S.WAITING: {_M.START: _S.LOADING, _M.DROP: _S.GONE},
    _S.LOADING: {_M.FINISH: _S.SIZING, _M.FAIL: _S.FAILED, _M.EXPIRE: _S.OVERDUE},
    _S.OVERDUE: {_M.FINISH: _S.SIZING, _M.FAIL: _S.FAILED},
    _S.SIZING: {_M.SETTLE: _S.LOADED, _M.EVICT: _S.UNLOADING},
    _S.LOADED: {_M.EVICT: _S.UNLOADING},
    _S.UNLOADING: {_M.UNLOADED: _S.GONE, _M.REJECT: _S.FAILED},
    _S.FAILED: {_M.DROP: _S.GONE},
    _S.GONE: {},
}

IN_FLIGHT: Final = frozenset({_S.QUEUED, _S.WAITING, _S.LOADING, _S.SIZING})
"""On the way to LOADED: a request may join."""

HAS_FAILED: Final = frozenset({_S.OVERDUE, _S.FAILED})
"""Not to be tried again yet: the error tells why."""


def next_state(state: CopyState, move: Move) -> CopyState:
    """Where a copy's move leads.

    Raises:
        IllegalMove: the table does not have it; nothing has changed.
    """
    return follow(TRANSITIONS, state, move)


S = TypeVar("S", bound=Enum)
M = TypeVar("M", bound=Enum)


def follow(table: Mapping[S, Mapping[M, S]], state: S, move: M) -> S:
    """Where a move leads in a table of states.

    Raises:
        IllegalMove: the table does not have it; nothing has changed.
    """
    try:
        return table[state][move]
    except KeyError:
        raise IllegalMove(f"no move {move.value!r} from {state.value!r}") from None
