"""What Prometheus sees of a pod. Counters are read from the engine when asked for; only latency is observed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from http.server import ThreadingHTTPServer
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.errors import Code, MeshError
from mesh.rpc import Call, Handlers, Unary
from placement.engine import Engine
from placement.lifecycle import CopyState

_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)

_POLL_S: Final = 0.1
"""How often the server looks whether it should end (start_http_server: every half second)."""


class Metrics(Collector):
    """The metrics of one pod, in a registry of its own so that several pods fit in one process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._seconds = Histogram(
            "densemesh_request_seconds",
            "Time from a request's arrival to its response, by RPC and gRPC status.",
            ("method", "code"),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._cells: dict[tuple[str, Code], Histogram] = {}

    def timed(self, handlers: Handlers) -> Handlers:
        """The same handlers, observed."""
        return Handlers({path: self._timed(path, unary) for path, unary in handlers.unary.items()}, handlers.streams)

    def _timed(self, path: str, unary: Unary) -> Unary:
        method = path.rpartition("/")[2]

        async def timed(call: Call, message: bytes) -> bytes:
            started, code = time.perf_counter(), Code.CANCELLED  # also what a deadline looks like from inside
            try:
                response = await unary(call, message)
                code = Code.OK
                return response
            except MeshError as error:
                code = error.code
                raise
            finally:
                self._cell(method, code).observe(time.perf_counter() - started)

        return timed

    def _cell(self, method: str, code: Code) -> Histogram:
        cell = self._cells.get((method, code))
        if cell is None:
            cell = self._cells[method, code] = self._seconds.labels(method, code.name)
        return cell

    def collect(self) -> Iterator[Metric]:
        """Read the engine; called in a thread of prometheus_client, so every read is of one number."""
        engine, cache = self._engine, self._engine.cache
        for f in fields(engine.stats):
            yield CounterMetricFamily(
                f"densemesh_{f.name}", f"placement.stats.Stats.{f.name}", value=getattr(engine.stats, f.name)
            )
        capacity = GaugeMetricFamily("densemesh_capacity_bytes", "Memory that loaded models may hold.")
        capacity.add_metric((), engine.limits.capacity_bytes)
        yield capacity
        yield _by_state("densemesh_copies", "Model copies here.", ((s, cache.count(s)) for s in CopyState))
        yield _by_state(
            "densemesh_copy_bytes",
            "Bytes by the books, by the copies' state.",
            ((s, cache.bytes_in(s)) for s in CopyState),
        )
        models = GaugeMetricFamily("densemesh_models_registered", "Models in the registry, as this pod sees it.")
        models.add_metric((), len(engine.view.models))
        yield models


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def serve(metrics: Metrics, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Serve /metrics from a thread; the port that was taken, and what stops it.

    Raises:
        OSError: the port cannot be bound.
    """
    handler = MetricsHandler.factory(metrics.registry)
    server = _Server6((host, port), handler) if ":" in host else ThreadingHTTPServer((host, port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), close


def _by_state(name: str, explanation: str, values: Iterable[tuple[CopyState, int]]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, explanation, labels=("state",))
    for state, value in values:
        if state is not CopyState.GONE:
            gauge.add_metric((state.value,), value)
    return gauge
