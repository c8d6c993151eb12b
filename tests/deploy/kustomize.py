"""What `kubectl kustomize` builds of our files, for the tests: it knows what they use, and refuses anything else.

Authority: kubectl.docs.kubernetes.io/references/kustomize; the tests compare it with kubectl where there is one. Names
of generated ConfigMaps get no hash here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]

_KEYS = {"apiVersion", "kind", "resources", "components", "configMapGenerator", "patches"}


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization."""
    manifests: list[Manifest] = []
    _accumulate(folder, "Kustomization", manifests)
    return manifests


def manifests_in(file: Path) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(file.read_text()) if manifest is not None]


def identity(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def _accumulate(folder: Path, kind: str, manifests: list[Manifest]) -> None:
    """Add what a kustomization has; components see what was there before them."""
    (told,) = manifests_in(folder / "kustomization.yaml")
    assert told["kind"] == kind, folder
    assert told.keys() <= _KEYS, f"{folder}: {told.keys() - _KEYS}"
    for name in told.get("resources", ()):
        path = folder / name
        manifests += build(path) if path.is_dir() else manifests_in(path)
    for name in told.get("components", ()):
        _accumulate(folder / name, "Component", manifests)
    for generator in told.get("configMapGenerator", ()):
        _generate(generator, manifests)
    for patch in told.get("patches", ()):
        _patch(patch, manifests)
    names = [identity(manifest) for manifest in manifests]
    assert len(names) == len(set(names)), f"{folder}: the same name twice in {names}"


def _generate(generator: dict[str, Any], manifests: list[Manifest]) -> None:
    assert generator.keys() <= {"name", "namespace", "behavior", "options", "literals"}
    data = dict(literal.split("=", 1) for literal in generator["literals"])
    metadata = {"name": generator["name"], "namespace": generator["namespace"]}
    if generator.get("behavior") == "merge":
        (merged,) = [m for m in manifests if identity(m) == ("ConfigMap", metadata["namespace"], metadata["name"])]
        merged["data"].update(data)
    else:
        labels = generator["options"]["labels"]
        manifests.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata | {"labels": labels}, "data": data}
        )


def _patch(patch: dict[str, Any], manifests: list[Manifest]) -> None:
    """JSON patches (RFC 6902) of one manifest."""
    target = patch["target"]
    assert target.keys() == {"kind", "name"}
    (at,) = [
        index
        for index, manifest in enumerate(manifests)
        if (manifest["kind"], manifest["metadata"]["name"]) == (target["kind"], target["name"])
    ]
    operations = json.dumps(yaml.safe_load(patch["patch"]))
    manifests[at] = jsonpatch.apply_patch(manifests[at], operations)
