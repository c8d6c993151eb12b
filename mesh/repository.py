"""Model repositories on disk: `ROOT/<model>/[<version>/]model.<extension>`, with an optional file that declares more
(`mesh.declared`). Extensions and formats come from `loaders.LOADERS`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from loaders import LOADERS, recognised
from loaders.artifacts import newest_version, unfolded
from mesh.declared import CONFIG_FILE, check_inside, declared_in
from mesh.settings import ModelSettings, to_key
from mesh.triton import format_said

MAX_ID_CHARS: Final = 253

IMPLEMENTATIONS: Final[dict[str, str]] = {
    "mlserver_huggingface.HuggingFaceRuntime": "huggingface",
    "mlserver_lightgbm.LightGBMModel": "lightgbm",
    "mlserver_mlflow.MLflowRuntime": "mlflow",
    "mlserver_sklearn.SKLearnModel": "sklearn",
    "mlserver_xgboost.XGBoostModel": "xgboost",
}
"""MLServer's runtimes whose model files one of our formats reads."""

_NAMES: Final = ", ".join(name for entry in LOADERS.values() for name in (*entry.extensions, *entry.markers))


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryModel(ModelSettings):
    """One model of a repository."""

    model_id: str
    format: str
    path: Path
    """The model, absolute. Symbolic links are not resolved, so that an update through them is seen."""


def scan(root: Path, served: Collection[str] = ()) -> tuple[list[RepositoryModel], list[tuple[str, str]]]:
    """The models of a repository by directory name, and (directory name, reason) of each that cannot be served.

    Files in the root and hidden directories are ignored. `to_key` accepts every model. Of formats that are the pod's
    model server's, `served`, the directory is the model.

    Raises:
        ValueError: root is not a directory, or cannot be read.
    """
    try:
        directories = sorted(path for path in root.absolute().iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError as error:
        raise ValueError(f"the model repository {root} cannot be read: {error.strerror}") from None
    models: dict[str, RepositoryModel] = {}
    problems: list[tuple[str, str]] = []
    for directory in directories:
        try:
            check_inside(directory, root)
            model = _model(directory, served)
            to_key(model)
            if model.model_id in models:
                raise ValueError(f"its id {model.model_id!r} is already that of {models[model.model_id].path}")
            models[model.model_id] = model
        except OSError as error:
            problems.append((directory.name, f"cannot be read: {error.strerror}"))
        except (ValueError, RecursionError) as error:
            problems.append((directory.name, str(error)[:500]))
    return list(models.values()), problems


def _model(directory: Path, served: Collection[str]) -> RepositoryModel:
    """The model in a directory.

    Raises:
        ValueError: it cannot be served; one sentence.
        OSError: something in it cannot be read.
    """
    home = _home(directory, declared_in([directory], directory).versions)
    said = declared_in([home, directory], directory)
    if said.where == CONFIG_FILE and said.name not in ("", directory.name):
        raise ValueError(f"{CONFIG_FILE}: name is {said.name!r}, expected the directory's")
    is_python = LOADERS["python"].name_in(home) != ""  # the class is the author's own
    if said.implementation and said.implementation not in IMPLEMENTATIONS and not is_python:
        expected = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"{said.where}: unknown implementation {said.implementation!r}, expected {expected}")
    format_name = IMPLEMENTATIONS.get(said.implementation) or format_said(said.platform, home, directory, served)
    base = home if said.where == CONFIG_FILE else said.folder
    path = directory
    if format_name not in served:
        path = unfolded(base / said.uri) if said.uri else _only_model(home, format_name)
    check_inside(path, directory)
    if not path.exists():
        raise ValueError(f"{said.where}: {said.uri!r} is not a file")
    format_name = format_name or recognised(path)
    if not format_name:
        raise ValueError(f"{said.where}: {said.uri!r} is no model: expected one of {_NAMES}")
    model_id = said.name or directory.name
    if len(model_id) > MAX_ID_CHARS or not model_id.isprintable():
        raise ValueError(f"its id is longer than {MAX_ID_CHARS} characters or has unprintable ones")
    version = said.settings.version or (home.name if home != directory else "")
    told = {entry.name: getattr(said.settings, entry.name) for entry in fields(ModelSettings)}
    told |= {"version": version, "parameters": said.parameters_of(format_name)}
    return RepositoryModel(**told, model_id=model_id, format=format_name, path=path)


def _home(directory: Path, pinned: Collection[int]) -> Path:
    """Where the model file lies: the highest version's directory (of those pinned), else the model's own."""
    names = [path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != "."]
    home = newest_version(directory, pinned)
    if pinned and home == directory:
        raise ValueError(f"{CONFIG_FILE}: none of the versions {sorted(pinned)} of version_policy is there")
    if home == directory and names and not any(map(recognised, (directory, *directory.iterdir()))):
        raise ValueError(f"{', '.join(map(repr, sorted(names)[:8]))}: a version directory's name is a number from 1")
    return home


def _only_model(home: Path, format_name: str) -> Path:
    """The model in a directory: a file or directory of that format, if it is known, or of one of ours, or the directory
    itself."""
    is_model = LOADERS[format_name].name_in if format_name else recognised
    if is_model(home):
        return home
    found = sorted(path for entry in home.iterdir() if entry.name[0] != "." and is_model(path := unfolded(entry)))
    found = [path for path in found if path.name.startswith("model.")] or found
    if len(found) > 1:
        raise ValueError(f"several model files: {', '.join(path.name for path in found[:8])}")
    if not found:
        names = (*LOADERS[format_name].extensions, *LOADERS[format_name].markers) if format_name else (_NAMES,)
        raise ValueError(f"no model file in {home.name!r}: expected model with one of {', '.join(names)}")
    return found[0]
