"""What a model's owner said, checked once for all loaders: where the files are, which settings, which signature."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from loaders import Format, format_for, recognised
from loaders.base import Artifact, LoaderError, Signature, TensorSpec

_NOT_OURS: Final = frozenset(
    {
        "storage_key",
        "storage_params",
        "model_type",
        "schema_path",
        "disk_size_bytes",
        "version",
        "default_model_filename",
    }
)
"""Names that come with ModelMesh's `key` JSON or are used before a loader sees it; loaders ignore them."""


_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
"""Triton ignores directories that are not numbers or begin with 0."""


def resolve(
    format_name: str,
    uri: str,
    *,
    allowed_code: frozenset[str],
    default_model_filename: str = "",
    versions: Collection[int] = (),
) -> Path:
    """The model that `uri` means: an absolute path or `file://` URI of a file, of a directory that is one, or of a
    directory that holds one.

    A directory with one of the format's markers is the model. In another, or in that of its newest version (of
    `versions`, if any are given), it is `default_model_filename` if given, else `model.<ext>` in the format's order of
    extensions, else the only one of the format. Synthetic models need no file: an empty `uri` is enough. `allowed_code`
    holds names of `Format.runs_code`.

    Raises:
        LoaderError: no such file (retryable), not one model, another format's, or code that is not allowed.
    """
    entry = format_for(format_name)
    if format_name == "synthetic" and uri in ("", "synthetic"):
        return Path("synthetic")
    path = local_path(uri)
    try:
        if path.is_dir() and not entry.name_in(path):
            path = newest_version(path, versions)
            path = path if entry.name_in(path) else _model_in(path, entry, default_model_filename)
        if not path.exists():
            raise LoaderError(f"{path} does not exist or is not a file", retryable=True)
        name = entry.name_in(path)
    except OSError as error:
        raise LoaderError(f"{path} cannot be read: {error.strerror}", retryable=True) from error
    if not name:
        raise LoaderError(f"{path.name} is no {format_name} model: {_instead(path, entry)}")
    if (code := entry.runs_code.get(name, "")) and code not in allowed_code:
        flag = f"--allow-code {code}"
        raise LoaderError(f"{path.name} can run its author's code when loaded: refused without {flag}")
    return path


@contextmanager
def reading(path: Path, archive: str = "an archive") -> Iterator[None]:
    """What goes wrong while a model's file is read, in its owner's words; `archive`: what a zip file should have been.

    Raises:
        LoaderError: retryable if the file may be there, or readable, later.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise LoaderError(f"{error.filename or path} does not exist", retryable=True) from error
    except OSError as error:
        raise LoaderError(f"{path} cannot be read: {error.strerror}", retryable=True) from error
    except zipfile.BadZipFile as error:
        raise LoaderError(f"{path.name} is not {archive}: {error}") from error


def local_path(uri: str) -> Path:
    """An absolute path, or a `file://` URI of one.

    Raises:
        LoaderError: it is neither.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        raise LoaderError(f"storage scheme {parts.scheme!r} is not supported: expected a path or file://")
    if parts.scheme and parts.netloc not in ("", "localhost"):
        raise LoaderError(f"{uri!r} names the host {parts.netloc!r}: expected file:///absolute/path")
    path = Path(unquote(parts.path) if parts.scheme else uri)
    if not path.is_absolute() or "\0" in str(path):
        raise LoaderError(f"model path {uri!r} is not absolute: expected /path or file:///path")
    return path


def newest_version(directory: Path, versions: Collection[int] = ()) -> Path:
    """The directory of a model's highest version (of `versions`, if any are given), as Triton and TensorFlow Serving
    have them; the model's own if there is none.

    Raises:
        OSError: it cannot be read.
    """
    names = [path.name for path in directory.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir()]
    found = [int(name) for name in names if not versions or int(name) in versions]
    return directory / str(max(found)) if found else directory


def unfolded(path: Path) -> Path:
    """The model itself, where files that belong to it lie in a directory of its name: `model.onnx/model.onnx`."""
    inner = path / f"model{path.suffix}"
    return inner if path.suffix and path.is_dir() and inner.is_file() else path


