"""What happened, in order: the last events to read, and a digest of all to compare two runs by."""

from __future__ import annotations

from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

from placement.messages import Publish
from placement.records import ModelId
from placement.simulator.clock import TICKS_PER_MS, Tick

if TYPE_CHECKING:
    from placement.simulator.pods import SimPod

_KEPT: Final = 20_000


class Entry(NamedTuple):
    tick: Tick
    pod: str
    model_id: ModelId
    what: str

    def __str__(self) -> str:
        return f"{self.tick / TICKS_PER_MS:12.1f} ms  {self.pod or 'world':6} {self.what}"


class Trace:
    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._digest = blake2b(digest_size=16)

    def add(self, pod: SimPod, what: object, about: ModelId = "") -> None:
        model = getattr(what, "model", getattr(what, "copy", None))
        model_id = about or (getattr(what, "model_id", "") if model is None else getattr(model, "model_id", ""))
        self.say(pod.world.clock.now, repr(pod), model_id, _short(what))

    def say(self, tick: Tick, pod: str, model_id: ModelId, what: str) -> None:
        entry = Entry(tick, pod, model_id, what)
        self._digest.update(f"{tick} {pod} {model_id} {what}\n".encode())
        self._entries.append(entry)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def last(self, count: int, pod_id: str = "", model_id: ModelId = "") -> list[Entry]:
        """The newest entries that concern the model (on any pod), or the pod when no model is named."""
        found = [
            e
            for e in self._entries
            if (model_id and e.model_id == model_id)
            or (not model_id and e.pod.partition("#")[0] == pod_id)
            or (not e.model_id and e.pod.partition("#")[0] in (pod_id, "") and not e.what.startswith("Tick"))
        ]
        return found[-count:]


def _short(what: object) -> str:
    if isinstance(what, str):
        return what
    if isinstance(what, Publish):
        copy = what.copy
        return f"publish {copy.model_id} {copy.status.value} {copy.size_bytes}B {copy.error}".rstrip()
    words = [getattr(value, "model_id", value) for name in what.__slots__ if (value := getattr(what, name)) is not None]  # type: ignore[attr-defined]
    return " ".join([type(what).__name__, *map(str, words)])
