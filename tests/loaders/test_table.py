"""The table of formats: every line leads to a loader, and no framework is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loaders import LOADERS, format_for, loader_for
from loaders.base import LoaderError

FRAMEWORKS = {
    "onnx": "onnxruntime",
    "torch": "torch",
    "sklearn": "sklearn",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "openvino": "openvino",
    "safetensors": "torch",
    "tensorflow": "tensorflow",
    "keras": "keras",
    "huggingface": "torch",
    "mlflow": "yaml",
}


@pytest.mark.parametrize("format_name", LOADERS)
def test_every_format_has_a_loader(format_name: str) -> None:
    entry = format_for(format_name)
    assert set(entry.runs_code) <= {*entry.extensions, *entry.markers}
    try:
        loader = loader_for(format_name)
    except LoaderError as missing:  # an optional package
        pytest.skip(str(missing))
    assert loader_for(format_name) is loader


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(LoaderError, match=r"unknown model format 'tf': expected one of .*onnx, .*synthetic, .*torch"):
        loader_for("tf")


def test_frameworks_are_imported_late_and_their_absence_tells_what_to_install() -> None:
    script = f"""
import sys
import loaders, loaders.artifacts, loaders.memory.process
frameworks = {FRAMEWORKS!r}
assert not set(frameworks.values()) & set(sys.modules)
for name, package in frameworks.items():
    sys.modules[package] = None
    try:
        loaders.loader_for(name)
    except loaders.LoaderError as error:
        assert str(error) == f"{{package}} is not installed: pip install 'densemesh[{{name}}]'", error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
