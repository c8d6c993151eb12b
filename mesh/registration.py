"""What a registration asks for: which model, and how it is to be placed.

The placement is no part of what the model is. A registration that differs from the last one only there changes the
record in place, and copies go on serving; one that tells nothing of placement leaves it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from loaders import LOADERS
from mesh.errors import AlreadyExists, InvalidRequest
from mesh.models import format_of
from mesh.placement_settings import NAMES, fields_of
from mesh.runtime.settings import required
from mesh.settings import from_key
from placement.records import ModelRecord
from protos import management_pb2 as pb

MAX_PATH_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Registration:
    """A model's record as it is asked for."""

    record: ModelRecord
    tells_placement: bool

    def over(self, known: ModelRecord) -> ModelRecord:
        """What becomes of the record of a model that is registered already.

        Raises:
            AlreadyExists: they differ in what the model is, or in whose it is.
        """
        asked = self.record
        if (known.format, known.path, _canonical(known.key)) != (asked.format, asked.path, _canonical(asked.key)):
            raise AlreadyExists(
                f"model {asked.model_id!r} is registered with other attributes: "
                f"type {known.format!r}, path {known.path!r}"
            )
        if not self.tells_placement:
            return known
        if asked.tenant not in ("", known.tenant):  # in whose books its copies are
            raise AlreadyExists(f"model {asked.model_id!r} is registered and belongs to another tenant")
        return replace(known, **{name: getattr(asked, name) for name in NAMES if name != "tenant"})


def registration(
    model_id: str, info: pb.ModelInfo, last_used_ms: int, *, auto_delete: bool = False, labels: Iterable[str] = ()
) -> Registration:
    """The registration that ModelInfo {type, path, key} asks for; `labels` are those of all pods, which tell what model
    servers there are, and those that the model requires, if it is registered already.

    Raises:
        InvalidRequest: names the field and what was expected.
    """
    if len(info.path.encode()) > MAX_PATH_BYTES:
        raise InvalidRequest(f"modelInfo.path: expected at most {MAX_PATH_BYTES} bytes")
    record = ModelRecord(model_id, info.type, info.path, info.key, last_used_ms, auto_delete=auto_delete)
    try:
        placement = from_key(info.key).placement
        record = replace(record, key=_without_placement(info.key), **fields_of(placement))
    except ValueError as error:
        raise InvalidRequest(f"modelInfo.{error}") from None
    if label := required(record.format, format_of(record), labels):
        record = replace(record, requires=",".join(sorted({*filter(None, record.requires.split(",")), label})))
    elif format_of(record) not in LOADERS:
        ours = ", ".join(sorted(LOADERS))
        raise InvalidRequest(f"modelInfo.type {info.type!r}: expected one of {ours}, or what a pod's --runtime has")
    return Registration(record, bool(placement))


def _without_placement(key: str) -> str:
    rest = json.loads(key) if key else {}
    if "placement" not in rest:
        return key
    del rest["placement"]
    return _dump(rest) if rest else ""


def _canonical(key: str) -> str:
    """Equal for keys that tell the same; one that cannot be read, written by hand, is like no other."""
    try:
        return _dump(json.loads(key)) if key else ""
    except (ValueError, RecursionError):
        return key


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
