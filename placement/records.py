"""What the registry holds, and its keys: models, vmodels, tenants, pods, and the copies pods have.

    models/<model>          registered models; compare-and-set
    vmodels/<vmodel>        aliases; compare-and-set together with the models they count
    tenants/<tenant>        what a tenant is granted; compare-and-set
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
TenantId = str


class BadRecord(ValueError):
    """A registry value that this version cannot read: made by hand, or by a later version."""


class CopyStatus(StrEnum):
    """What a pod says of one of its copies; the lifecycle's states as far as others need them."""

    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    HELD = "held"
    """Not loaded, but the bytes lie in a lower tier of that pod (`CopyRecord.tier`): loading there is cheap."""


class Tier(StrEnum):
    """Where a model's bytes lie on a pod, nearest first; farther than all of them is the store it is loaded from."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Priority(StrEnum):
    """Classes of models and requests, first to go first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


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
    # How it is to be placed; may change while copies are loaded.
    tenant: TenantId = ""
    min_copies: int = 0
    """Copies to be kept loaded, also when nobody asks."""
    max_copies: int = 0
    """0: as many as are worth it."""
    pinned: bool = False
    """Its copies are not evicted for room."""
    idle_unload_s: int = 0
    """Copies beyond `min_copies` that were not used for so long are given up; 0: only for room."""
    requires: str = ""
    """Labels that a pod must have (`placement.labels`)."""
    priority: Priority = Priority.NORMAL
    """Of requests that do not tell their own."""
    slo_ms: int = 0
    """Time in which a request should be answered; 0: the mesh's default."""
    stopped: bool = False
    """It is not to be loaded, and its requests are refused."""
    revision: int = field(default=0, compare=False)
    created: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class VModelRecord:
    """An alias: requests go to `active` until `target` takes over, but for the share that a canary gets before."""

    vmodel_id: str
    active: ModelId
    target: ModelId
    owner: str = ""
    failed: str = ""
    """Why the transition is blocked; empty: it is not."""
    canary: bool = False
    """The transition does not end by itself: `target` is to be promoted or given up."""
    canary_percent: int = 0
    """Of requests that go to `target` while it is loaded and not active (`placement.sides`). A canary that is promoted
    keeps its share until it is active."""
    since_ms: int = 0
    """When the transition was asked for; Unix ms."""
    revision: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """What a tenant is granted. A tenant without a record has no guarantee and no limit, and the weight 1."""

    tenant_id: TenantId
    guaranteed_bytes: int = 0
    """Others' loads do not evict it below this, held pod by pod in proportion to the pods' capacity."""
    max_bytes: int = 0
    """Loaded bytes in the whole mesh; 0: no limit."""
    weight: int = 1
    """Share of a full pod: its weight over that of all tenants with copies there."""
    max_loads: int = 0
    """Loads under way on one pod; 0: no limit."""
    max_models: int = 0
    """Registered models; 0: no limit."""
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
    labels: str = ""
    """What kind of pod it is, and where (`placement.labels`)."""
    kept_bytes: int = 0
    """Of copies that do not go for room: pinned, or not to be spared."""
    host_free_bytes: int = 0
    disk_free_bytes: int = 0
    queue_ms: int = 0
    """How long a load that is asked for now would wait for its turn, as estimated."""
    load_fixed_ms: int = 0
    load_bytes_per_ms: int = 0
    """What loads from the store took here lately: a fixed time plus the bytes over this; 0: not known."""
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
    no_room: bool = False
    """The failure is that there was no room; `retryable` too."""
    registration: int = 0
    """`created` of the model's record it is a copy of: what was measured says nothing of a later registration."""
    tier: Tier = Tier.DEVICE
    used_ms: int = 0
    """When it was last used as far as was published: up to some minutes ago; Unix ms."""
    busy_percent: int = 0
    """Of its pod's run threads, what its requests take or wait for; coarse."""


Record = ModelRecord | VModelRecord | TenantRecord | PodRecord | CopyRecord

_STAMPS: Final = {"revision", "created"}
"""The registry's own numbers: not part of the value."""


def model_key(model_id: ModelId) -> str:
    return f"models/{model_id}"


def vmodel_key(vmodel_id: str) -> str:
    return f"vmodels/{vmodel_id}"


def tenant_key(tenant_id: TenantId) -> str:
    return f"tenants/{tenant_id}"


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
        case TenantRecord():
            return tenant_key(record.tenant_id)
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
            words = _WORDS.get(f.type)
            if words is not None:
                try:
                    value = words(value)
                except ValueError:
                    expected = ", ".join(words)
                    raise BadRecord(f"{key!r}: {f.name} {_repr(value)} is not one of {expected}") from None
            elif type(value) is not _JSON_TYPES.get(f.type, str):
                raise BadRecord(f"{key!r}: {f.name} must be a JSON {f.type}, found {_repr(value)}")
            elif type(value) is int and not 0 <= value < 1 << 63:
                raise BadRecord(f"{key!r}: {f.name} must lie in [0, 2^63), found {_repr(value)}")
            known[f.name] = value
    return known


_repr: Final = reprlib.repr
"""Of bounded length and depth: values are as large as whoever wrote them pleased."""

_JSON_TYPES: Final[dict[object, type]] = {"int": int, "bool": bool}
_WORDS: Final[dict[object, type[StrEnum]]] = {word.__name__: word for word in (CopyStatus, Tier, Priority)}

_TABLE: Final[dict[str, tuple[type[Any], tuple[str, ...]]]] = {
    "models": (ModelRecord, ("model_id",)),
    "vmodels": (VModelRecord, ("vmodel_id",)),
    "tenants": (TenantRecord, ("tenant_id",)),
    "pods": (PodRecord, ("pod_id",)),
    "copies": (CopyRecord, ("pod_id", "model_id")),
}
"""Kind of key to its record and the fields the key itself tells."""
