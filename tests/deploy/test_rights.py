"""The operator's rights and what it does: a recorded run against an API server. Authority: Kubernetes, RBAC."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.kustomize import build
from tests.mesh.pods import Loads
from tests.operator.manifests import isvc
from tests.operator.rig import fraud, rigged

CONFIG = Path(__file__).resolve().parents[2] / "operator" / "config"
METHODS = {"list": "GET", "get": "GET", "watch": "WATCH", "create": "POST", "update": "PUT", "patch": "PATCH"}
"""Of the API server, by verb of RBAC (Authorization overview, Determine the request verb)."""


async def test_a_run_needs_every_right_and_no_other(tmp_path: Path, loads: Loads) -> None:
    granted = {
        (METHODS[verb], resource.partition("/")[0])
        for role in build(CONFIG / "operator")
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    async with rigged(tmp_path, loads) as rig:
        await rig.start("1", "--storage-config", "densemesh/storage-config", lease=True)
        await rig.apply(isvc(name="untold", annotations={"serving.kserve.io/deploymentMode": ""}, finalizers=()))
        await rig.apply(fraud())
        await rig.ready()
        await rig.delete()
        await rig.becomes(lambda: not rig.has())
        await rig.stop()
        assert set(rig.api.calls) == granted
