"""Model repositories on disk, and a model's settings as JSON in the registry's `key`.

Layout: `ROOT/<model>/[<version>/]model.<extension>`, with an optional `model-settings.json` (MLServer, "Model
Settings") or `config.pbtxt` (Triton, "Model Configuration"). Extensions and formats come from `loaders.LOADERS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from loaders import LOADERS, recognised
from loaders.base import TensorSpec
from loaders.datatypes import DTYPES
from mesh.placement_settings import fields_of
from mesh.tensors import MAX_DIMS
from protos.triton_config_pb2 import DataType, ModelConfig, ModelInput, ModelOutput

SETTINGS_FILE: Final = "model-settings.json"
CONFIG_FILE: Final = "config.pbtxt"
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_KEY_CHARS: Final = 64 << 10
MAX_ID_CHARS: Final = 253
MAX_QUEUE_DELAY_US: Final = 10_000_000

IMPLEMENTATIONS: Final[dict[str, str]] = {"mlserver_sklearn.SKLearnModel": "sklearn"}
"""MLServer's runtimes whose model files one of our formats reads."""

_NAMES: Final = ", ".join(name for entry in LOADERS.values() for name in (*entry.extensions, *entry.markers))
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
"""Triton ignores directories that are not numbers or begin with 0."""
_LIST: Final = re.compile(r"""("(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?|#[^\n]*)|(\w)((?:\s|#[^\n]*\n)*+\[)""")
"""A string or comment, or else a field's last letter and the list that follows without a colon."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is registered with a model beside its format and path. Shapes are V2's: with the batch dimension."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """For the loader."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    version: str = ""
    max_batch_size: int = 0
    """Largest first dimension the model takes; 0: not told."""
    max_queue_delay_us: int = 0
    """How long a request may wait for others to be run with."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Rows for which no request waits any longer; empty: `max_batch_size`."""
    one_by_one: bool = False
    """Requests are never run together, even if the model is found to answer row by row (`mesh.rowwise`)."""
    storage_key: str = ""
    """This and what follows: written into the key by ModelMesh's controller."""
    storage_params: Mapping[str, Any] = field(default_factory=dict)
    schema_path: str = ""
    model_type: str = ""
    placement: Mapping[str, Any] = field(default_factory=dict)
    """As told, see `mesh.placement_settings`; empty: nothing is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryModel(ModelSettings):
    """One model of a repository."""

    model_id: str
    format: str
    path: Path
    """The model, absolute. Symbolic links are not resolved, so that an update through them is seen."""


def scan(root: Path) -> tuple[list[RepositoryModel], list[tuple[str, str]]]:
    """The models of a repository by directory name, and (directory name, reason) of each that cannot be served.

    Files in the root and hidden directories are ignored. `to_key` accepts every model.

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
            _check_inside(directory, root)
            model = _model(directory)
            to_key(model)
            if model.model_id in models:
                raise ValueError(f"its id {model.model_id!r} is already that of {models[model.model_id].path}")
            models[model.model_id] = model
        except OSError as error:
            problems.append((directory.name, f"cannot be read: {error.strerror}"))
        except (ValueError, RecursionError) as error:
            problems.append((directory.name, str(error)[:500]))
    return list(models.values()), problems


def to_key(settings: ModelSettings) -> str:
    """Compact JSON of what is not empty; equal settings give equal text, empty ones "".

    Raises:
        ValueError: a number is not finite, or the text is longer than `MAX_KEY_CHARS`.
        TypeError: a parameter is of a type that JSON does not have.
    """
    shown: dict[str, Any] = {}
    for name in [entry.name for entry in fields(ModelSettings)]:
        value = getattr(settings, name)
        if name in ("inputs", "outputs"):
            value = [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in value]
        if value:
            shown[name] = value
    key = json.dumps(shown, separators=(",", ":"), sort_keys=True, allow_nan=False) if shown else ""
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"its settings take {len(key)} characters as JSON, at most {MAX_KEY_CHARS} are allowed")
    return key


