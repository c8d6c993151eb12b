"""Labels are Kubernetes' (object names and labels, "Syntax and character set")."""

from __future__ import annotations

import pytest

from placement.labels import MAX_LABELS, missing, parse


def test_parse() -> None:
    assert parse("") == {}
    assert parse("gpu=h200, zone=a,") == {"gpu": "h200", "zone": "a"}
    assert parse("nvidia.com/gpu.product=H100-80GB,spot=") == {"nvidia.com/gpu.product": "H100-80GB", "spot": ""}


@pytest.mark.parametrize(
    "text",
    ["gpu", "=h200", "gpu=-x", "-gpu=x", "a b=c", f"{'k' * 64}=v", f"k={'v' * 64}", "a/b/c=d", "a=b=c", "Ä=b", "/a=b"],
)
def test_not_labels(text: str) -> None:
    with pytest.raises(ValueError, match="expected key=value"):
        parse(text)


def test_given_twice_or_too_many() -> None:
    with pytest.raises(ValueError, match="'a' is given twice"):
        parse("a=1,a=2")
    with pytest.raises(ValueError, match="expected at most"):
        parse(",".join(f"k{n}=v" for n in range(MAX_LABELS + 1)))


def test_missing() -> None:
    assert missing("", "gpu=h200") == []
    assert missing("gpu=h200", "zone=a,gpu=h200") == []
    assert missing("gpu=h200,zone=b", "gpu=a100,zone=b") == ["gpu=h200"]
    assert missing("gpu", "gpu=h200") == ["gpu"]
    assert missing("gpu=h200", "gpu") == ["gpu=h200"]
