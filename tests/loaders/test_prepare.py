"""`loaders.prepare`: a real child and a real cache; whatever becomes of the child, the pod knows what to do."""

from __future__ import annotations

import logging
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loaders.base import Artifact, LoaderError
from loaders.prepare import FORMS, PREPARERS, Damaged, Preparer
from loaders.prepare.digests import Digests
from loaders.prepare.preparation import Outcome, Preparation
from tests.loaders.preparers import FORM, Copied

ROOT = Path(__file__).resolve().parent.parent.parent
TALKS = Preparer("tests.loaders.preparers:copy", FORM, ("numpy",), deadline_s=30)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparer for synthetic models, which have none of their own."""
    monkeypatch.setitem(PREPARERS, "synthetic", TALKS)
    monkeypatch.setitem(FORMS, FORM, "tests.loaders.preparers:CopiedLoader")


@pytest.fixture
def preparation(tmp_path: Path) -> Iterator[Preparation]:
    made = Preparation(tmp_path / "prepared", 1 << 20)
    made.start()
    yield made
    made.close()


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Artifact]:
    """Write one: `model(b"hang")`, see `tests.loaders.preparers`."""

    def write(content: bytes = b"model") -> Artifact:
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        return Artifact(path)

    return write


def jobs(artifact: Artifact) -> list[int]:
    """Processes that were given it, job by job."""
    told = artifact.path.with_name("jobs")
    return [int(pid) for pid in told.read_text().split()] if told.exists() else []


def ended(child: int) -> bool:
    """Whether the process of this file descriptor ends in good time."""
    poll = select.poll()
    poll.register(child, select.POLLIN)
    try:
        return bool(poll.poll(10_000))
    finally:
        os.close(child)


def test_a_form_is_made_once_and_found_by_content(
    tmp_path: Path, preparation: Preparation, model: Callable[..., Artifact], caplog: pytest.LogCaptureFixture
) -> None:
    artifact = model()
    assert preparation.find("synthetic", artifact) is None
    with caplog.at_level(logging.INFO, "loaders.prepare"):
        assert preparation.prepare("synthetic", artifact) is Outcome.PREPARED
    assert jobs(artifact) != [os.getpid()]
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(b"model")
    for path in (artifact.path, elsewhere):
        found = preparation.find("synthetic", Artifact(path))
        assert found is not None
        assert (found.form, found.estimate_bytes()) == (FORM, 5)
        assert isinstance(found.load(), Copied)
        found.close()
        assert preparation.prepare("synthetic", Artifact(path)) is Outcome.FOUND
    assert len(jobs(artifact)) == 1
    for other in (Artifact(artifact.path, {"x": 1}), model(b"other")):
        assert preparation.find("synthetic", other) is None


def test_what_matters_beside_the_bytes_makes_another_form(
    preparation: Preparation, model: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation.prepare("synthetic", artifact := model())
    # settings of ModelMesh's that no loader reads
    found = preparation.find("synthetic", Artifact(artifact.path, {"storage_key": "s"}))
    assert found is not None
    found.close()
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer(TALKS.function, FORM, ("numpy",), version=2))
    assert preparation.find("synthetic", artifact) is None
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer(TALKS.function, FORM, ("numpy", "click")))
    assert preparation.find("synthetic", artifact) is None


@pytest.mark.parametrize(
    "preparer",
    [Preparer(TALKS.function, FORM, ("no-such-package",)), Preparer(TALKS.function, FORM, ("numpy",), max_bytes=4)],
    ids=["not installed", "too large"],
)
def test_what_is_not_prepared_here_is_left_alone(
    preparation: Preparation, model: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, preparer: Preparer
) -> None:
    monkeypatch.setitem(PREPARERS, "synthetic", preparer)
    assert preparation.prepare("synthetic", model()) is None
    assert preparation.prepare("torch", model()) is None
    assert preparation.child.pid is None


def test_forms_and_refusals_are_kept_across_restarts_and_shared(tmp_path: Path, model: Callable[..., Artifact]) -> None:
    first, second = (Preparation(tmp_path / "prepared", 1 << 20) for _ in range(2))
    try:
        assert first.prepare("synthetic", model()) is Outcome.PREPARED
        assert first.prepare("synthetic", model(b"refuse")) is Outcome.REFUSED
        first.close()
        second.start()
        found = second.find("synthetic", model())
        assert found is not None
        found.close()
        assert second.find("synthetic", model(b"refuse")) is None
        assert second.prepare("synthetic", model(b"refuse")) is None
        assert len(jobs(model())) == 2
        assert second.child.pid is None
    finally:
        first.close()
        second.close()


def test_two_pods_make_a_form_once(tmp_path: Path, model: Callable[..., Artifact]) -> None:
    pods = [Preparation(tmp_path / "prepared", 1 << 20) for _ in range(2)]
    artifact, outcomes = model(), list[Outcome | None]()
    threads = [threading.Thread(target=lambda p=p: outcomes.append(p.prepare("synthetic", artifact))) for p in pods]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for pod in pods:
            pod.close()
    assert sorted(filter(None, outcomes)) == [Outcome.FOUND, Outcome.PREPARED]
    assert len(jobs(artifact)) == 1


def test_a_converters_own_error_is_a_refusal(
    preparation: Preparation, model: Callable[..., Artifact], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loaders.prepare"):
        assert preparation.prepare("synthetic", model(b"break")) is Outcome.REFUSED
        assert preparation.prepare("synthetic", model()) is Outcome.PREPARED  # by the same child
    assert "is served as it is: ValueError: no such operator" in caplog.text
    assert len(set(jobs(model()))) == 1


@pytest.mark.parametrize(
    ("content", "says"), [(b"die", "ended by signal 9"), (b"hang", "not done after 2 s"), (b"swell", "MemoryError")]
)
def test_a_child_that_dies_hangs_or_swells_costs_one_job(
    preparation: Preparation,
    model: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
    says: str,
) -> None:
    monkeypatch.setitem(PREPARERS, "synthetic", Preparer(TALKS.function, FORM, ("numpy",), deadline_s=2))
    assert preparation.prepare("synthetic", model(content)) is Outcome.FAILED
    assert says in caplog.text
    assert preparation.prepare("synthetic", model(content)) is None  # not again in this pod's life
    assert preparation.find("synthetic", model(content)) is None
    assert not list(preparation._open().root.glob("*.partial"))
    monkeypatch.setitem(PREPARERS, "synthetic", TALKS)
    assert preparation.prepare("synthetic", good := model()) is Outcome.PREPARED
    assert len(jobs(good)) == 2


def test_a_damaged_form_is_made_once_more(preparation: Preparation, model: Callable[..., Artifact]) -> None:
    artifact = model(b"damaged")
    for outcome in (Outcome.PREPARED, Outcome.PREPARED, None):
        assert preparation.prepare("synthetic", artifact) is outcome
        found = preparation.find("synthetic", artifact)
        assert (found is None) == (outcome is None)
        if found is not None:
            with pytest.raises(Damaged):
                found.load()
            found.close()
            preparation.drop("synthetic", artifact, "it is damaged")


def test_the_child_has_the_lowest_priority_and_ends_with_the_pod(
    preparation: Preparation, model: Callable[..., Artifact]
) -> None:
    preparation.prepare("synthetic", artifact := model(b"polite"))
    assert artifact.path.with_name("nice").read_text() == "19"
    pid = preparation.child.pid
    assert pid is not None
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    child = os.pidfd_open(pid)
    preparation.stop()
    assert ended(child)
    assert preparation.prepare("synthetic", model(b"late")) is Outcome.FAILED


def test_a_child_whose_parent_is_killed_ends_in_the_middle_of_a_job(
    tmp_path: Path, model: Callable[..., Artifact]
) -> None:
    script = """
