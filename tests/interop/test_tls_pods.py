"""Pods whose traffic is TLS: among themselves, for tritonclient, for our own commands, and while certificates change.
Authority: issue 3; README, TLS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mesh.tls
from mesh.__main__ import cli
from mesh.frontends import FRONTENDS
from mesh.local_cluster import LocalPod
from mesh.tls import TlsFiles
from tests.mesh.certificates import Authority
from tests.mesh.pods import Loads, Mesh, running, until

TRITON_SCRIPT = Path(__file__).parents[1] / "mesh" / "triton_script.py"
NAME = "densemesh.models.svc"
"""What pods' certificates are for in Kubernetes, where their addresses are not known beforehand."""


def settings(files: TlsFiles) -> dict[str, str]:
    return {f"tls_{field}": getattr(files, field) for field in ("cert", "key", "client_ca", "ca", "name")}


@pytest.fixture(params=FRONTENDS)
def frontend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mounted(tmp_path: Path) -> Authority:
    """What pods have as files; a test may replace them."""
    return Authority(tmp_path / "mounted")


@pytest.fixture
async def two(frontend: str, mounted: Authority, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    """Two pods with mutual TLS."""
    monkeypatch.setattr(mesh.tls, "_RELOAD_S", 0.01)
    files = mounted.files(mutual=True, name=NAME)
    async with running("ab", loads, frontend=frontend, **settings(files)) as pods:
        await pods.register("m", load=True)
        await pods.seen_by_all("m", *pods.holders("m"))
        yield pods


async def test_pods_forward_over_tls(two: Mesh) -> None:
    assert {await two.infer("m", "a"), await two.infer("m", "b")} == set(two.holders("m"))
    assert sum(pod.engine.stats.forwards for pod in two.pods.values()) > 0


async def test_a_mounted_secret_that_is_replaced_is_used(
    two: Mesh, frontend: str, mounted: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Another authority: as hard as it gets."""
    caplog.set_level("INFO")
    served = {await two.infer("m", "a"), await two.infer("m", "b")}
    files = Authority(mounted.folder).files(mutual=True, name=NAME)
    await until(lambda: caplog.text.count("certificates have changed") == 2)
    assert {await two.infer("m", "a"), await two.infer("m", "b")} == served  # over open connections
    await two.start("c", None, frontend=frontend, **settings(files))
    await two.together()
    assert await two.infer("m", "c") in two.holders("m")


def test_tritonclient(secure_pod: LocalPod, authority: Authority) -> None:
    shown = authority.issue("client", name="client")
    command = [sys.executable, str(TRITON_SCRIPT), secure_pod.address, authority.ca, *shown]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["server"][:2] == [True, True]
    assert all(seen["datatypes"].values())
    assert seen["echo"]["right"]
    assert seen["many_at_once"] == 40
    assert seen["stream"][-1] == "ok 4"
    assert all(seen["large"])
    assert seen["on_asyncio"][:2] == [20, ["0", "1", "2"]]
    assert seen["errors"]["deadline"][0] == "StatusCode.DEADLINE_EXCEEDED"


def test_commands(secure_pod: LocalPod, authority: Authority, stranger: Authority) -> None:
    certificate, key = authority.issue("client", name="client")

    def status(*words: str, **variables: str) -> tuple[int, str]:
        command = ["status", "--target", secure_pod.address, "--timeout", "10", *words]
        done = CliRunner().invoke(cli, command, env=variables)
        return done.exit_code, done.output

    shown = ("--tls-cert", certificate, "--tls-key", key)
    code, said = status("--tls-ca", authority.ca, *shown)
    assert (code, "pod-1" in said) == (0, True), said
    of_the_pod = {"CERT": certificate, "KEY": key, "CLIENT_CA": authority.ca}
    assert status(**{f"DENSEMESH_TLS_{name}": value for name, value in of_the_pod.items()})[0] == 0
    refused = f"Error: UNAVAILABLE: {secure_pod.address}: "
    for words, says in (
        ((), "TLS or another certificate may be expected"),
        (("--tls",), "its certificate is not accepted: "),
        (("--tls-ca", authority.ca), "TLS or another certificate may be expected"),
        (("--tls-ca", stranger.ca, *shown), "its certificate is not accepted: "),
        (("--tls-ca", authority.ca, *shown, "--tls-name", "x"), "certificate is not valid for 'x'"),
    ):
        code, said = status(*words)
        assert (code, len(said.splitlines())) == (1, 1), said
        assert said.startswith(refused)
        assert says in said
    code, said = status("--tls-key", key)
    assert (code, said.splitlines()[-1]) == (2, "Error: --tls-key: expected --tls-cert with it")
