"""Scenarios as text: commands, a line `----`, then what the engine answered, one line per command, and its repr.

The commands are the methods of `Stage`. `a..d` stands for a, b, c, d. Estimates are answered at once with the model's
size. `DENSEMESH_REWRITE=1 pytest tests/placement/test_scenarios.py` writes the expected part anew: look at the diff.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placement.limits import HostMode
from placement.messages import (
    Action,
    CopyUnwanted,
    Demote,
    DrainStarted,
    EstimateSize,
    Forward,
    Hop,
    LoadFailed,
    LoadHere,
    Publish,
    Refuse,
    Route,
    SizeEstimated,
    StartLoad,
    StartUnload,
    Tick,
)
from placement.records import CopyStatus, TenantRecord, Tier, model_key, pod_key
from tests.placement.pods import Pod, held, model_record, peer

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}


class Stage:
    """One pod and what is said to it. `age` is how long ago a use was, `hold` a request that lasts until `release`."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.registrations = 0

    def pod(
        self, capacity: str, slots: str = "2", host: str = "0", disk: str = "0", mode: str = "exclusive"
    ) -> list[str]:
        self.p = Pod(
            int(capacity), load_slots=int(slots), host_bytes=int(host), disk_bytes=int(disk), host_mode=HostMode(mode)
        )
        return []

    def peer(
        self, pod_id: str, capacity: str = "10", used: str = "0", idle: str = "0s", draining: str = ""
    ) -> list[str]:
        oldest_ms = self.p.now_ms - _ms(idle) if _ms(idle) else 0
        record = peer(
            pod_id,
            capacity_bytes=int(capacity),
            used_bytes=int(used),
            oldest_used_ms=oldest_ms,
            draining=bool(draining),
        )
        self.p.view.apply(record)
        return []

    def holds(self, pod_id: str, model_id: str, status: str = "loaded", size: str = "0") -> list[str]:
        error = "broken" if status == "failed" else ""
        self.p.view.apply(held(pod_id, model_id, CopyStatus(status), error=error, size_bytes=int(size)))
        return []

    def dead(self, pod_id: str) -> list[str]:
        self.p.view.remove(pod_key(pod_id))
        return []

    def unreachable(self, pod_id: str) -> list[str]:
        self.p.engine.forward_started(pod_id)
        self.p.engine.forward_ended(pod_id, reached=False, now_ms=self.p.now_ms)
        return []

    def tenant(
        self, tenant: str, guaranteed: str = "0", most: str = "0", weight: str = "1", loads: str = "0"
    ) -> list[str]:
        record = TenantRecord(tenant, int(guaranteed), int(most), int(weight), int(loads))
        self.p.view.apply(record)
        return []

    def model(self, model_id: str, size: str, tenant: str = "") -> list[str]:
        self.registrations += 1
        self.sizes[model_id] = int(size)
        changed = self.p.view.apply(model_record(model_id, self.registrations, tenant=tenant))
        return [] if changed is None else self._told(self.p.step(CopyUnwanted(changed)))

    def remove(self, model_id: str) -> list[str]:
        self.p.view.remove(model_key(model_id))
        return self._told(self.p.step(CopyUnwanted(model_id)))

    def unwanted(self, model_id: str) -> list[str]:
        return self._told(self.p.step(CopyUnwanted(model_id)))

    def request(self, model_id: str, hop: str = "client", age: str = "0s", without: str = "") -> list[str]:
        exclude = set(without.split(",")) - {""}
        used_ms = self.p.now_ms - _ms(age)
        route = self.p.engine.route(model_id, Hop(hop), exclude, self.p.now_ms, used_ms)
        told = [_way(route)]
        return told + self.want(model_id, age) if isinstance(route, LoadHere) else told

    def want(self, model_id: str, age: str = "0s") -> list[str]:
        return self._told(self.p.want(model_id, self.p.now_ms - _ms(age)))

    def hold(self, model_id: str) -> list[str]:
        told = self.request(model_id)
        self.p.pinned(model_id)
        return told

    def release(self, model_id: str) -> list[str]:
        return self._told(self.p.unpin(self.p.copy(model_id)))

    def loaded(self, model_id: str, bytes: str = "") -> list[str]:
        return self._told(self.p.finish(model_id, int(bytes or self.sizes[model_id])))

    def fail(self, model_id: str, error: str, retry: str = "") -> list[str]:
        return self._told(self.p.step(LoadFailed(model_id, error, bool(retry))))

    def unloaded(self, model_id: str, kept: str = "all") -> list[str]:
        return self._told(self.p.unload(model_id, keeps=kept == "all"))

    def demoted(self, model_id: str, kept: str = "all") -> list[str]:
        return self._told(self.p.demote(model_id, keeps=kept == "all"))

    def dropped(self, model_id: str, tier: str = "host") -> list[str]:
        return self._told(self.p.dropped(model_id, Tier(tier)))

    def place(self, model_id: str, **how: str) -> list[str]:
        """Registered again with other settings; numbers only."""
        known = self.p.view.models[model_id]
        told: dict[str, Any] = {name: type(getattr(known, name))(int(value)) for name, value in how.items()}
        self.p.view.apply(replace(known, revision=known.revision + 1, **told))
        return []

    def tick(self, passed: str, ran: str = "", busy: str = "1ms", times: str = "1") -> list[str]:
        """Time passes, and meanwhile model `ran` ran for `busy`; so many times."""
        told: list[str] = []
        for _ in range(int(times)):
            self.p.now_ms += _ms(passed)
            told += self._told(self.p.step(Tick({ran: (1, _ms(busy))} if ran else {})))
        return told

    def drain(self) -> list[str]:
        return self._told(self.p.step(DrainStarted()))

    def _told(self, actions: Iterable[Action]) -> list[str]:
        told: list[str] = []
        for action in actions:
            told.append(_deed(action))
            if isinstance(action, EstimateSize):
                model_id = action.model.model_id
                told += self._told(self.p.step(SizeEstimated(model_id, self.sizes[model_id])))
        return told


