"""`densemesh register`, `status` and their like against a pod process. Authority: issue 2, "What a user gets": over the
management API of any pod, a table by default and `--output json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.local_cluster import LocalPod

TIMEOUT_S = 60.0

Command = Callable[..., subprocess.CompletedProcess[str]]


def densemesh(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mesh", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **variables}
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no models")


@pytest.fixture
def run(pod: LocalPod) -> Command:
    """A command on the module's pod."""
    return lambda *words: densemesh(*words, DENSEMESH_TARGET=pod.address)


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_a_models_life(run: Command) -> None:
    assert run("status", "m").returncode == 1
    done = run("register", "m", "synthetic", "--format", "synthetic")
    assert (done.returncode, done.stdout) == (0, "m  NOT_LOADED\n")
    again = told(run("register", "m", "synthetic", "--format", "synthetic", "--load-now", "--wait", "--output", "json"))
    assert again["status"] == "LOADED"
    assert [(copy["location"], copy["copyStatus"]) for copy in again["modelCopyInfos"]] == [("pod-1", "LOADED")]
    assert run("status", "m").stdout.startswith("m  LOADED\npod-1 LOADED since 20")
    assert told(run("ensure-loaded", "m", "--output", "json"))["status"] == "LOADED"
    done = run("unregister", "m")
    assert (done.returncode, done.stdout) == (0, "m  removed\n")
    done = run("status", "m")
    assert (done.returncode, done.stdout) == (1, "m  NOT_FOUND\n")


def test_a_path_may_be_relative_to_where_the_command_runs(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.synthetic.json").write_text('{"size_bytes": 1000}')
    monkeypatch.chdir(tmp_path)
    done = run("register", "relative", "m.synthetic.json", "--format", "synthetic", "--wait")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "relative  LOADED")


def test_memory_as_a_table_and_as_json(run: Command) -> None:
    told(run("register", "large", "synthetic", "--format", "synthetic", "--wait", "--output", "json"))
    done = run("status", "--memory")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["TIER", "CAPACITY", "PROMISED", "LOADING", "LOADED", "UNLOADING", "FREE", "SHARED"]
    assert lines[1][:3] == ["memory", "256.0", "MiB"]
    assert ["large", "-", "memory", "loaded", "1.0", "MiB", "1.0", "MiB"] in lines
    state = told(run("status", "large", "--memory", "--output", "json"))
    assert [(model["model_id"], model["tier"], model["size_bytes"]) for model in state["models"]] == [
        ("large", "memory", str(1 << 20))
    ]
    memory, disk = state["tiers"]
    assert int(memory["free_bytes"]) + int(memory["loaded_bytes"]) == int(memory["capacity_bytes"]) == 256 << 20
    assert disk["name"] == "disk"


def test_the_mesh_as_a_table_and_as_json(run: Command) -> None:
    told(run("register", "shown", "synthetic", "--format", "synthetic", "--wait", "--output", "json"))
    table = run("status").stdout
    assert "POD" in table
    assert "256.0 MiB" in table
    assert "shown" in table
    state = told(run("status", "--output", "json"))
    assert [pod["pod_id"] for pod in state["pods"]] == ["pod-1"]
    assert "shown" in [model["model_id"] for model in state["models"]]


def test_why_a_model_is_where_it_is(run: Command) -> None:
    placement = ["--placement", '{"min_copies": 2, "requires": {"gpu": "h200"}}']
    done = run("register", "picky", "synthetic", "--format", "synthetic", *placement)
    assert done.stdout == "picky  NOT_LOADED\nno pod has the labels gpu=h200, which it requires\n"
    lines = run("explain", "picky").stdout.splitlines()
    assert lines[:4] == [
        "picky  as pod pod-1 sees it",
        "size not measured yet, min_copies 2, requires gpu=h200, priority normal",
        "not loaded: no pod has the labels gpu=h200, which it requires",
        "2 more copies are to be kept (min_copies 2); 0 pods can load one",
    ]
    assert lines[4].split() == ["POD", "CAN", "LOAD", *_HEADINGS, "WHY"]
    assert lines[5].split(maxsplit=2) == ["pod-1", "no", "has no label gpu=h200"]
    assert (
        run("register", "picky", "synthetic", "--format", "synthetic", "--placement", '{"slo_ms": 9}').returncode == 0
    )
    found = told(run("explain", "picky", "--output", "json"))
    assert found["reasons"] == ["not loaded: the next request for it has it loaded on the first of these pods"]
    assert found["placement"] == {"priority": "normal", "slo_ms": 9}
    (pod,) = found["pods"]
    assert pod["can_load"]
    assert sum(pod["parts_ms"].values()) == pytest.approx(pod["total_ms"])
    done = run("explain", "nobody")
    assert (done.returncode, "NOT_FOUND" in done.stderr) == (1, True)
    run("unregister", "picky")


