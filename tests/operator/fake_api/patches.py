"""JSON patches (RFC 6902), merge patches (RFC 7386), and of server-side apply the merging."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch


def patched(old: dict[str, Any], how: str, body: Any) -> dict[str, Any]:
    """A new object.

    Raises:
        ValueError: the patch does not fit.
    """
    if "json-patch" in how:
        try:
            return dict(jsonpatch.apply_patch(old, body))
        except jsonpatch.JsonPatchException as error:
            raise ValueError(str(error)) from None
    if "merge-patch" in how or "apply-patch" in how:
        return dict(_merged(copy.deepcopy(old), copy.deepcopy(body)))
    raise ValueError(f"content type {how!r} is none of a patch")


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = old if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result
