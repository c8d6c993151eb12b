"""The port between gRPC front ends and everything behind them: bytes and plain types, nothing of grpcio.

A front end turns each RPC into a `Call` and looks up its handler by path; what the handler returns is the response,
and a `MeshError` it raises is the status. The front ends are in `mesh.frontends`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mesh.errors import Code, InvalidRequest, MeshError
from mesh.wire import PartialPeek
from placement.messages import Route
from placement.records import ModelId, PodId

Metadata = Sequence[tuple[str, str | bytes]]
"""Lower-case keys in order, repeats kept; `-bin` keys hold bytes, all others ASCII text."""

HOLDER = "densemesh-pod"
"""Response header: the pod that served the request; a client may go straight to it."""

SERVED = "densemesh-model"
"""Response header: which model that was, where a vmodel could have meant one of two; percent-encoded."""

Begun = tuple[ModelId, Route, MeshError | None]
"""The first attempt of a call: the model, where it goes, and if it went there already, why it has to go elsewhere."""


@dataclass(slots=True)
class Call:
    """One RPC as it came in."""

    method: str
    """Full path, e.g. `/inference.GRPCInferenceService/ModelInfer`."""
    metadata: Metadata
    deadline: float
    """Event loop time at which the client gives up."""
    reply_metadata: dict[str, str] = field(default_factory=dict)
    """Response headers; handlers add to it before they return."""
    keys: frozenset[str] | None = None
    """The metadata's keys, where the front end knows them already."""
    memo: dict[str, Any] = field(default_factory=dict)
    """For what follows from the method and the metadata alone: front ends hand the same one to calls with the same."""
    begun: Begun | None = None
    """What a relay found out before it left the call to its handler."""
    side: tuple[str, str] | None = None
    """Of a call for a vmodel whose requests are split: the vmodel, and which side it is for."""

    def texts(self, key: str) -> list[str]:
        """The values of a key and of its `-bin` form, as text.

        Raises:
            InvalidRequest: a `-bin` value is not UTF-8.
        """
        found: list[str] = []
        if self.keys is not None and key not in self.keys and f"{key}-bin" not in self.keys:
            return found
        for name, value in self.metadata:
            if name == key and isinstance(value, str):
                found.append(value)
            elif name == f"{key}-bin":
                try:
                    found.append(value.decode() if isinstance(value, bytes) else value)
                except UnicodeDecodeError:
                    raise InvalidRequest(f"header {name} is not UTF-8") from None
        return found


Unary = Callable[[Call, bytes], Awaitable[bytes]]
Stream = Callable[[Call, AsyncIterator[bytes]], AsyncIterator[bytes]]


class Head(Protocol):
    """What calls with the same headers have in common."""

    path: str
    metadata: tuple[tuple[str, str | bytes], ...]
    keys: frozenset[str]
    memo: dict[str, Any]
    """For what follows from the headers alone."""


class Told:
    """Metadata that is the same for many calls."""

    __slots__ = ("memo", "metadata")

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.memo: dict[str, Any] = {}
        """For what follows from it alone."""


Onward = tuple[ModelId, PodId, Any, Told]
"""Where a call is passed on to: for which model, to which pod, with what (`Client.ready`), and what the pod is told
beside the call's own metadata."""


class Relay(Protocol):
    """Says, without waiting, to which pod a unary call is to be passed on, so that a front end whose client can do that
    need not run its handler. Whatever does not go well is left to the handler, with `Call.begun`."""

    def onward(self, head: Head, message: bytes) -> Onward | None:
        """None: the handler must see to it. Else the call is on its way, and `ended` follows, once."""
        ...

    def onward_begun(self, head: Head, piece: bytes) -> tuple[Onward, PartialPeek | None] | None:
        """The same for the first piece of a message; what reads along to see that the rest does not change it."""
        ...

    def passed(self, head: Head) -> Metadata:
        """What of the call's own metadata is passed on."""
        ...

    def ended(self, pod_id: PodId, code: Code | None, elapsed_s: float, *, reached: bool) -> None:
        """The pod has answered, or could not be reached, or nobody waits for it any more (CANCELLED). `code` None: the
        handler goes on."""
        ...


class Caller(Protocol):
    """A connection whose calls were taken by a `Quick`; `call` is what it handed over with each."""

    def settle(self, call: Any, headers: tuple[tuple[str, str], ...], response: bytes) -> None:
        """Answer a call; `flush` sends it."""
        ...

    def give_back(self, call: Any, message: bytes) -> None:
        """The call is the handler's after all, if it was not settled."""
        ...

    def flush(self) -> None:
        """Send what was answered."""
        ...


Quick = Callable[[Caller, Any, Head, bytes, float], bool]
"""Takes a unary call (caller, call, head, message, deadline) that can be answered in this turn of the loop, without a
handler; False: it did not."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """What a server serves, by full method path."""

    unary: Mapping[str, Unary] = field(default_factory=dict)
    streams: Mapping[str, Stream] = field(default_factory=dict)
    relays: Mapping[str, Relay] = field(default_factory=dict)
    """Of some unary methods."""
    quick: Mapping[str, Quick] = field(default_factory=dict)
    """For some of the unary methods: what front ends that can do so ask first."""

    def __or__(self, other: Handlers) -> Handlers:
        return Handlers(
            {**self.unary, **other.unary},
            {**self.streams, **other.streams},
            {**self.relays, **other.relays},
            {**self.quick, **other.quick},
        )


class Client(Protocol):
    """Calls other servers with raw messages."""

    async def call(
        self, address: str, method: str, message: bytes, metadata: Metadata, deadline: float
    ) -> tuple[bytes, Mapping[str, str]]:
        """One unary call; the response and its text headers.

        Raises:
            MeshError: the peer's own answer, as the class its reason or code names; `PodUnavailable` if it cannot be
                reached.
        """
        ...

    def ready(self, address: str) -> Any | None:
        """What a front end of the same kind can send calls on with, at once; None: nothing."""
        ...

    async def forget(self, address: str) -> None:
        """The peer is gone: close what leads to it."""
        ...

    async def close(self) -> None: ...
