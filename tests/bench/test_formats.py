"""`bench.formats` with one kind of model. Authority: issue 5: every format against its framework by hand, outputs
equal; sizes against what unloading gives back."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.formats import sizes, sizes_table, times, times_table
from bench.zoo import ZOO
from loaders import LOADERS
from loaders.prepare.trust import TOLERANCE

XGBOOST = {"xgboost": ZOO["xgboost"]}


async def test_a_table_of_times(tmp_path: Path) -> None:
    (row,) = await times(XGBOOST, 0, 0.001, tmp_path)
    for way in row["ways"].values():
        assert way["difference"] < TOLERANCE
        assert min(way["load_ms"], way["run_1_us"], way["run_32_us"]) > 0
    assert times_table([row]).splitlines()[2].startswith("| xgboost | ")


async def test_a_table_of_sizes(tmp_path: Path) -> None:
    rows = await sizes(XGBOOST, tmp_path, 2)
    assert [row["size"] for row in rows] == [0, 1]
    assert all(0.5 < row["told"] / row["true"] < 2 for row in rows)
    assert sizes_table(rows).splitlines()[-1].startswith("| all (2) | ")


def test_shares_are_of_the_true_bytes() -> None:
    row = {"kind": "xgboost", "true": 100.0, "expected": 109, "learned": 40, "told": 130.0}
    line = sizes_table([row]).splitlines()[-1]
    assert line == "| all (1) | 0 to 0 | 100% / 100% / 100% | 1.09x | 0% / 0% / 0% | 0.40x | 0% / 0% / 100% | 1.30x |"


@pytest.mark.parametrize("kind", ZOO)
def test_every_kind_is_of_a_format_of_ours(kind: str) -> None:
    assert ZOO[kind].format in LOADERS
