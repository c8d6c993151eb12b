"""The Dockerfiles, as far as they can be read: what they copy is there, what they install exists, who they run as."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "operator" / "Dockerfile"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Dockerfile reference, Format: `INSTRUCTION arguments`, lines joined by a backslash."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in text.splitlines()) if word]


@pytest.mark.parametrize("file", DOCKERFILES, ids=str)
def test_dockerfile(file: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    found = instructions(file)
    for source in [
        source
        for word, rest in found
        if word == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored
    told = re.findall(r"EXTRAS=([a-z,]+)", file.read_text())
    assert told
    for names in told:
        assert set(names.split(",")) <= extras.keys()
        assert not ("gpu" in names and {"onnx", "convert"} & set(names.split(",")))  # they overwrite each other's files
    assert [rest for word, rest in found if word == "USER"] == ["10001:10001"]
    (entry,) = [rest for word, rest in found if word == "ENTRYPOINT"]
    assert entry.strip('[]"') in scripts
    assert {rest.split(" AS ")[0] for word, rest in found if word == "FROM"} == {"python:${PYTHON}-slim"}
