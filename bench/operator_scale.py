"""How long until InferenceServices that are applied at once are all ready? `python -m bench.operator_scale`

A pod and an etcd of their own, `densemesh-operator` as a process, and the tests' API server in this one. First as many
models are registered without Kubernetes, by the operator's own client from as many callers as it has workers, and
awaited until they are loaded; then the InferenceServices are applied. The models are synthetic and load at once, so
that the figures are those of the way there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from bench.rig import Mesh
from mesh_operator.inferenceservice import read
from mesh_operator.mesh import MeshClient
from mesh_operator.registration import registration
from tests.operator.fake_api.objects import Object
from tests.operator.fake_api.server import FakeApi
from tests.operator.manifests import RUNTIME
from tests.operator.rig import BY_PLURAL, ISVC, NAMESPACE, fraud, kubeconfig, runtime_manifest

CALLERS: Final = 16
POLL_S: Final = 0.02


async def without_kubernetes(mesh: MeshClient, manifests: Sequence[Object]) -> float:
    """Seconds until the models of these manifests are registered and loaded."""
    waiting = list(manifests)

    async def caller() -> None:
        while waiting:
            manifest = waiting.pop()
            name = f"direct.{manifest['metadata']['name']}"
            call = registration(read(manifest).spec, RUNTIME, name, "bench")
            vmodel = await mesh.carry_out(call)
            while vmodel is None or vmodel.active.state != "LOADED":
                await asyncio.sleep(POLL_S)
                vmodel = await mesh.vmodel(name, "bench")

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return time.perf_counter() - began


async def with_kubernetes(api: FakeApi, manifests: Sequence[Object]) -> list[float]:
    """Seconds until each of them is ready, in order."""
    began = time.perf_counter()
    for manifest in manifests:
        api.objects.create(ISVC, NAMESPACE, manifest)
    await api.notify()
    seen, ready, took_s = api.objects.version, set[str](), list[float]()
    while len(ready) < len(manifests):
        async with api.objects.changed:
            await api.objects.changed.wait()
        for change in api.objects.since(ISVC, "", seen):
            seen, name = change.version, change.object["metadata"]["name"]
            if name not in ready and _is_ready(change.object):
                ready.add(name)
                took_s.append(time.perf_counter() - began)
    return took_s


def _is_ready(manifest: Object) -> bool:
    told = (manifest.get("status") or {}).get("conditions") or ()
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in told)


async def measure(count: int) -> dict[str, Any]:
    manifests = [fraud(name=f"m-{number}") for number in range(count)]
    async with Mesh(1, capacity="8GiB") as mesh, FakeApi().running() as api:
        target = mesh.pods[0].address
        client = MeshClient(target)
        direct_s = await without_kubernetes(client, manifests)
        await client.close()
        api.objects.create(BY_PLURAL["namespaces"], "", {"metadata": {"name": NAMESPACE}})
        api.objects.create(BY_PLURAL["clusterservingruntimes"], "", runtime_manifest())
        with tempfile.NamedTemporaryFile("w", suffix=".kubeconfig") as config:
            config.write(yaml.safe_dump(kubeconfig(api.url)))
            config.flush()
            told = (
                "--mesh",
                target,
                "--lease",
                "",
                "--health-port",
                "0",
                "--metrics-port",
                "0",
                "--log-level",
                "error",
            )
            operator = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mesh_operator", *told), env={**os.environ, "KUBECONFIG": config.name}
            )
            try:
                while not api.calls[("WATCH", "inferenceservices")]:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
                took_s = await with_kubernetes(api, manifests)
            finally:
                operator.terminate()
                await operator.wait()
    writes = {f"{method} {plural}": number for (method, plural), number in sorted(api.calls.items())}
    return {"count": count, "direct_s": direct_s, "first_s": took_s[0], "all_s": took_s[-1], "calls": writes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    figures = asyncio.run(measure(asked.count))
    if asked.json:
        asked.json.write_text(json.dumps(figures))
    count, all_s, direct_s = figures["count"], figures["all_s"], figures["direct_s"]
    print(f"{count} models registered and loaded without Kubernetes: {direct_s:.2f} s")
    print(f"{count} InferenceServices at once: the first ready after {figures['first_s']:.2f} s, all {all_s:.2f} s")
    print(f"  {all_s / direct_s:.1f} times as long, {1000 * all_s / count:.1f} ms each")
    for name, number in figures["calls"].items():
        print(f"  {name}: {number / count:.2f} each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
