"""Executors: model formats in, predictions out. Imports nothing of ours; frameworks are imported on first use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

from loaders.base import Loader, LoaderError


@dataclass(frozen=True, slots=True)
class Format:
    """One line of the table: where the loader lives and which files are its own."""

    loader: str
    """`module:class`, imported when the first such model is sized or loaded."""
    extensions: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    """Files that make the directory they lie in one model, e.g. `MLmodel`."""
    runs_code: Mapping[str, str] = field(default_factory=dict)
    """By extension or marker of what can run code of its author: what `--allow-code` must name for it to be loaded."""
    may_run: str = ""
    """The same where a name does not tell: the loader looks into it, and refuses what `Artifact.allowed_code` lacks."""
    begins: bytes = b""
    """A regular expression that a file's first bytes match, where names alone do not tell: others have `.json` too."""

    def name_in(self, path: Path) -> str:
        """The extension or marker by which a file or directory is of this format; empty: it is not.

        Raises:
            OSError: it cannot be looked into.
        """
        if path.is_dir():
            return next((marker for marker in self.markers if (path / marker).is_file()), "")
        name = next((extension for extension in self.extensions if path.name.endswith(extension)), "")
        return name if not (name and self.begins) or re.match(self.begins, _head(path)) else ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


LOADERS: Final[dict[str, Format]] = {
    "onnx": Format("loaders.onnx:OnnxLoader", (".onnx",)),
    "torch": Format(
        "loaders.torch:TorchLoader", (".pt2", ".pt"), runs_code={".pt2": "pt2", ".pt": "pt"}, may_run="aoti"
    ),
    "sklearn": Format(
        "loaders.sklearn:SklearnLoader",
        (".skops", ".joblib", ".pkl"),
        runs_code={".joblib": "joblib", ".pkl": "pkl"},
    ),
    "mlflow": Format("loaders.mlflow:MlflowLoader", markers=("MLmodel",), may_run="mlflow"),
    "python": Format("loaders.python:PythonLoader", markers=("model.py",), runs_code={"model.py": "python"}),
    "xgboost": Format(
        "loaders.xgboost:XgboostLoader",
        (".ubj", ".json", ".bst"),
        begins=rb'\{(?:\s*"|L\0{7}\x07)(?:learner|version"\s*:\s*\[)',
    ),
    "openvino": Format("loaders.openvino:OpenvinoLoader", (".xml",), begins=rb"(?:<\?xml[^>]*>\s*)?<net "),
    "lightgbm": Format("loaders.lightgbm:LightgbmLoader", (".txt", ".bst"), begins=rb"tree\r?\n"),
    "safetensors": Format(
        "loaders.safetensors:SafetensorsLoader",
        (".safetensors",),
        markers=("architecture.json", "skeleton.pt2"),
        may_run="pt2",
    ),
    "huggingface": Format(
        "loaders.huggingface:HuggingfaceLoader",
        markers=("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        runs_code={"pytorch_model.bin": "bin"},
    ),
    "tensorflow": Format(
        "loaders.tensorflow:TensorflowLoader",
        markers=("saved_model.pb",),
        runs_code={"saved_model.pb": "tensorflow"},
    ),
    "keras": Format("loaders.keras:KerasLoader", (".keras",), runs_code={".keras": "keras"}),
    "synthetic": Format("loaders.synthetic:SyntheticLoader", (".synthetic.json",)),
}

ALIASES: Final[dict[str, str]] = {"pytorch": "torch", "torchscript": "torch", "openvino_ir": "openvino"}
"""Other names that KServe's and ModelMesh's runtimes have for our formats (`supportedModelFormats`)."""


def recognised(path: Path) -> str:
    """The format of a file or directory by its name, or by what lies in it; empty: none of ours.

    Raises:
        OSError: it cannot be looked into.
    """
    return next((name for name, entry in LOADERS.items() if entry.name_in(path)), "")


def canonical(format_name: str) -> str:
    """Our name of a format that may go by another."""
    return ALIASES.get(format_name, format_name)


def format_for(format_name: str) -> Format:
    """The table's line for a format.

    Raises:
        LoaderError: unknown format.
    """
    try:
        return LOADERS[format_name]
    except KeyError:
        expected = ", ".join(sorted(LOADERS))
        raise LoaderError(f"unknown model format {format_name!r}: expected one of {expected}") from None


@cache
def loader_for(format_name: str) -> Loader:
    """The loader of a format, kept for the life of the process.

    Raises:
        LoaderError: unknown format, or its framework is not installed (the message carries the install line).
    """
    module, _, name = format_for(format_name).loader.partition(":")
    loader: Loader = getattr(import_module(module), name)()
    return loader
