"""Every way a request can fail, each with its gRPC code and whether another pod may do better.

The table is in docs/ARCHITECTURE.md, "Errors"; what a bug does is in decision 0005.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Final
from urllib.parse import quote


class Code(IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md), so that nothing but the adapters needs grpcio."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MeshError(Exception):
    """A request's failure, as the client will see it."""

    code: Code = Code.UNKNOWN
    try_elsewhere: ClassVar[bool] = False
    """Another pod may succeed where this one did not."""
    reason: ClassVar[str] = ""
    """Sent between pods in the trailer `densemesh-reason`, because codes alone are ambiguous there."""
    retry_after_ms: int | None = None
    """Sent to clients in the trailer `grpc-retry-pushback-ms` (gRFC A6)."""


class InvalidRequest(MeshError):
    """The message is malformed or disagrees with itself or the model; names the field and what was expected."""

    code = Code.INVALID_ARGUMENT


class ModelNotFound(MeshError):
    """No such model, vmodel or version is registered."""

    code = Code.NOT_FOUND


class AlreadyExists(MeshError):
    """Registered with other attributes, or owned by somebody else."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(MeshError):
    """A compare-and-set or a rule between records did not hold."""

    code = Code.FAILED_PRECONDITION


class LoadFailed(MeshError):
    """The model cannot be loaded; carries the loader's own reason."""

    code = Code.FAILED_PRECONDITION
    try_elsewhere = True
    reason = "load-failed"


class LoadUnavailable(MeshError):
    """The load failed for a reason that may pass."""

    code = Code.UNAVAILABLE
    try_elsewhere = True
    reason = "load-unavailable"
    retry_after_ms = 1_000


class NoRoom(MeshError):
    """No pod has room now: too much is pinned or in flight, or the model fits nowhere."""

    code = Code.RESOURCE_EXHAUSTED
    try_elsewhere = True
    reason = "no-room"
    retry_after_ms = 1_000


class OverQuota(MeshError):
    """A tenant's quota is used up; the message names it."""

    code = Code.RESOURCE_EXHAUSTED


class Overloaded(MeshError):
    """A limit on queued or running work was reached."""

    code = Code.RESOURCE_EXHAUSTED
    retry_after_ms = 200


class MessageTooLarge(MeshError):
    """The message exceeds the configured limit."""

    code = Code.RESOURCE_EXHAUSTED


class NotHere(MeshError):
    """A peer believed this pod to hold a copy that it does not hold (any more). Never shown to clients."""

    code = Code.UNAVAILABLE
    try_elsewhere = True
    reason = "not-here"


class PodUnavailable(MeshError):
    """A peer cannot be reached, or is draining; inference is idempotent, so another pod may answer."""

    code = Code.UNAVAILABLE
    try_elsewhere = True
    reason = "unavailable"
    retry_after_ms = 500


class ServerUnavailable(MeshError):
    """The model server beside a pod does not answer, or says that it cannot now; that of another pod may."""

    code = Code.UNAVAILABLE
    try_elsewhere = True
    reason = "server-unavailable"
    retry_after_ms = 500


class RegistryUnavailable(MeshError):
    """The registry does not answer; loaded models go on serving."""

    code = Code.UNAVAILABLE
    retry_after_ms = 1_000


class DeadlineExceeded(MeshError):
    code = Code.DEADLINE_EXCEEDED


class Unimplemented(MeshError):
    """An RPC, datatype or option that this server does not have."""

    code = Code.UNIMPLEMENTED


class ModelFailed(MeshError):
    """The model itself failed while running a well-formed request."""

    code = Code.INTERNAL


class ModelLost(ModelFailed):
    """The model's process or server was lost over the request. Not tried elsewhere: it may do the same there."""


class InternalError(MeshError):
    """A bug met this request. One request must not end a pod, or it would end the next pod it is sent to as well."""

    code = Code.INTERNAL

    def __init__(self) -> None:
        super().__init__("the server could not handle this request; its log says why")


MODEL_FAILURES: Final = (Exception, SystemExit)
"""What a model may raise: one that wants to exit fails its request, and does not end the pod."""

BY_REASON: Final[dict[str, type[MeshError]]] = {
    error.reason: error for error in (LoadFailed, LoadUnavailable, NoRoom, NotHere, PodUnavailable, ServerUnavailable)
}
"""How a peer's trailer becomes an error again."""

BY_CODE: Final[dict[Code, type[MeshError]]] = {
    Code.INVALID_ARGUMENT: InvalidRequest,
    Code.NOT_FOUND: ModelNotFound,
    Code.FAILED_PRECONDITION: FailedPrecondition,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.UNIMPLEMENTED: Unimplemented,
    Code.INTERNAL: ModelFailed,
    Code.UNAVAILABLE: PodUnavailable,
    Code.CANCELLED: PodUnavailable,  # not by us: the peer ends and has given its calls up
}
"""How a peer's status becomes an error again when no reason came with it."""


def answer_of(status: int, reason: str, details: str, *, address: str, retry_after_ms: int | None) -> MeshError:
    """A peer's answer as an error of ours; a peer that is not there gives no reason."""
    code = Code(status) if status in Code.__members__.values() else Code.UNKNOWN
    kind = BY_REASON.get(reason) or BY_CODE.get(code, MeshError)
    if kind is PodUnavailable:
        return PodUnavailable(f"{address}: {details}")
    raised = kind(details or code.name)
    if kind is MeshError:
        raised.code = code  # which is nothing of ours
    if retry_after_ms is not None:
        raised.retry_after_ms = retry_after_ms
    return raised


MAX_DETAILS: Final = 4096
"""Bytes of `grpc-message`, encoded: clients refuse headers of more than 8 KiB in all, and then see another error."""
_PLAIN: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def encoded(text: str) -> str:
    """`grpc-message`: UTF-8, percent-encoded (gRPC over HTTP/2)."""
    return quote(text, safe=_PLAIN)


def shown(text: str) -> str:
    """The text as far as a trailer can carry it once it is encoded."""
    text = text.encode(errors="replace").decode()
    while len(encoded(text)) > MAX_DETAILS:
        text = f"{text[: len(text) * 3 // 4]} ..."
    return text
