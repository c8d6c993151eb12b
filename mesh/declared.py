"""What files beside a model declare of it: `model-settings.json` (MLServer, "Model Settings"), `config.pbtxt` (Triton,
"Model Configuration").
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from mesh.settings import ModelSettings, object_in, parse_object, placement_in, text_in, told_alike
from protos.triton_config_pb2 import DataType, ModelConfig, ModelInput, ModelOutput

SETTINGS_FILE: Final = "model-settings.json"
CONFIG_FILE: Final = "config.pbtxt"
MAX_CONFIG_BYTES: Final = 1 << 20

_LIST: Final = re.compile(r"""("(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?|#[^\n]*)|(\w)((?:\s|#[^\n]*\n)*+\[)""")
"""A string or comment, or else a field's last letter and the list that follows without a colon."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a file says."""

    where: str
    """The file's name, as reasons begin."""
    settings: ModelSettings
    name: str = ""
    uri: str = ""
    """The model's file, relative to this one's folder."""
    implementation: str = ""
    """MLServer's, a Python class."""


def read_settings(path: Path, directory: Path) -> Declared:
    """A `model-settings.json` somewhere in a model's directory.

    Raises:
        ValueError: not of the form expected; one sentence with the file's name.
        OSError: it cannot be read.
    """
    where = SETTINGS_FILE
    told = parse_object(where, _read(path, directory))
    details = object_in(f"{where}: parameters", told.get("parameters"))
    settings = ModelSettings(
        parameters=object_in(f"{where}: parameters.extra", details.get("extra")),
        version=text_in(f"{where}: parameters.version", details.get("version")),
        placement=placement_in(f"{where}: parameters", details.get("placement")),
        **told_alike(where, told),
    )
    return Declared(
        where,
        settings,
        name=text_in(f"{where}: name", told.get("name")),
        uri=text_in(f"{where}: parameters.uri", details.get("uri")),
        implementation=text_in(f"{where}: implementation", told.get("implementation")),
    )


def read_config(path: Path, directory: Path) -> ModelConfig:
    """A `config.pbtxt`. Raises: see `read_settings`."""
    # text_format skips an unknown `a: [ { ... } ]` but not `a [ { ... } ]`, which is how Triton's users write them.
    text = _LIST.sub(lambda match: match[1] or f"{match[2]}:{match[3]}", _read(path, directory))
    try:
        return text_format.Parse(text, ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None


def said_by(config: ModelConfig) -> Declared:
    """What a Triton configuration says in our terms. Raises: see `read_settings`."""
    batch = [-1] if config.max_batch_size > 0 else []  # dims lack the batch dimension, V2 shapes have it
    told = {
        "inputs": [_as_spec(tensor, batch) for tensor in config.input],
        "outputs": [_as_spec(tensor, batch) for tensor in config.output],
        "max_batch_size": config.max_batch_size,
        "max_queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "preferred_batch_sizes": list(config.dynamic_batching.preferred_batch_size),
        "one_by_one": config.max_batch_size == 0,  # the model has no batch dimension
    }
    settings = ModelSettings(**told_alike(CONFIG_FILE, told))
    return Declared(CONFIG_FILE, settings, name=config.name, uri=config.default_model_filename)


def _as_spec(tensor: ModelInput | ModelOutput, batch: list[int]) -> dict[str, Any]:
    if tensor.HasField("reshape"):
        raise ValueError(f"{CONFIG_FILE}: {tensor.name!r} has reshape: declare the shape that the model itself has")
    datatype = DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    return {"name": tensor.name, "datatype": datatype, "shape": [*batch, *tensor.dims]}


def check_inside(path: Path, directory: Path) -> None:
    """Refuse what leads out of a model's directory.

    Raises:
        ValueError: it does.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise ValueError(f"{path.name!r} leads out of {directory.name!r}")


def _read(path: Path, directory: Path) -> str:
    check_inside(path, directory)
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from None
