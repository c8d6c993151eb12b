"""Triton's names for what a model is: in `config.pbtxt` its platform or backend, else the names of its files.

Source: Triton, "Model Repository" (model files) and "Model Configuration" (name, platform and backend).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from loaders import LOADERS, recognised
from mesh.declared import read_inside

FORMATS: Final = {
    "onnxruntime_onnx": "onnx",
    "onnxruntime": "onnx",
    "pytorch_libtorch": "torch",
    "pytorch": "torch",
    "tensorflow_savedmodel": "tensorflow",
    "tensorflow_graphdef": "tensorflow",
    "tensorrt_plan": "tensorrt",
    "fil": "",  # XGBoost's and LightGBM's: the file tells
}
"""Our names for platforms and backends that have other ones; empty: several share it."""
_FILES: Final = {
    "model.savedmodel": "tensorflow",
    "model.graphdef": "tensorflow",
    "model.plan": "tensorrt",
    "model.xml": "openvino",
}
"""Default names of models that are of a format of ours only if that is in `LOADERS`."""
_PYTHON_BACKEND: Final = "triton_python_backend_utils"


def format_said(platform: str, home: Path, directory: Path, served: Collection[str]) -> str:
    """The format of a model by what its configuration says, or by the names in its version's folder, which is in
    the model's directory; empty: they do not tell. `served` are formats that the pod's model server has.

    Raises:
        ValueError: nothing here can run it; one sentence.
        OSError: the folder cannot be read.
    """
    shown, found = platform, FORMATS.get(platform, platform)
    if not platform and not any(map(recognised, home.iterdir())):
        shown = next((name for name in _FILES if (home / name).exists()), "")
        found = _FILES.get(shown, "")
    script = home / "model.py"
    is_script = found in ("", "python") and script.is_file()
    if is_script and _PYTHON_BACKEND in read_inside(script, directory):
        shown, found = "Triton's Python backend", "python"
    if found in served or not found:
        return found
    if found not in LOADERS or shown != platform:
        raise ValueError(f"{shown} models need a model server: --runtime-formats {found}")
    return found
