"""Labels of pods, and the labels that models require of them, as one text: `gpu=h200,zone=a`.

Keys and values are Kubernetes' (object names and labels, "Syntax and character set"). `node` and `zone` say where a pod
is: copies of a model are spread over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

NODE: Final = "node"
ZONE: Final = "zone"

MAX_LABELS: Final = 64

_NAME: Final = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY: Final = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}")
_VALUE: Final = re.compile(rf"({_NAME})?")


@lru_cache(4_096)
def parse(text: str) -> Mapping[str, str]:
    """The labels in a text.

    Raises:
        ValueError: names the label and what was expected.
    """
    labels: dict[str, str] = {}
    for label in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = label.partition("=")
        if not (equals and _KEY.fullmatch(key) and _VALUE.fullmatch(value)):
            raise ValueError(f"label {label[:128]!r}: expected key=value as Kubernetes has them")
        if key in labels:
            raise ValueError(f"label {key!r} is given twice")
        labels[key] = value
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels, expected at most {MAX_LABELS}")
    return MappingProxyType(labels)


def missing(requires: str, labels: str) -> list[str]:
    """Those of the required labels that a pod does not have. Texts that cannot be read, written by hand or by a later
    version, require what no pod has, or are no labels at all."""
    try:
        required = parse(requires)
    except ValueError:
        return [requires]
    try:
        had = parse(labels)
    except ValueError:
        had = {}
    return [f"{key}={value}" for key, value in required.items() if had.get(key) != value]


def lacks_labels(requires: str) -> str:
    """What is said of a model that no pod may load."""
    return f"no pod has the labels {requires}, which it requires"
