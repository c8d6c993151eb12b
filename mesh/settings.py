"""A model's settings: what is registered with it beside its format and path, and as JSON in the registry's `key`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from loaders.base import TensorSpec
from loaders.datatypes import DTYPES
from mesh.placement_settings import fields_of
from mesh.tensors import MAX_DIMS
from mesh.warmup import samples_in

MAX_KEY_CHARS: Final = 64 << 10
MAX_QUEUE_DELAY_US: Final = 10_000_000


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
    max_concurrency: int = 0
    """Runs at once in one pod; 0: as many as there are threads."""
    one_by_one: bool = False
    """Requests are never run together, even if the model is found to answer row by row (`mesh.rowwise`)."""
    warmup: tuple[Mapping[str, Any], ...] = ()
    """Runs before a copy counts as loaded, see `mesh.warmup`."""
    storage_key: str = ""
    """This and what follows: written into the key by ModelMesh's controller."""
    storage_params: Mapping[str, Any] = field(default_factory=dict)
    schema_path: str = ""
    model_type: str = ""
    placement: Mapping[str, Any] = field(default_factory=dict)
    """As told, see `mesh.placement_settings`; empty: nothing is told."""

    def over(self, other: ModelSettings) -> ModelSettings:
        """These, and of the other's what these do not tell."""
        untold = {entry.name: getattr(other, entry.name) for entry in fields(self) if not getattr(self, entry.name)}
        return replace(self, **{**untold, "parameters": {**other.parameters, **self.parameters}})


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
    shown = parse_object("key", key) if key else {}
    model_type = shown.get("model_type")
    if isinstance(model_type, dict):  # {"name": "onnx", "version": "1"}
        model_type = model_type.get("name")
    return ModelSettings(
        parameters=object_in("key: parameters", shown.get("parameters")),
        version=text_in("key: version", shown.get("version")),
        storage_key=text_in("key: storage_key", shown.get("storage_key")),
        storage_params=object_in("key: storage_params", shown.get("storage_params")),
        schema_path=text_in("key: schema_path", shown.get("schema_path")),
        model_type=text_in("key: model_type", model_type),
        placement=placement_in("key", shown.get("placement")),
        **told_alike("key", shown),
    )


def told_alike(where: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Members of `ModelSettings` that keys and files tell alike: the signature, how requests are batched, warm-up.

    Raises:
        ValueError: see `from_key`; it begins with `where`.
    """
    return {
        "inputs": _specs(f"{where}: inputs", told.get("inputs")),
        "outputs": _specs(f"{where}: outputs", told.get("outputs")),
        "max_batch_size": _count(where, "max_batch_size", told.get("max_batch_size")),
        "max_queue_delay_us": _delay_us(where, told.get("max_queue_delay_us"), told.get("max_batch_time")),
        "preferred_batch_sizes": _sizes(where, told.get("preferred_batch_sizes")),
        "max_concurrency": _count(where, "max_concurrency", told.get("max_concurrency")),
        "one_by_one": _flag(where, "one_by_one", told.get("one_by_one")),
        "warmup": samples_in(where, told.get("warmup")),
    }


def parse_object(where: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none; one sentence that begins with `where`, as those of the following.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    return object_in(where, value)


def object_in(where: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value or {}


def text_in(where: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is not a string")
    return value or ""


def _count(where: str, name: str, value: Any) -> int:
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
        raise ValueError(f"{where}: {name} is not a number from 0")
    return int(value or 0)


def placement_in(where: str, value: Any) -> dict[str, Any]:
    told = object_in(f"{where}: placement", value)
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
        entry = object_in(at, entry)
        name = text_in(f"{at}: name", entry.get("name"))
        datatype, shape = text_in(f"{at}: datatype", entry.get("datatype")), entry.get("shape")
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
