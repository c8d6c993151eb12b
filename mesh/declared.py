"""What files beside a model declare of it: `model-settings.json` (MLServer, "Model Settings"), `config.pbtxt` (Triton,
"Model Configuration"), `schema.json` (ModelMesh: a signature alone, `{"inputs": [...], "outputs": [...]}`).

The first two exclude each other; a schema's inputs and outputs go over theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from mesh.settings import ModelSettings, object_in, parse_object, placement_in, text_in, told_alike
from protos.triton_config_pb2 import DataType, ModelConfig, ModelInput, ModelOutput, ModelWarmup

SETTINGS_FILE: Final = "model-settings.json"
CONFIG_FILE: Final = "config.pbtxt"
SCHEMA_FILE: Final = "schema.json"
MAX_CONFIG_BYTES: Final = 1 << 20

_LIST: Final = re.compile(r"""("(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?|#[^\n]*)|(\w)((?:\s|#[^\n]*\n)*+\[)""")
"""A string or comment, or else a field's last letter and the list that follows without a colon."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What the files say."""

    settings: ModelSettings = field(default_factory=ModelSettings)
    where: str = ""
    """The name of the one that says more than a signature, as reasons begin."""
    folder: Path = Path()
    """Where that lies."""
    name: str = ""
    uri: str = ""
    """The model's file: MLServer's from `folder`, Triton's in the version's folder."""
    implementation: str = ""
    """MLServer's, a Python class."""
    platform: str = ""
    """Triton's platform or backend."""
    versions: tuple[int, ...] = ()
    """Those that Triton's version policy names; empty: any."""

    def parameters_of(self, format_name: str) -> Mapping[str, Any]:
        """For the loader. Where the class is the author's own, that is one of them."""
        if format_name != "python" or not self.implementation:
            return self.settings.parameters
        return {"implementation": self.implementation, **self.settings.parameters}


def declared_in(folders: Sequence[Path], directory: Path) -> Declared:
    """What is declared in the first of `folders` that has such a file, each within a model's `directory`.

    Raises:
        ValueError: a file is not of the form expected, or leads out of the directory; one sentence with its name.
        OSError: it cannot be read.
    """
    settings, config, schema = (
        next((folder / name for folder in folders if (folder / name).is_file()), None)
        for name in (SETTINGS_FILE, CONFIG_FILE, SCHEMA_FILE)
    )
    if settings and config:
        raise ValueError(f"it has both {SETTINGS_FILE} and {CONFIG_FILE}: keep one")
    said = Declared()
    if settings:
        said = _settings(read_inside(settings, directory), settings.parent)
    elif config:
        said = _config(read_inside(config, directory), config.parent)
    if schema:
        said = replace(said, settings=signature_in(SCHEMA_FILE, read_inside(schema, directory)).over(said.settings))
    return said


def signature_in(where: str, text: str) -> ModelSettings:
    """A schema; `where` begins the reason if it is none.

    Raises:
        ValueError: it is none; one sentence.
    """
    told = parse_object(where, text)
    if not told.get("inputs") and not told.get("outputs"):
        raise ValueError(f"{where}: expected inputs or outputs, lists of name, datatype and shape")
    return ModelSettings(**told_alike(where, {name: told.get(name) for name in ("inputs", "outputs")}))


def _settings(text: str, folder: Path) -> Declared:
    where = SETTINGS_FILE
    told = parse_object(where, text)
    details = object_in(f"{where}: parameters", told.get("parameters"))
    settings = ModelSettings(
        parameters=object_in(f"{where}: parameters.extra", details.get("extra")),
        version=text_in(f"{where}: parameters.version", details.get("version")),
        placement=placement_in(f"{where}: parameters", details.get("placement")),
        **told_alike(where, told),
    )
    return Declared(
        settings,
        where,
        folder,
        name=text_in(f"{where}: name", told.get("name")),
        uri=text_in(f"{where}: parameters.uri", details.get("uri")),
        implementation=text_in(f"{where}: implementation", told.get("implementation")),
    )


def _config(text: str, folder: Path) -> Declared:
    # text_format skips an unknown `a: [ { ... } ]` but not `a [ { ... } ]`, which is how Triton's users write them.
    text = _LIST.sub(lambda match: match[1] or f"{match[2]}:{match[3]}", text)
    try:
        config = text_format.Parse(text, ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None
    batch = [-1] if config.max_batch_size > 0 else []  # dims lack the batch dimension, V2 shapes have it
    told = {
        "inputs": [_as_spec(tensor, batch) for tensor in config.input],
        "outputs": [_as_spec(tensor, batch) for tensor in config.output],
        "max_batch_size": config.max_batch_size,
        "max_queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "preferred_batch_sizes": list(config.dynamic_batching.preferred_batch_size),
        "one_by_one": config.max_batch_size == 0,  # the model has no batch dimension
        "warmup": [_as_sample(sample) for sample in config.model_warmup],
    }
    return Declared(
        ModelSettings(**told_alike(CONFIG_FILE, told)),
        CONFIG_FILE,
        folder,
        name=config.name,
        uri=config.default_model_filename,
        platform=config.platform or config.backend,
        versions=tuple(config.version_policy.specific.versions),
    )


def _as_spec(tensor: ModelInput | ModelOutput, batch: list[int]) -> dict[str, Any]:
    if tensor.HasField("reshape"):
        raise ValueError(f"{CONFIG_FILE}: {tensor.name!r} has reshape: declare the shape that the model itself has")
    return {"name": tensor.name, "datatype": _datatype(tensor.data_type), "shape": [*batch, *tensor.dims]}


def _as_sample(sample: ModelWarmup) -> dict[str, Any]:
    batch = [sample.batch_size] if sample.batch_size else []
    inputs = []
    for name, tensor in sorted(sample.inputs.items()):
        if tensor.input_data_file:
            raise ValueError(f"{CONFIG_FILE}: model_warmup of {name!r}: expected zero_data or random_data")
        shape, data = [*batch, *tensor.dims], "random" if tensor.random_data else ""
        inputs.append({"name": name, "datatype": _datatype(tensor.data_type), "shape": shape, "data": data})
    return {"count": sample.count or 1, "batch_size": sample.batch_size or 1, "inputs": inputs}


def _datatype(kind: DataType) -> str:
    return DataType.Name(kind).removeprefix("TYPE_").replace("STRING", "BYTES")


def check_inside(path: Path, directory: Path) -> None:
    """Refuse what leads out of a model's directory.

    Raises:
        ValueError: it does.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise ValueError(f"{path.name!r} leads out of {directory.name!r}")


def read_inside(path: Path, directory: Path) -> str:
    """A small text file in a model's directory. Raises: see `declared_in`."""
    check_inside(path, directory)
    return read_text(path)


def read_text(path: Path) -> str:
    """A small text file.

    Raises:
        ValueError: larger than `MAX_CONFIG_BYTES`, or no UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from None