import sys
from pathlib import Path
from loaders.base import Artifact
from loaders.prepare import FORMS, PREPARERS, Preparer
from loaders.prepare.preparation import Preparation
PREPARERS["synthetic"] = Preparer("tests.loaders.preparers:copy", "copied", ("numpy",))
Preparation(Path(sys.argv[1]), 1 << 20).prepare("synthetic", Artifact(Path(sys.argv[2])))
"""
    artifact = model(b"hang")
    told = [str(tmp_path / "prepared"), str(artifact.path)]
    pod = subprocess.Popen([sys.executable, "-c", script, *told], cwd=ROOT)
    while not jobs(artifact):
        assert pod.poll() is None
        threading.Event().wait(0.01)
    (pid,) = jobs(artifact)
    child = os.pidfd_open(pid)
    pod.kill()
    pod.wait()
    assert ended(child)


def test_a_model_that_cannot_be_read_is_told(preparation: Preparation, model: Callable[..., Artifact]) -> None:
    artifact = model()
    artifact.path.unlink()
    for ask in (preparation.find, preparation.prepare):
        with pytest.raises(LoaderError, match="No such file") as refusal:
            ask("synthetic", artifact)
        assert refusal.value.retryable


def test_digests_are_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = Digests()
    for folder, name in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / name).write_bytes(b"1")
    a, b, c = (digests.of(tmp_path / folder) for folder in "abc")
    assert a == b != c
    read: list[Any] = []
    monkeypatch.setattr("loaders.prepare.digests.hashlib.file_digest", lambda *_: read.append(1))
    assert digests.of(tmp_path / "a") == a
    assert not read
    monkeypatch.undo()
    path = tmp_path / "a" / "deep" / "x"
    before = path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of(tmp_path / "a") != a


def test_a_large_model_of_unknown_content_is_not_read_while_somebody_waits(
    preparation: Preparation, model: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = model()
    assert preparation.prepare("synthetic", artifact) is Outcome.PREPARED
    monkeypatch.setitem(PREPARERS, "synthetic", replace(TALKS, read_bytes=1))
    other = Artifact(Path(shutil.copy(artifact.path, artifact.path.with_name("other"))))
    assert preparation.find("synthetic", other) is None
    assert preparation.prepare("synthetic", other) is Outcome.FOUND  # in the background
    found = preparation.find("synthetic", other)
    assert found is not None
    found.close()