_HEADINGS = [word for part in ("QUEUE", "LOAD", "EVICT", "SPREAD", "BALANCE", "TOTAL") for word in (part, "MS")]


def test_a_load_that_fails_is_the_commands_failure(run: Command) -> None:
    key = '{"parameters":{"fail":"torn"}}'
    done = run("register", "torn", "synthetic", "--format", "synthetic", "--key", key, "--wait")
    assert done.returncode == 1
    assert "torn  LOADING_FAILED" in done.stdout
    assert "cannot be loaded" in done.stdout
    assert run("ensure-loaded", "torn").returncode == 1


def test_vmodels(run: Command) -> None:
    options = ("--uri", "synthetic", "--format", "synthetic", "--auto-delete", "--owner", "o", "--load-now", "--wait")
    first = told(run("vmodel", "set", "v", "v1", *options, "--output", "json"))
    assert (first["status"], first["activeModelId"], first["owner"]) == ("DEFINED", "v1", "o")
    assert first["activeModelStatus"]["status"] == "LOADED"
    done = run("vmodel", "set", "v", "v2", *options, "--expected-target", "v1")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["v  DEFINED", "active v2  LOADED"])
    assert run("vmodel", "get", "v").stdout.startswith("v  DEFINED")
    assert run("vmodel", "delete", "v", "--owner", "o").returncode == 0
    assert run("vmodel", "get", "v").returncode == 1
    assert run("status", "v2").stdout == "v2  NOT_FOUND\n"


def test_a_canarys_life(run: Command) -> None:
    options = ("--uri", "synthetic", "--format", "synthetic", "--auto-delete", "--load-now", "--wait")
    assert run("vmodel", "set", "c", "c1", *options).returncode == 0
    done = run("vmodel", "set", "c", "c2", *options, "--canary", "10")
    shown = ["c  TRANSITIONING", "active c1  LOADED", "target c2  LOADED  canary 10 %"]
    assert (done.returncode, done.stdout.splitlines()) == (0, shown)
    assert told(run("vmodel", "get", "c", "--output", "json"))["canary_percent"] == 10
    done = run("vmodel", "rollback", "c")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["c  DEFINED", "active c1  LOADED"])
    assert run("vmodel", "set", "c", "c3", *options, "--canary", "0").stdout.endswith("canary 0 %\n")
    done = run("vmodel", "promote", "c", "--wait")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["c  DEFINED", "active c3  LOADED"])
    assert run("vmodel", "promote", "c").returncode == 0, "there is nothing to do"
    assert run("vmodel", "delete", "c").returncode == 0
    for command in ("promote", "rollback"):
        done = run("vmodel", command, "c")
        assert (done.returncode, done.stdout) == (1, "c  NOT_FOUND\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["register", "x", "/m", "--format", "gguf"], "INVALID_ARGUMENT: modelInfo.type 'gguf': expected one of"),
        (["register", "x", "/m", "--format", "onnx", "--key", "{"], "INVALID_ARGUMENT: modelInfo.key is not JSON"),
        (["ensure-loaded", "nobody"], "NOT_FOUND: model 'nobody' is not registered"),
        (["vmodel", "set", "w", "nobody"], "NOT_FOUND: targetModelId 'nobody' is not registered"),
    ],
)
def test_what_the_pod_refuses_is_one_sentence(run: Command, words: list[str], says: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"densemesh: {says}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["register", "x"], "Missing argument 'URI'"),
        (["register", "x", "/m"], "Missing option '--format'"),
        (["vmodel", "set", "v", "m", "--uri", "/m"], "--uri and --format: expected both or neither"),
        (["register", "x", "/m", "--format", "onnx", "--placement", "[1]"], "--placement: expected a JSON object"),
        (["status", "--output", "yaml"], "'yaml' is not one of"),
        (["status", "--timeout", "0"], "0.0 is not in the range"),
    ],
)
def test_wrong_usage_is_one_sentence(words: list[str], says: str) -> None:
    done = densemesh(*words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line


@pytest.mark.parametrize("target", ["127.0.0.1:1", "nonsense", ""])
def test_a_target_that_is_not_there(target: str) -> None:
    done = densemesh("status", "--target", target, "--timeout", "10")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("densemesh: UNAVAILABLE: ")
