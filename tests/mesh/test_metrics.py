"""What Prometheus scrapes of a pod. Authority: mesh.metrics; placement.stats for the fates; Prometheus' text format."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.mesh.certificates import Authority
from tests.mesh.pods import Loads, Mesh, request_for, running


async def scrape(mesh: Mesh, pod_id: str) -> dict[tuple[str, str], float]:
    """Values by name and by their labels' values."""
    url = f"http://127.0.0.1:{mesh.pods[pod_id].metrics_port}/metrics"

    def get() -> str:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return str(answer.read(), "utf-8")

    families = text_string_to_metric_families(await asyncio.to_thread(get))
    return {
        (sample.name, ",".join(value for label, value in sorted(sample.labels.items()) if label != "le")): sample.value
        for family in families
        for sample in family.samples
    }


async def test_bytes_copies_and_fates(loads: Loads) -> None:
    async with running("ab", loads, capacity="3MiB") as mesh:
        await mesh.register("m", load=True, size_bytes=1 << 20)
        (holder,) = mesh.holders("m")
        await mesh.seen_by_all("m", holder)
        other = "b" if holder == "a" else "a"
        before = await scrape(mesh, holder)
        for pod_id in "abab":
            await mesh.infer("m", pod_id)
        after = await scrape(mesh, holder)
        assert after["densemesh_hits_total", ""] - before["densemesh_hits_total", ""] == 4
        assert (await scrape(mesh, other))["densemesh_forwards_total", ""] >= 2
        assert after["densemesh_capacity_bytes", ""] == 3 << 20
        assert after["densemesh_copies", "loaded"] == 1
        assert after["densemesh_copy_bytes", "loaded"] == 1 << 20
        assert after["densemesh_models_registered", ""] == 1


def status(mesh: Mesh, path: str) -> int:
    """Of the answer to a probe of Kubernetes (httpGet)."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{mesh.pods['a'].metrics_port}{path}", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def test_probes(loads: Loads) -> None:
    """Kubernetes, probes: from 200 to 399 is success, anything else failure. A pod that drains is alive, not ready."""
    async with running("a", loads) as mesh:
        probes = ("/readyz", "/healthz", "/metrics")
        assert [await asyncio.to_thread(status, mesh, path) for path in probes] == [200, 200, 200]
        mesh.pods["a"].serving.clear()
        assert [await asyncio.to_thread(status, mesh, path) for path in probes] == [503, 200, 200]


async def test_an_event_loop_that_hangs_is_not_alive(loads: Loads) -> None:
    async with running("a", loads) as mesh:
        assert status(mesh, "/healthz") == 503  # asked from within, it hangs until it is answered


async def test_when_the_certificate_expires(loads: Loads, tmp_path: Path) -> None:
    until = datetime(2049, 1, 2, tzinfo=UTC)
    certificate, key = Authority(tmp_path).issue(until=until)
    async with running("a", loads, tls_cert=certificate, tls_key=key) as mesh:
        seen = await scrape(mesh, "a")
        assert seen["densemesh_tls_certificate_expiry_timestamp_seconds", ""] == until.timestamp()


async def test_latencies_by_method_and_status(loads: Loads) -> None:
    async with running("a", loads) as mesh:
        await mesh.register("m")
        await mesh.infer("m")
        await mesh.clients["a"].refusal("ModelInfer", request_for("nobody"))
        seen = await scrape(mesh, "a")
        assert seen["densemesh_request_seconds_count", "OK,ModelInfer"] == 1
        assert seen["densemesh_request_seconds_count", "NOT_FOUND,ModelInfer"] == 1
        assert seen["densemesh_request_seconds_sum", "OK,ModelInfer"] > 0
