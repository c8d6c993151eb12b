"""What the repository promises about itself."""

from __future__ import annotations

import operator
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from loaders import LOADERS
from mesh.registry import REGISTRIES
from placement.policies import POLICIES

ROOT = Path(__file__).resolve().parent.parent

OURS = {"mesh", "placement", "loaders", "protos", "mesh_operator"}


def _modules(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def test_operator_is_still_the_standard_librarys() -> None:
    """`operator/` without `__init__.py` must not shadow it, not even for a Python started at the root."""
    assert operator.itemgetter(1)([1, 2]) == 2
    assert not (ROOT / "operator" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "import operator; operator.itemgetter(0)"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("folder", "table", "helpers"),
    [
        (
            "loaders",
            {entry.loader.partition(":")[0].rpartition(".")[2] for entry in LOADERS.values()},
            {
                "artifacts",
                "base",
                "columns",
                "datatypes",
                "matrix",
                "onnx_file",
                "onnx_parted",
                "onnx_session",
                "sharing",
                "sizing",
                "sklearn_rows",
                "taking_turns",
                "torch_tensors",
                "tree_files",
                "ubjson",
            },
        ),
        ("placement/policies", set(POLICIES), {"base", "ordered", "ghosts"}),
        (
            "mesh/registry",
            {module.rpartition(".")[2] for module in REGISTRIES.values()},
            {"base", "etcd_client", "etcd_endpoint"},
        ),
    ],
)
def test_tables_and_folders_agree(folder: str, table: set[str], helpers: set[str]) -> None:
    """A strategy, loader or registry is one file and one line of its table."""
    assert _modules(folder) == table | helpers


def test_no_other_distribution_provides_our_names() -> None:
    """Flat package names are generic; a clash in site-packages must not go unnoticed."""
    for name, distributions in metadata.packages_distributions().items():
        if name in OURS:
            assert {d.lower() for d in distributions} == {"densemesh"}, name


def test_both_onnxruntimes_are_not_installed_together() -> None:
    """They share one import name: whichever was installed last wins, and removing one destroys the other."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    assert not {"onnxruntime", "onnxruntime-gpu"} <= installed
