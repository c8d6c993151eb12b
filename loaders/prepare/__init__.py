"""Preparation: forms of models that serve better than what their owners wrote, made off the request path.

A model is loaded as it is at first. Then one child process of low priority converts or optimises it, because converters
hold the interpreter lock for seconds and may crash; the result is kept on disk under a digest of the model's bytes, and
every later load of the same bytes, by any pod on the node, takes it and does not import the model's framework.

    PREPARERS     format -> what makes its form, in the child            sklearn, and what it needs: probes, trees
    WRAPPERS      format -> what tells which of these is in it
    FORMS         form -> its loader, in the pod                         converted
    preparation   what is there, and what is to be made                  digests: files by content
    child         the process, seen from the pod                         __main__: the process
    trust         when a conversion may take a model's place
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from loaders.base import Artifact, Loader, LoaderError


class NotPreparable(Exception):
    """A preparer's refusal: these bytes will not do, now or later. The message is one sentence."""


class Damaged(LoaderError):
    """The files of a form are not what a preparer wrote."""


@dataclass(frozen=True, slots=True)
class Preparer:
    """One line of the table: what makes a format's form, and what its result depends on beside the model's bytes."""

    function: str
    """`module:function`, called in the child as `function(artifact, folder)`: writes the form's files into the empty
    folder, or raises `NotPreparable`. The artifact has parameters and no declared inputs and outputs."""
    form: str
    packages: tuple[str, ...]
    """Distributions that it needs; their versions are part of the digest."""
    version: int = 1
    """Its own: a change makes everything anew."""
    deadline_s: float = 120.0
    max_bytes: int = 512 << 20
    """Models with more bytes are served as they are."""
    read_bytes: int = 1 << 40
    """Models with more bytes, of content that is not known yet, are loaded as they are sooner than they are read."""


PREPARERS: Final[dict[str, Preparer]] = {
    "onnx": Preparer(
        "loaders.fleet.split:split", "shared", ("onnxruntime", "onnx"), max_bytes=1 << 30, read_bytes=16 << 20
    ),
    "lightgbm": Preparer(
        "loaders.prepare.boosted:prepare_lightgbm", "converted", ("lightgbm", "onnx"), max_bytes=64 << 20
    ),
    "xgboost": Preparer(
        "loaders.prepare.boosted:prepare_xgboost",
        "converted",
        ("xgboost-cpu", "onnx", "onnxruntime"),
        max_bytes=64 << 20,
    ),
    "sklearn": Preparer(
        "loaders.prepare.sklearn:prepare", "converted", ("scikit-learn", "onnx", "onnxruntime", "skl2onnx")
    ),
}

WRAPPERS: Final[dict[str, str]] = {"mlflow": "loaders.mlflow:inner"}
"""Format whose models may be another's in a directory -> what tells which, called as `function(artifact)`."""

FORMS: Final[dict[str, str]] = {
    "converted": "loaders.prepare.converted:ConvertedLoader",
    "shared": "loaders.fleet.model:SharedLoader",
}
"""`module:class` of a `Loader` whose artifact's path is the folder that a preparer filled."""


@cache
def form_loader(form: str) -> Loader:
    """The loader of a form, kept for the life of the process."""
    loader: Loader = named(FORMS[form])()
    return loader


def unwrapped(format_name: str, artifact: Artifact) -> tuple[str, Artifact]:
    """The format and the artifact that are to be prepared.

    Raises:
        LoaderError: from the format's wrapper.
    """
    inner: tuple[str, Artifact] | None = None
    if format_name in WRAPPERS:
        inner = named(WRAPPERS[format_name])(artifact)
    return inner or (format_name, artifact)


def named(path: str) -> Any:
    """What `module:name` means."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
