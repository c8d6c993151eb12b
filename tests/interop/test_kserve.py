"""The KServe SDK's InferenceGRPCClient. It excludes our pins (psutil must be below 6) and brings fifty packages, so it
runs in an environment of its own: `python -m venv K && K/bin/pip install kserve`, then KSERVE_PYTHON=K/bin/python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mesh.local_cluster import LocalPod
from tests.mesh.certificates import Authority
from tests.mesh.frontends import TIMEOUT_S

SCRIPT = str(Path(__file__).with_name("kserve_script.py"))
PYTHON = os.environ.get("KSERVE_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="KSERVE_PYTHON names no Python that has kserve, which excludes our pins"
)


def see(*arguments: str) -> None:
    done = subprocess.run(
        (PYTHON, SCRIPT, *arguments), check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env={}, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "live": True,
        "ready": [True, True],
        "same": True,
        "error": ["NOT_FOUND", "model 'nobody' is not registered"],
    }


def test_plain(pod: LocalPod) -> None:
    see(pod.address)


def test_mutual_tls(secure_pod: LocalPod, authority: Authority) -> None:
    see(secure_pod.address, authority.ca, *authority.issue("client", name="client"))
