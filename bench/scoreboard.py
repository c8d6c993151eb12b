"""What the demo shows: a live table on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.client import Report
from mesh.config import format_bytes
from protos import management_pb2 as pb

WINDOW_S: Final = 3.0
"""Rates and percentiles of the live table are of the last few seconds."""
LINE_S: Final = 2.0
"""Between lines, where stdout is no terminal."""
COLUMNS: Final = ("hits", "joins", "forwards", "loads", "evictions")
"""Of `placement.stats.Stats`: a request ends in one of the first four at each pod it comes to."""


class Scoreboard:
    """Reports of the client and states of the pods, as they come in."""

    def __init__(self, console: Console, models: int, registered: int) -> None:
        self._console = console
        self._models = models
        self._registered = registered
        self._started_s = self._lined_s = time.monotonic()
        self._ended_s = 0.0
        self._recent: deque[tuple[float, list[float]]] = deque()
        self.all_ms: list[float] = []
        self.first_ms: list[float] = []
        self.wrong = self.errors = 0
        self.words: list[str] = []
        self.states: dict[str, pb.MeshState] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Scoreboard:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended_s = time.monotonic()
        if self._live:
            self._live.stop()

    @property
    def agreed(self) -> bool:
        """Every response was there and was the model's own."""
        return bool(self.all_ms) and not self.wrong and not self.errors

    def report(self, report: Report) -> None:
        now_s, fresh_ms = time.monotonic(), report.warm_ms + report.first_ms
        self._recent.append((now_s, fresh_ms))
        while self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()
        self.all_ms += fresh_ms
        self.first_ms += report.first_ms
        self.wrong += report.wrong
        self.errors += report.errors

    def show(self) -> None:
        """Redraw the table, or print a line when one is due."""
        if self._live:
            self._live.update(Group(self._table(), Text("\n".join(self._traffic()))), refresh=True)
        elif time.monotonic() > self._lined_s + LINE_S:
            self._lined_s = time.monotonic()
            loaded = sum(pod.models_loaded for pod in self._pods())
            used = format_bytes(sum(pod.used_bytes for pod in self._pods()))
            counts = ", ".join(f"{self._sum(name):,} {name}" for name in COLUMNS)
            self._console.print(f"{'  '.join(self._traffic())}; {loaded} models hold {used}; {counts}")

    def _traffic(self) -> tuple[str, str]:
        seconds = max(1e-3, time.monotonic() - max(self._started_s, time.monotonic() - WINDOW_S))
        recent = [ms for _, some in self._recent for ms in some]
        elapsed = time.monotonic() - self._started_s
        return (
            f"{elapsed:5.1f} s  {len(recent) / seconds:5,.0f} requests/s  {percentiles(recent)}",
            f"{len(self.all_ms) - self.errors:6,} answers, {self.wrong} wrong, {self.errors} errors",
        )

    def _pods(self) -> list[pb.PodState]:
        """Each pod as it describes itself."""
        return [pod for asked, state in self.states.items() for pod in state.pods if pod.pod_id == asked]

    def _sum(self, name: str) -> int:
        return sum(getattr(state.fates, name) for state in self.states.values())

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("pod", "models", "memory", "of", *COLUMNS):
            table.add_column(name, justify="left" if name == "pod" else "right", no_wrap=True)
        for pod in self._pods():
            fates = self.states[pod.pod_id].fates
            memory = (str(pod.models_loaded), format_bytes(pod.used_bytes), format_bytes(pod.capacity_bytes))
            table.add_row(pod.pod_id, *memory, *(f"{getattr(fates, name):,}" for name in COLUMNS))
        used = format_bytes(sum(pod.used_bytes for pod in self._pods()))
        capacity = format_bytes(sum(pod.capacity_bytes for pod in self._pods()))
        loaded = str(sum(pod.models_loaded for pod in self._pods()))
        table.add_section()
        table.add_row("all", loaded, used, capacity, *(f"{self._sum(name):,}" for name in COLUMNS))
        return table

    def summary(self) -> None:
        """The last word, on stdout."""
        seconds, requests = self._ended_s - self._started_s, len(self.all_ms)
        rows: Sequence[tuple[str, Any]] = (
            ("requests", f"{requests:,} in {seconds:.1f} s, {requests / seconds:,.0f} requests/s"),
            ("answers that differ", f"{self.wrong:,} of {requests - self.errors:,} compared"),
            ("errors", f"{self.errors:,}"),
            ("latency, all", percentiles(self.all_ms)),
            ("latency, first of a model", percentiles(self.first_ms)),
            ("models asked for", f"{len(self.first_ms)} of {self._models}; {self._registered} registered"),
            (
                "loads",
                f"{self._sum('loads_finished'):,}, {self._sum('loads_failed')} failed; "
                f"{self._sum('evictions'):,} evictions; {self._sum('retries')} retries",
            ),
        )
        self._console.print(self._table())
        for name, text in rows:
            self._console.print(f"{name:26} {text}")
        for text in self.words:
            self._console.print(f"  {text}", markup=False)
        verdict = "every answer was the model's own" if self.agreed else "NOT every answer was the model's own"
        self._console.print(verdict, style="green" if self.agreed else "red")


def percentiles(latencies_ms: Sequence[float]) -> str:
    """`p50 ... p99 ... max ...`, aligned."""
    if not latencies_ms:
        return "p50      -     p99      -     max      -    "
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return f"p50 {p50:6.1f} ms  p99 {p99:6.1f} ms  max {max(latencies_ms):6.1f} ms"