def _deed(action: Action) -> str:
    match action:
        case Publish(copy):
            tier = f"in {copy.tier}" if copy.status is CopyStatus.HELD else ""
            said = ["publish", copy.model_id, copy.status, tier, copy.error and f"({copy.error})"]
            return " ".join(filter(None, said))
        case EstimateSize(model):
            return f"EstimateSize {model.model_id}"
        case StartLoad(model, source, keep):
            way = f" from {source}" if source else ""
            return f"StartLoad {model.model_id}{way}" + "".join(f" keep {tier}" for tier in keep)
        case StartUnload(model_id, keep_in):
            return f"StartUnload {model_id}" + (f" keep {keep_in}" if keep_in else "")
        case Demote(model_id, source, target):
            return f"Demote {model_id} {source} -> {target}"
        case _:
            return " ".join([type(action).__name__, *(str(getattr(action, s)) for s in action.__slots__)])


def _way(route: Route) -> str:
    match route:
        case Forward(pod_id, hop):
            return f"-> forward to {pod_id} for a {hop.value}"
        case Refuse(why, detail):
            return f"-> refuse: {why.value}" + (f" ({detail})" if detail else "")
        case _:
            return f"-> {type(route).__name__}"


def _ms(text: str) -> int:
    number = text.rstrip("mhs")
    return int(number) * _UNITS[text[len(number) :]]


def _each(word: str) -> list[str]:
    first, dots, last = word.partition("..")
    return [chr(c) for c in range(ord(first), ord(last) + 1)] if dots else [word]


def play(commands: str) -> str:
    stage, lines = Stage(), []
    for line in commands.splitlines():
        name, *words = shlex.split(line, comments=True) or [""]
        named = dict(word.split("=", 1) for word in words if "=" in word)
        positional = [word for word in words if "=" not in word]
        for first in _each(positional[0]) if positional else [""]:
            arguments = [first, *positional[1:]] if positional else []
            told = getattr(stage, name)(*arguments, **named) if name else []
            if told:
                lines.append(f"{' '.join([name, *arguments])}: {', '.join(told)}")
    return "\n".join([*lines, repr(stage.p.engine)]) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    commands, _, expected = path.read_text().partition("----\n")
    found = play(commands)
    if os.environ.get("DENSEMESH_REWRITE"):
        path.write_text(f"{commands}----\n{found}")
    else:
        assert found == expected


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10