def _model_in(folder: Path, entry: Format, default: str) -> Path:
    if default:
        if Path(default).name != default:
            raise LoaderError(f"default_model_filename {default!r} must be a file name without folders")
        return unfolded(folder / default)
    for extension in entry.extensions:
        if (model := unfolded(folder / f"model{extension}")).is_file():
            return model
    models = [unfolded(path) for path in folder.iterdir() if not path.name.startswith(".")]
    found = sorted(str(path.relative_to(folder)) for path in models if entry.name_in(path))
    if len(found) == 1:
        return folder / found[0]
    if not found:
        raise LoaderError(f"{folder} holds no {_expected(entry)}", retryable=True)
    usual = " or ".join(f"model{extension}" for extension in entry.extensions)
    raise LoaderError(f"{folder} holds several models ({', '.join(found[:8])}): expected one, or {usual}")


def _instead(path: Path, entry: Format) -> str:
    if other := recognised(path):
        return f"it seems to be {other}"
    if path.name.endswith(entry.extensions):
        return "it does not begin as one"
    return f"expected {_expected(entry)}"


def _expected(entry: Format) -> str:
    files = [f"{' or '.join(entry.extensions)} file"] if entry.extensions else []
    return " or ".join([*files, *(f"directory with {marker}" for marker in entry.markers)])


def own_parameters(artifact: Artifact) -> dict[str, Any]:
    """The artifact's parameters that are the loader's own."""
    return {name: value for name, value in artifact.parameters.items() if name not in _NOT_OURS}


def parameters(artifact: Artifact, format_name: str, *accepted: str) -> dict[str, Any]:
    """`own_parameters`, checked; a missing one is missing here too.

    Raises:
        LoaderError: a name that is neither accepted nor one of ModelMesh's.
    """
    own = own_parameters(artifact)
    for name in own:
        if name not in accepted:
            expected = ", ".join(accepted) or "none"
            raise LoaderError(f"unknown parameter {name!r}: {format_name} models take {expected}")
    return own


def agreed(own: Signature, artifact: Artifact) -> Signature:
    """The model's own signature, narrowed by the one declared beside it, in the model's order.

    A declared size narrows an unknown one; declaring fewer outputs hides the others. An input or output of rank 0 takes
    the declared shape: ONNX Runtime tells unknown rank that way. Of a lenient model only the names of outputs count.

    Raises:
        LoaderError: they contradict each other; the message has both.
    """
    if own.lenient:
        if len(artifact.inputs) > 1 and {spec.name for spec in artifact.inputs} != {spec.name for spec in own.inputs}:
            takes = _told(own.inputs) if len(own.inputs) > 1 else "one input"
            raise LoaderError(f"the model takes {takes}, but {_told(artifact.inputs)} are declared")
        names = {spec.name for spec in artifact.outputs or own.outputs}
        outputs = tuple(spec for spec in own.outputs if spec.name in names)
        if len(outputs) != len(names):
            raise LoaderError(f"declared outputs {_told(artifact.outputs)}, the model has {_told(own.outputs)}")
        defaults = tuple(name for name in own.default_outputs if name in names)
        return replace(own, inputs=artifact.inputs or own.inputs, outputs=outputs, default_outputs=defaults)
    inputs = _narrowed("input", own.inputs, artifact.inputs)
    if len(inputs) != len(own.inputs):
        raise LoaderError(f"declared inputs {_told(artifact.inputs)}, the model has {_told(own.inputs)}")
    return replace(own, inputs=inputs, outputs=_narrowed("output", own.outputs, artifact.outputs))


def _narrowed(kind: str, own: Sequence[TensorSpec], declared: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    if not declared:
        return tuple(own)
    by_name = {spec.name: spec for spec in own}
    narrowed: dict[str, TensorSpec] = {}
    for said in declared:
        true = by_name.get(said.name)
        if true is None:
            raise LoaderError(f"declared {kind} {_told([said])} is none of the model's: {_told(own)}")
        sizes = list(zip(said.shape, true.shape, strict=False))
        fits = len(said.shape) == len(true.shape) and all(-1 in (a, b) or a == b for a, b in sizes)
        if said.datatype != true.datatype or (true.shape and not fits):
            raise LoaderError(f"declared {kind} {_told([said])} contradicts the model's {_told([true])}")
        narrowed[said.name] = replace(said, shape=tuple(max(a, b) for a, b in sizes) if true.shape else said.shape)
    return tuple(narrowed[spec.name] for spec in own if spec.name in narrowed)


def _told(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in specs)
