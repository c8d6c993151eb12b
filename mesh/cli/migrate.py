"""`densemesh migrate`: from other multi-model servers to the mesh."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TextIO

import click
from rich.console import Console

from loaders import ALIASES, LOADERS

_MOST_BYTES: Final = 64 << 20
_SIGNS: Final = {"honoured": "  ", "warned": "! ", "refused": "X "}


@click.group()
def migrate() -> None:
    """From other multi-model servers to the mesh."""


@migrate.command()
@click.option("--manifests", required=True, metavar="DIR|FILE|-", help="What `kubectl get ... -o yaml` printed.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Directory for the new manifests.")
def modelmesh(manifests: str, output: Path | None) -> int:
    """Say what becomes of ModelMesh's objects, field by field, and write what takes their place.

    InferenceServices, Predictors, ServingRuntimes, the Secret storage-config and the ConfigMap model-serving-config are
    read; no value of a Secret is shown or written. "!" marks what has no effect, "X" what keeps a model from being
    served; with one, the exit status is 1.

    \b
    kubectl get -A -o yaml inferenceservices,predictors,servingruntimes,clusterservingruntimes \\
        | densemesh migrate modelmesh --manifests - --output new
    """
    try:
        yaml, operator = import_module("yaml"), import_module("mesh_operator.modelmesh")  # not of the mesh (contract)
    except ModuleNotFoundError:
        raise click.ClickException("PyYAML is not installed: pip install 'densemesh[operator]'") from None
    found = [document for name, text in _texts(manifests) for document in _documents(yaml, name, text)]
    migration = operator.migrate(found, {*LOADERS, *ALIASES} - {"synthetic"})
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for entry in migration.entries:
        where = f"{entry.namespace}/{entry.name}" if entry.namespace else entry.name
        fate = f"left alone: {entry.skipped}" if entry.skipped else "NOT carried over" if entry.is_refused else ""
        console.print(f"{entry.kind} {where}  {fate}".rstrip())
        for line in sorted(entry.lines, key=lambda line: list(_SIGNS).index(line.fate), reverse=True):
            console.print(f"  {_SIGNS[line.fate]}{line.path}: {line.note}")
    refused = sum(entry.is_refused for entry in migration.entries)
    console.print(f"{len(migration.inference_services)} models carry over; {refused} objects do not")
    if output is not None:
        _write(yaml, output, migration, console)
    return 1 if refused else 0


def _texts(source: str) -> list[tuple[str, str]]:
    """Names and texts of what is to be read."""
    if source == "-":
        return [("standard input", _read("standard input", sys.stdin))]
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml", ".json") and file.is_file())
    texts = []
    for file in files:
        try:
            with file.open(encoding="utf-8") as opened:
                texts.append((str(file), _read(str(file), opened)))
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise click.BadParameter(f"--manifests: {file}: {said}") from None
    if not texts:
        raise click.BadParameter(f"--manifests: {source}: expected .yaml, .yml or .json files in it")
    return texts


def _read(name: str, file: TextIO) -> str:
    text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise click.BadParameter(f"--manifests: {name}: expected at most {_MOST_BYTES >> 20} MiB")
    return text


def _documents(yaml: Any, name: str, text: str) -> list[Any]:
    try:
        return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        at = f", line {line}" if line else ""
        raise click.BadParameter(f"--manifests: {name}{at}: expected YAML") from None


def _write(yaml: Any, folder: Path, migration: Any, console: Console) -> None:
    files = {
        "inferenceservices.yaml": yaml.safe_dump_all(migration.inference_services, sort_keys=False),
        "services.yaml": yaml.safe_dump_all(migration.aliases, sort_keys=False),
        "settings.env": "".join(f"{name}={value}\n" for name, value in sorted(migration.settings.items())),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if text:
                (folder / name).write_text(text, encoding="utf-8")
                console.print(f"written: {folder / name}")
    except OSError as error:
        raise click.ClickException(f"--output: {folder}: {error.strerror}") from None