def from_key(key: str) -> ModelSettings:
    """The settings in a registered `key`. Unknown names are ignored: ModelMesh's runtimes have their own.

    Raises:
        ValueError: too long, not a JSON object, or a setting of the wrong form; one sentence.
    """
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"key has {len(key)} characters, at most {MAX_KEY_CHARS} are allowed")
    shown = _parse("key", key) if key else {}
    model_type = shown.get("model_type")
    if isinstance(model_type, dict):  # {"name": "onnx", "version": "1"}
        model_type = model_type.get("name")
    return ModelSettings(
        parameters=_object("key: parameters", shown.get("parameters")),
        inputs=_specs("key: inputs", shown.get("inputs")),
        outputs=_specs("key: outputs", shown.get("outputs")),
        version=_text("key: version", shown.get("version")),
        max_batch_size=_count("key", "max_batch_size", shown.get("max_batch_size")),
        max_queue_delay_us=_delay_us("key", shown.get("max_queue_delay_us")),
        preferred_batch_sizes=_sizes("key", shown.get("preferred_batch_sizes")),
        one_by_one=_flag("key", "one_by_one", shown.get("one_by_one")),
        storage_key=_text("key: storage_key", shown.get("storage_key")),
        storage_params=_object("key: storage_params", shown.get("storage_params")),
        schema_path=_text("key: schema_path", shown.get("schema_path")),
        model_type=_text("key: model_type", model_type),
        placement=_placement("key", shown.get("placement")),
    )


def _model(directory: Path) -> RepositoryModel:
    """The model in a directory.

    Raises:
        ValueError: it cannot be served; one sentence.
        OSError: something in it cannot be read.
    """
    config_path = directory / CONFIG_FILE
    config = _config(_read(config_path, directory)) if config_path.is_file() else None
    home = _home(directory, config.version_policy.specific.versions if config else ())
    version = home.name if home != directory else ""
    settings_path = next((at / SETTINGS_FILE for at in (home, directory) if (at / SETTINGS_FILE).is_file()), None)
    if config and settings_path:
        raise ValueError(f"it has both {SETTINGS_FILE} and {CONFIG_FILE}: keep one")
    where, base = (SETTINGS_FILE, settings_path.parent) if settings_path else (CONFIG_FILE, home)
    declared = _parse(where, _read(settings_path, directory)) if settings_path else _as_settings(config, directory)
    details = _object(f"{where}: parameters", declared.get("parameters"))
    uri = _text(f"{where}: parameters.uri", details.get("uri"))
    implementation = _text(f"{where}: implementation", declared.get("implementation"))
    if implementation and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: unknown implementation {implementation!r}, expected {', '.join(IMPLEMENTATIONS)}")
    path = base / uri if uri else _only_model(home)
    _check_inside(path, directory)
    if not path.exists():
        raise ValueError(f"{where}: {uri!r} is not a file")
    format_name = IMPLEMENTATIONS.get(implementation) or recognised(path)
    if not format_name:
        raise ValueError(f"{where}: {uri!r} is no model: expected one of {_NAMES}")
    model_id = _text(f"{where}: name", declared.get("name")) or directory.name
    if len(model_id) > MAX_ID_CHARS or not model_id.isprintable():
        raise ValueError(f"its id is longer than {MAX_ID_CHARS} characters or has unprintable ones")
    return RepositoryModel(
        model_id=model_id,
        format=format_name,
        path=path,
        parameters=_object(f"{where}: parameters.extra", details.get("extra")),
        inputs=_specs(f"{where}: inputs", declared.get("inputs")),
        outputs=_specs(f"{where}: outputs", declared.get("outputs")),
        version=_text(f"{where}: parameters.version", details.get("version")) or version,
        max_batch_size=_count(where, "max_batch_size", declared.get("max_batch_size")),
        max_queue_delay_us=_delay_us(where, declared.get("max_queue_delay_us"), declared.get("max_batch_time")),
        preferred_batch_sizes=_sizes(where, declared.get("preferred_batch_sizes")),
        one_by_one=_flag(where, "one_by_one", declared.get("one_by_one")),
        placement=_placement(f"{where}: parameters", details.get("placement")),
    )


def _home(directory: Path, pinned: Collection[int]) -> Path:
    """Where the model file lies: the highest version's directory (of those pinned), else the model's own."""
    names = [path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != "."]
    versions = [int(name) for name in names if _VERSION.fullmatch(name) and (not pinned or int(name) in pinned)]
    if pinned and not versions:
        raise ValueError(f"{CONFIG_FILE}: none of the versions {sorted(pinned)} of version_policy is there")
    if not versions and names and not any(map(recognised, (directory, *directory.iterdir()))):
        raise ValueError(f"{', '.join(map(repr, sorted(names)[:8]))}: a version directory's name is a number from 1")
    return directory / str(max(versions)) if versions else directory


def _only_model(home: Path) -> Path:
    """The model in a directory: a file or directory of one of our formats, or the directory itself."""
    if recognised(home):
        return home
    found = sorted(path for path in home.iterdir() if path.name[0] != "." and recognised(path))
    found = [path for path in found if path.name.startswith("model.")] or found
    if len(found) > 1:
        raise ValueError(f"several model files: {', '.join(path.name for path in found[:8])}")
    if not found:
        raise ValueError(f"no model file in {home.name!r}: expected model with one of {_NAMES}")
    return found[0]


