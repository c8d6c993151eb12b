"""How a model is to be placed: the object `placement` in its registered key, and in `parameters` of its
`model-settings.json`.

    {"tenant": "news", "min_copies": 1, "max_copies": 4, "pinned": true, "idle_unload_s": 600,
     "requires": {"gpu": "h200"}, "priority": "high", "slo_ms": 100, "stopped": false}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from placement.labels import parse
from placement.records import Priority

NAMES: Final = (
    *("tenant", "min_copies", "max_copies", "pinned", "idle_unload_s", "requires", "priority", "slo_ms", "stopped"),
)
"""As they are told, and as `ModelRecord` has them."""

_MOST: Final = {"min_copies": 10_000, "max_copies": 10_000, "idle_unload_s": 31_536_000, "slo_ms": 86_400_000}
"""The numbers, and the largest of each: more than any mesh has pods, a year, a day."""
_TENANT: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62})?")


def fields_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a `ModelRecord` that the object tells; what it leaves out has its default.

    Raises:
        ValueError: names the setting and what was expected.
    """
    if unknown := told.keys() - set(NAMES):
        raise ValueError(f"placement.{sorted(unknown)[0][:64]}: expected one of {', '.join(NAMES)}")
    settings: dict[str, Any] = {name: _number(name, told.get(name, 0), most) for name, most in _MOST.items()}
    least, most = settings["min_copies"], settings["max_copies"]
    if most and least > most:
        raise ValueError(f"placement.min_copies: expected at most max_copies, which is {most}, found {least}")
    tenant, priority = told.get("tenant", ""), told.get("priority", Priority.NORMAL)
    for name in ("pinned", "stopped"):
        settings[name] = told.get(name, False)
        if not isinstance(settings[name], bool):
            raise ValueError(f"placement.{name}: expected true or false")
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ValueError("placement.tenant: expected up to 63 letters, digits, dots, dashes, underscores")
    if priority not in list(Priority):
        raise ValueError(f"placement.priority: expected one of {', '.join(Priority)}")
    requires = _requires(told.get("requires", {}))
    return {**settings, "tenant": tenant, "priority": Priority(priority), "requires": requires}


def _number(name: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"placement.{name}: expected a whole number from 0 to {most}")
    return value


def _requires(value: Any) -> str:
    """As `placement.labels` has them, in one order."""
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise ValueError("placement.requires: expected an object of labels and their values")
    text = ",".join(f"{key}={value[key]}" for key in sorted(value))
    try:
        if dict(parse(text)) != value:
            raise ValueError("a comma or space is in no label")  # it would have made two labels of one
    except ValueError as error:
        raise ValueError(f"placement.requires: {error}") from None
    return text
