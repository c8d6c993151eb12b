"""Executors: model formats in, predictions out. Imports nothing of ours; frameworks are imported on first use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Final

from loaders.base import Loader, LoaderError


@dataclass(frozen=True, slots=True)
class Format:
    """One line of the table: where the loader lives and which files are its own."""

    loader: str
    """`module:class`, imported when the first such model is sized or loaded."""
    extensions: tuple[str, ...] = ()
    runs_code: tuple[str, ...] = ()
    """Extensions whose files can run code of their author; refused unless the operator allows the extension."""


LOADERS: Final[dict[str, Format]] = {
    "onnx": Format("loaders.onnx:OnnxLoader", (".onnx",)),
    "torch": Format("loaders.torch:TorchLoader", (".pt2", ".pt"), runs_code=(".pt2", ".pt")),
    "sklearn": Format("loaders.sklearn:SklearnLoader", (".skops", ".joblib", ".pkl"), runs_code=(".joblib", ".pkl")),
    "synthetic": Format("loaders.synthetic:SyntheticLoader", (".synthetic.json",)),
}


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
