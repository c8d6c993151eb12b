"""What Prometheus sees of a pod. Counters are read from the engine when asked for; only latency is observed."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from http.server import ThreadingHTTPServer
from typing import Final

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loaders.fleet.architectures import architectures
from loaders.fleet.promotion import promotions
from mesh.errors import Code, MeshError
from mesh.histogram import Histogram
from mesh.in_line import InLine
from mesh.memory import Memory
from mesh.preparing import Preparing
from mesh.rpc import Call, Handlers, Unary
from mesh.runtime.runtime import Runtime
from mesh.sizes import Sizes
from mesh.split import Split
from mesh.tls import Tls
from placement.engine import Engine
from placement.lifecycle import CopyState

_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)

_MOST_ARCHITECTURES: Final = 20
_MOST_TENANTS: Final = 100

_POLL_S: Final = 0.1
"""How often the server looks whether it should end (start_http_server: every half second)."""

_ALIVE_S: Final = 1.0


class Metrics(Collector):
    """The metrics of one pod, in a registry of its own so that several pods fit in one process."""

    def __init__(
        self,
        engine: Engine,
        in_line: InLine | None = None,
        batch_sizes: Histogram | None = None,
        tls: Tls | None = None,
        preparing: Preparing | None = None,
        sizes: Sizes | None = None,
        runtime: Runtime | None = None,
        split: Split | None = None,
        joint_sizes: Histogram | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._engine = engine
        self._in_line = in_line
        self._batch_sizes = batch_sizes
        self._joint_sizes = joint_sizes
        self._tls = tls
        self._preparing = preparing
        self._runtime = runtime
        self._sizes = sizes
        self._split = split
        self._memory = memory
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._cells: dict[tuple[str, Code], Histogram] = {}

    def timed(self, handlers: Handlers) -> Handlers:
        """The same handlers, observed."""
        timed = {path: self._timed(path, unary) for path, unary in handlers.unary.items()}
        return replace(handlers, unary=timed)

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
                self.observe(method, code, time.perf_counter() - started)

        return timed

    def observe(self, method: str, code: Code, elapsed_s: float) -> None:
        """A call has ended."""
        self.cell(method, code).observe(elapsed_s)

    def cell(self, method: str, code: Code) -> Histogram:
        """The histogram of an RPC's calls that end with this status."""
        cell = self._cells.get((method, code))
        if cell is None:
            cell = self._cells[method, code] = Histogram(_BUCKETS_S)
        return cell

    def collect(self) -> Iterator[Metric]:
        """Read the engine; called in a thread of prometheus_client, so every read is of one number."""
        engine, cache = self._engine, self._engine.cache
        for f in fields(engine.stats):
            value = getattr(engine.stats, f.name)
            if isinstance(value, int):
                yield CounterMetricFamily(f"densemesh_{f.name}", f"placement.stats.Stats.{f.name}", value=value)
        moved = CounterMetricFamily(
            "densemesh_moved_bytes", "Bytes of models moved between tiers.", labels=("source", "target")
        )
        for (source, target), size_bytes in list(engine.stats.moved_bytes.items()):
            moved.add_metric((source or "store", target), size_bytes)
        yield moved
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
        yield self._request_seconds()
        if self._split is not None:
            yield self._split.seconds()
        if self._in_line is not None:
            yield from _in_line(self._in_line)
        if self._batch_sizes is not None:
            sizes = HistogramMetricFamily("densemesh_batch_size", "Requests in one run of a model.")
            sizes.add_metric((), self._batch_sizes.buckets(), self._batch_sizes.sum)
            yield sizes
        if self._joint_sizes is not None:
            sizes = HistogramMetricFamily("densemesh_joint_run_models", "Models in one call for several of them.")
            sizes.add_metric((), self._joint_sizes.buckets(), self._joint_sizes.sum)
            yield sizes
        if self._preparing is not None:
            yield from _prepared(self._preparing)
        if self._sizes is not None:
            errors = HistogramMetricFamily(
                "densemesh_size_error", "Measured bytes of a loaded model over those expected.", labels=("format",)
            )
            for form, cell in list(self._sizes.errors.items()):
                errors.add_metric((form,), cell.buckets(), cell.sum)
            yield errors
        if self._runtime is not None:
            up = GaugeMetricFamily(
                "densemesh_model_server_up", "Whether the model server beside the pod is there.", labels=("name",)
            )
            up.add_metric((self._runtime.settings.name,), self._runtime.is_up)
            yield up
        if self._memory is not None:
            yield from _in_memory(self._memory)
        yield from _shared_architectures()
        if self._tls is not None and self._tls.until is not None:
            yield GaugeMetricFamily(
                "densemesh_tls_certificate_expiry_timestamp_seconds",
                "When the certificate that this pod shows expires.",
                value=self._tls.until.timestamp(),
            )

    def _request_seconds(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(
            "densemesh_request_seconds",
            "Time from a request's arrival to its response, by RPC and gRPC status.",
            labels=("method", "code"),
        )
        for (method, code), cell in list(self._cells.items()):
            family.add_metric((method, code.name), cell.buckets(), cell.sum)
        return family


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def serve(metrics: Metrics, host: str, port: int, is_ready: Callable[[], bool]) -> tuple[int, Callable[[], None]]:
    """Serve /metrics, /readyz and /healthz from a thread; the port that was taken, and what stops it.

    /readyz is 200 while `is_ready`, /healthz while the event loop that this is called in answers within a second; they
    are for the probes of Kubernetes, whose own for gRPC knows no TLS.

    Raises:
        OSError: the port cannot be bound.
    """
    loop = asyncio.get_running_loop()

    def is_alive() -> bool:
        turned = threading.Event()
        loop.call_soon_threadsafe(turned.set)
        return turned.wait(_ALIVE_S)

    probes = {"/readyz": is_ready, "/healthz": is_alive}

    class Handler(MetricsHandler):
        registry = metrics.registry

        def do_GET(self) -> None:
            probe = probes.get(self.path)
            if probe is None:
                super().do_GET()
                return
            is_well = probe()
            body = b"ok\n" if is_well else b"not ready\n"
            self.send_response(200 if is_well else 503)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = _Server6((host, port), Handler) if ":" in host else ThreadingHTTPServer((host, port), Handler)
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


def _in_memory(memory: Memory) -> Iterator[Metric]:
    capacity = GaugeMetricFamily("densemesh_tier_capacity_bytes", "What a tier may hold.", labels=("tier",))
    held = GaugeMetricFamily(
        "densemesh_tier_bytes",
        "Bytes by the books of a tier; those promised lie nowhere yet.",
        labels=("tier", "state"),
    )
    shared = GaugeMetricFamily(
        "densemesh_tier_shared_bytes",
        "Of these, what is not taken, because models have it in common.",
        labels=("tier",),
    )
    for tier in memory.tiers():
        capacity.add_metric((tier.name,), tier.capacity)
        shared.add_metric((tier.name,), tier.shared)
        for state, size_bytes in {**tier.by_state, "free": tier.free}.items():
            held.add_metric((tier.name, state), size_bytes)
    yield from (capacity, held, shared)
    tenants = GaugeMetricFamily(
        "densemesh_tenant_bytes",
        f"Bytes of a tenant's models in a tier; of the {_MOST_TENANTS} largest.",
        labels=("tenant", "tier"),
    )
    for (tenant, name), size_bytes in memory.tenants().most_common(_MOST_TENANTS):
        tenants.add_metric((tenant, name), size_bytes)
    yield tenants
    last = memory.last
    for name, explanation, value in (
        ("expected_bytes", "What the process should have resident by the books, as of the last check.", last.expected),
        ("resident_bytes", "What it has, shared memory left out.", last.resident),
        ("device_used_bytes", "What the device says is in use; 0: there is none.", last.device_used),
        ("alarm", "How many things differ by more than they may; the log says which.", len(last.alarms)),
        ("device_lost", "Whether the device is not used any more.", bool(memory.lost)),
    ):
        yield GaugeMetricFamily(f"densemesh_memory_{name}", explanation, value=value)


def _shared_architectures() -> Iterator[Metric]:
    """Of this process, which has one pod outside of tests."""
    in_use = architectures.in_use()
    yield GaugeMetricFamily(
        "densemesh_onnx_architectures", "ONNX graphs that models with other weights share.", value=len(in_use)
    )
    models = GaugeMetricFamily(
        "densemesh_onnx_architecture_models",
        f"Models of an architecture; of the {_MOST_ARCHITECTURES} that have most.",
        labels=("architecture",),
    )
    for each in sorted(in_use, key=lambda architecture: -architecture.models)[:_MOST_ARCHITECTURES]:
        models.add_metric((each.digest[:12],), each.models)
    yield models
    yield GaugeMetricFamily(
        "densemesh_onnx_promoted_models",
        "Models of architectures that have a session of their own, with prepacked weights.",
        value=promotions.count,
    )
    sessions = GaugeMetricFamily(
        "densemesh_onnx_session_bytes", "What sessions take beside weights, as estimated.", labels=("of",)
    )
    sessions.add_metric(("architectures",), sum(each.facts.session_bytes for each in in_use))
    sessions.add_metric(("promoted",), promotions.session_bytes)
    yield sessions


def _prepared(preparing: Preparing) -> Iterator[Metric]:
    jobs = CounterMetricFamily(
        "densemesh_preparations", "Models that better forms were looked for, by outcome.", labels=("format", "outcome")
    )
    for (format_name, outcome), count in list(preparing.outcomes.items()):
        jobs.add_metric((format_name, outcome), count)
    yield jobs
    seconds = CounterMetricFamily("densemesh_preparation_seconds", "Time that this took.", labels=("format",))
    for format_name, busy_s in list(preparing.busy_s.items()):
        seconds.add_metric((format_name,), busy_s)
    yield seconds


def _in_line(in_line: InLine) -> Iterator[Metric]:
    yield CounterMetricFamily("densemesh_in_line_runs", "Model runs on the event loop.", value=in_line.runs)
    for name, explanation, value in (
        ("run", "The longest model run on the event loop.", in_line.longest_run_s),
        ("turn", "The most that model runs took of one turn of the event loop.", in_line.longest_turn_s),
    ):
        gauge = GaugeMetricFamily(f"densemesh_in_line_longest_{name}_seconds", explanation)
        gauge.add_metric((), value)
        yield gauge
