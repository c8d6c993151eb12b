"""What the registry holds, and its keys: models, vmodels, pods, and the copies pods have.

    models/<model>          registered models; compare-and-set
    vmodels/<vmodel>        aliases; compare-and-set together with the models they count
    pods/<pod>              one per live pod, bound to its lease
    copies/<pod>/<model>    one per copy, bound to the same lease: a dead pod's copies vanish with it

Values are JSON objects. Members this version does not know are ignored, so that versions can be mixed in one mesh.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

ModelId = str
PodId = str


class BadRecord(ValueError):
    """A registry value that this version cannot read: made by hand, or by a later version."""


class CopyStatus(StrEnum):
    """What a pod says of one of its copies; the lifecycle's states as far as others need them."""

    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A registered model. `format`, `path` and `key` are ModelMesh's ModelInfo {type, path, key}."""

    model_id: ModelId
    format: str
    path: str
    key: str = ""
    """JSON object of load parameters, or empty."""
    last_used_ms: int = 0
    """Where the model enters the eviction order when it is loaded without a request; Unix ms."""
    refs: int = 0
    """How many vmodels point here (active or target); kept in the same commit as the vmodel."""
    auto_delete: bool = False
    """Unregister when `refs` falls to 0."""
    revision: int = field(default=0, compare=False)
    created: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class VModelRecord:
    """An alias: requests go to `active` until `target` is ready to take over."""

    vmodel_id: str
    active: ModelId
    target: ModelId
    owner: str = ""
    failed: str = ""
    """Why the transition is blocked; empty: it is not."""
    revision: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A live pod, as it last described itself. Stale by the publishing interval and the watch's lag."""

    pod_id: PodId
    address: str
    """host:port other pods forward to."""
    capacity_bytes: int
    used_bytes: int = 0
    """Bytes loaded, loading or promised."""
    oldest_used_ms: int = 0
    """When its coldest copy was last used, Unix ms; 0: it holds none."""
    loaded: int = 0
    loading: int = 0
    failed: int = 0
    draining: bool = False
    version: str = ""
    revision: int = field(default=0, compare=False)
    created: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """One copy of one model on one pod."""

    model_id: ModelId
    pod_id: PodId
    status: CopyStatus
    since_ms: int = 0
    size_bytes: int = 0
    """Measured, once it is loaded; estimated before; 0: not known yet."""
    error: str = ""
    retryable: bool = False
    registration: int = 0
    """`created` of the model's record it is a copy of: what was measured says nothing of a later registration."""


Record = ModelRecord | VModelRecord | PodRecord | CopyRecord

_STAMPS: Final = {"revision", "created"}
"""The registry's own numbers: not part of the value."""


def model_key(model_id: ModelId) -> str:
    return f"models/{model_id}"


def vmodel_key(vmodel_id: str) -> str:
    return f"vmodels/{vmodel_id}"


def pod_key(pod_id: PodId) -> str:
    return f"pods/{pod_id}"


def copy_key(pod_id: PodId, model_id: ModelId) -> str:
    return f"copies/{pod_id}/{model_id}"


def key_of(record: Record) -> str:
    match record:
        case ModelRecord():
            return model_key(record.model_id)
        case VModelRecord():
            return vmodel_key(record.vmodel_id)
        case PodRecord():
            return pod_key(record.pod_id)
        case CopyRecord():
            return copy_key(record.pod_id, record.model_id)


def encode(record: Record) -> bytes:
    """The record's registry value: members at their default, and those the key tells, are left out."""
    names = _TABLE[key_of(record).partition("/")[0]][1]
    members = {
        f.name: getattr(record, f.name)
        for f in fields(record)
        if f.name not in names and f.name not in _STAMPS and getattr(record, f.name) != f.default
    }
    return json.dumps(members, separators=(",", ":")).encode()  # ASCII: errors may quote what no encoding can tell


def decode(key: str, value: bytes, *, revision: int = 0, created: int = 0) -> Record:
    """The record at a key.

    Raises:
        BadRecord: an unknown key, not a JSON object, a member missing or of the wrong type.
    """
    kind, _, rest = key.partition("/")
    if kind not in _TABLE:
        raise BadRecord(f"{key!r}: unknown kind {kind!r}")
    cls, names = _TABLE[kind]
    ids = rest.split("/", len(names) - 1)
    if len(ids) != len(names) or not all(ids) or (names[0] == "pod_id" and "/" in ids[0]):
        raise BadRecord(f"{key!r}: expected {kind}/{'/'.join(f'<{n}>' for n in names)}")
    try:
        members = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{key!r}: not JSON ({error})") from None
    if not isinstance(members, dict):
        raise BadRecord(f"{key!r}: expected a JSON object, found {type(members).__name__}")
    stamps = {"revision": revision, "created": created}
    members = {**_checked(key, cls, members), **dict(zip(names, ids, strict=True))}
    members |= {name: stamps[name] for name in _STAMPS & {f.name for f in fields(cls)}}
    try:
        record: Record = cls(**members)
    except TypeError as error:
        raise BadRecord(f"{key!r}: {error}") from None
    return record


def _checked(key: str, cls: type[Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """The members this version knows, each of its field's type."""
    known: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in members and f.name not in _STAMPS:
            value = members[f.name]
            if f.type == "CopyStatus":
                try:
                    value = CopyStatus(value)
                except ValueError:
                    raise BadRecord(f"{key!r}: {f.name} {_repr(value)} is not a copy's status") from None
            elif type(value) is not _JSON_TYPES.get(f.type, str):
                raise BadRecord(f"{key!r}: {f.name} must be a JSON {f.type}, found {_repr(value)}")
            elif type(value) is int and not 0 <= value < 1 << 63:
                raise BadRecord(f"{key!r}: {f.name} must lie in [0, 2^63), found {_repr(value)}")
            known[f.name] = value
    return known


_repr: Final = reprlib.repr
"""Of bounded length and depth: values are as large as whoever wrote them pleased."""

_JSON_TYPES: Final[dict[object, type]] = {"int": int, "bool": bool}

_TABLE: Final[dict[str, tuple[type[Any], tuple[str, ...]]]] = {
    "models": (ModelRecord, ("model_id",)),
    "vmodels": (VModelRecord, ("vmodel_id",)),
    "pods": (PodRecord, ("pod_id",)),
    "copies": (CopyRecord, ("pod_id", "model_id")),
}
"""Kind of key to its record and the fields the key itself tells."""