def _check_inside(path: Path, directory: Path) -> None:
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise ValueError(f"{path.name!r} leads out of {directory.name!r}")


def _read(path: Path, directory: Path) -> str:
    _check_inside(path, directory)
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _config(text: str) -> ModelConfig:
    # text_format skips an unknown `a: [ { ... } ]` but not `a [ { ... } ]`, which is how Triton's users write them.
    text = _LIST.sub(lambda match: match[1] or f"{match[2]}:{match[3]}", text)
    try:
        return text_format.Parse(text, ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None


def _as_settings(config: ModelConfig | None, directory: Path) -> dict[str, Any]:
    """A Triton configuration in the form of model-settings.json."""
    if config is None:
        return {}
    if config.name not in ("", directory.name):
        raise ValueError(f"{CONFIG_FILE}: name is {config.name!r}, expected the directory's")
    batch = [-1] if config.max_batch_size > 0 else []  # dims lack the batch dimension, V2 shapes have it
    return {
        "inputs": [_as_spec(tensor, batch) for tensor in config.input],
        "outputs": [_as_spec(tensor, batch) for tensor in config.output],
        "max_batch_size": config.max_batch_size,
        "max_queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "preferred_batch_sizes": list(config.dynamic_batching.preferred_batch_size),
        "one_by_one": config.max_batch_size == 0,  # the model has no batch dimension
        "parameters": {"uri": config.default_model_filename},
    }


def _as_spec(tensor: ModelInput | ModelOutput, batch: list[int]) -> dict[str, Any]:
    if tensor.HasField("reshape"):
        raise ValueError(f"{CONFIG_FILE}: {tensor.name!r} has reshape: declare the shape that the model itself has")
    datatype = DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    return {"name": tensor.name, "datatype": datatype, "shape": [*batch, *tensor.dims]}


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    return _object(where, value)


def _object(where: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value or {}


def _text(where: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is not a string")
    return value or ""


def _count(where: str, name: str, value: Any) -> int:
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
        raise ValueError(f"{where}: {name} is not a number from 0")
    return int(value or 0)


def _placement(where: str, value: Any) -> dict[str, Any]:
    told = _object(f"{where}: placement", value)
    try:
        fields_of(told)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return told


def _delay_us(where: str, value: Any, seconds: Any = None) -> int:
    """`max_queue_delay_us`, or MLServer's `max_batch_time` in seconds."""
    if seconds is not None:
        if value is not None:
            raise ValueError(f"{where}: both max_queue_delay_us and max_batch_time: keep one")
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_QUEUE_DELAY_US / 1e6:
            raise ValueError(f"{where}: max_batch_time is not a number of seconds up to {MAX_QUEUE_DELAY_US / 1e6:.0f}")
        return round(float(seconds) * 1e6)
    delay_us = _count(where, "max_queue_delay_us", value)
    if delay_us > MAX_QUEUE_DELAY_US:
        raise ValueError(f"{where}: max_queue_delay_us is {delay_us}, expected at most {MAX_QUEUE_DELAY_US}")
    return delay_us


def _sizes(where: str, value: Any) -> tuple[int, ...]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where}: preferred_batch_sizes is not a list")
    return tuple(sorted({_count(where, "preferred_batch_sizes", size) for size in value or ()} - {0}))


def _flag(where: str, name: str, value: Any) -> bool:
    if value is not None and type(value) is not bool:
        raise ValueError(f"{where}: {name} is neither true nor false")
    return bool(value)


def _specs(where: str, value: Any) -> tuple[TensorSpec, ...]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where} is not a list")
    specs: dict[str, TensorSpec] = {}
    for index, entry in enumerate(value or ()):
        at = f"{where}[{index}]"
        entry = _object(at, entry)
        name = _text(f"{at}: name", entry.get("name"))
        datatype, shape = _text(f"{at}: datatype", entry.get("datatype")), entry.get("shape")
        if not name or name in specs:
            raise ValueError(f"{at}: name is missing or occurs twice")
        if datatype not in DTYPES:
            raise ValueError(f"{at} {name[:64]!r}: unknown datatype {datatype[:64]!r}")
        if not isinstance(shape, list) or not all(type(size) is int and -1 <= size < 1 << 63 for size in shape):
            raise ValueError(f"{at} {name[:64]!r}: shape is not a list of numbers from -1")
        if len(shape) > MAX_DIMS:
            raise ValueError(f"{at} {name[:64]!r}: shape has {len(shape)} dimensions, at most {MAX_DIMS} are allowed")
        specs[name] = TensorSpec(name, datatype, tuple(shape))
    return tuple(specs.values())
