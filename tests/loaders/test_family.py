"""`loaders.skeletons.family`: several models in one call answer as each does alone, whatever they are, wherever their
rows lie and however many rows each is asked for; a row is given back with its model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loaders.base import Artifact, InferError, LoaderError, Member, Tensor
from loaders.memory.layout import laid_out
from loaders.memory.process import resident_bytes
from loaders.safetensors import SafetensorsLoader, SafetensorsModel
from loaders.skeletons.rows import GAP_BYTES, MOST_ROW_BYTES, Row, Rows
from tests.loaders.test_safetensors import MLP, NETWORKS, PT2, exported, load, mlp, rows, saved, unloaded  # noqa: F401

LOADER = SafetensorsLoader()
TENANTS = 12


def tenants(folder: Path, name: str) -> list[SafetensorsModel]:
    """Models of one architecture, loaded and joined."""
    folder.mkdir()
    make, declared, _ = NETWORKS.get(name, (mlp, MLP, None))
    models = []
    if name == "exported":
        exported(mlp(), folder / "skeleton.pt2")
    for seed in range(TENANTS):
        module = make()
        torch.manual_seed(seed)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        path = saved(module, folder / f"{seed}.safetensors")
        own = {} if name == "exported" else {"architecture": declared}
        models.append(LOADER.load(Artifact(path, own, allowed_code=PT2)))
    for model in models:
        model.join()
    return models


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[SafetensorsModel]]]:
    root = tmp_path_factory.mktemp("fleets")
    made = {name: tenants(root / name, name) for name in (*NETWORKS, "exported")}
    yield made
    for model in chain.from_iterable(made.values()):
        model.unload()


@pytest.mark.parametrize("name", [*NETWORKS, "exported"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.dictionaries(st.integers(0, TENANTS - 1), st.integers(1, 5), min_size=1),
    gap=st.sampled_from([0, 1, TENANTS]),
    seed=st.integers(0, 99),
)
def test_together_as_alone(
    fleets: dict[str, list[SafetensorsModel]], name: str, asked: dict[int, int], gap: int, seed: int
) -> None:
    rng, models = np.random.default_rng(seed), [fleets[name][n] for n in asked]
    (spec,), outputs = models[0].signature.inputs, [models[0].signature.outputs[0].name]
    requests = []
    for count in asked.values():
        shape = [count, *(3 if size < 0 else size for size in spec.shape[1:])]
        x = rng.integers(0, 20, shape) if spec.datatype == "INT64" else rng.standard_normal(shape).astype(np.float32)
        requests.append({spec.name: x})
    family = models[0].family
    assert family is not None
    assert family.rows is not None
    family.rows._gap = gap
    together = family.infer_many(models, requests, outputs)
    for model, request, found in zip(models, requests, together, strict=True):
        expected = model.infer(request, outputs)
        assert list(found) == outputs
        assert found[outputs[0]].dtype == expected[outputs[0]].dtype
        np.testing.assert_allclose(found[outputs[0]], expected[outputs[0]], rtol=1e-4, atol=1e-5)


def test_models_that_join_answer_as_before_and_are_members(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "model.safetensors")
    model, x = load(Artifact(path, {"architecture": MLP})), {"input": rows(3, 8)}
    assert isinstance(model, Member)
    before = model.infer(x, ["output"])["output"]
    model.join()
    model.join()
    path.unlink()
    np.testing.assert_array_equal(model.infer(x, ["output"])["output"], before)
    model.unload()
    model.join()  # too late, and no matter
    assert model.row is None


def test_a_bad_request_is_told_and_the_others_run_alone(fleets: dict[str, list[SafetensorsModel]]) -> None:
    models = fleets["words"][:3]
    requests: list[dict[str, Tensor]] = [{"input": np.array([[n]])} for n in (1, 20, 3)]  # there are 20 words
    family = models[0].family
    assert family is not None
    with pytest.raises(InferError) as refusal:
        family.infer_many(models, requests, ["output"])
    assert refusal.value.bad_input
    models[0].infer(requests[0], ["output"])


def test_who_is_not_run_together(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "model.safetensors")
    apart = load(Artifact(path, {"architecture": MLP, "together": False}))
    other = load(Artifact(path, {"architecture": MLP}))
    assert apart.family is None
    assert other.family is not None
    apart.join()
    assert apart.row is None
    large = saved(nn.Sequential(nn.Linear(1100, 1100)), tmp_path / "large.safetensors")
    declared = {"input": {"shape": [-1, 1100]}, "layers": [{"linear": "0"}]}
    assert large.stat().st_size > MOST_ROW_BYTES
    assert load(Artifact(large, {"architecture": declared})).family is None


def test_rows_are_the_only_copy_and_memory_goes_back(tmp_path: Path) -> None:
    wide = {"input": {"shape": [-1, 1000]}, "layers": [{"linear": "0"}]}
    path, count, size = tmp_path / "model.safetensors", 24, 4 * 1001 * 1000
    saved(nn.Sequential(nn.Linear(1000, 1000)), path)
    warm = load(Artifact(path, {"architecture": wide}))
    warm.join()
    before = resident_bytes()
    models = [load(Artifact(path, {"architecture": wide})) for _ in range(count)]
    for model in models:
        model.join()
        model.infer({"input": rows(1, 1000)}, ["output"])
    held = resident_bytes() - before
    assert 0.9 * count * size < held < 1.2 * count * size
    for model in models:
        model.unload()
    assert resident_bytes() - before < 0.2 * count * size
    again = load(Artifact(path, {"architecture": wide}))
    again.join()
    assert again.row is not None
    assert again.row.number == 1  # the first that is free
    again.unload()
    warm.unload()


def test_no_memory_for_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    path = saved(mlp(hidden=19), tmp_path / "model.safetensors")
    model = load(Artifact(path, {"architecture": MLP}))
    monkeypatch.setattr("loaders.skeletons.rows.mmap.mmap", full)
    with pytest.raises(LoaderError, match=r"no memory for a row: .*Cannot allocate") as refusal:
        model.join()
    assert refusal.value.retryable
    model.infer({"input": rows(1, 8)}, ["output"])
    model.unload()


def test_tenants_come_and_go_while_others_run(fleets: dict[str, list[SafetensorsModel]], tmp_path: Path) -> None:
    """A window may hold rows that are written or cleared meanwhile; nobody's answer depends on them."""
    models, path = fleets["perceptron"][::3], saved(mlp(7), tmp_path / "model.safetensors")
    family, outputs = models[0].family, ["output"]
    assert family is not None
    requests = [{"input": rows(2, 8)} for _ in models]
    expected = family.infer_many(models, requests, outputs)
    stop, wrong = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            found = family.infer_many(models, requests, outputs)
            if any(not np.array_equal(a["output"], b["output"]) for a, b in zip(found, expected, strict=True)):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        model = load(Artifact(path, {"architecture": MLP}))
        model.join()
        model.unload()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def placed(each: Rows, numbers: Sequence[int], size_bytes: int = 4000) -> list[Row]:
    """Models of which each has its number in all bytes, at these places."""
    taken = [each.put(torch.full((size_bytes,), n % 251, dtype=torch.uint8))[0] for n in range(max(numbers) + 1)]
    return [taken[n] for n in numbers]


@pytest.mark.parametrize(
    ("numbers", "rows_read"),
    [
        ([3], [1]),
        ([4, 3, 5], [3]),
        ([0, 9], [10]),  # to read eight rows more takes no longer than another call
        ([0, 100], [1, 1]),
        ([300, 0, 100, 101], [4]),  # copied together
    ],
)
def test_neighbours_run_where_they_lie_and_others_are_copied_together(numbers: list[int], rows_read: list[int]) -> None:
    each = Rows(laid_out([("w", "FP32", [1000])]), 4000)
    parts = list(each.parts(placed(each, numbers)))
    assert [part.size for part in parts] == rows_read
    found = {n: part.weights["w"][place].view(torch.uint8) for part in parts for n, place in part.places}
    assert {n: set(run.tolist()) for n, run in found.items()} == {n: {m % 251} for n, m in enumerate(numbers)}


def test_large_rows_are_not_copied_together() -> None:
    each = Rows(laid_out([("w", "UINT8", [GAP_BYTES + 1])]), GAP_BYTES + 1)
    assert [part.size for part in each.parts(placed(each, [0, 1, 5, 9], GAP_BYTES + 1))] == [2, 1, 1]


def test_shelves_are_added_when_they_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.skeletons.rows._MOST_SHELF_ROWS", 4)
    each = Rows(laid_out([("w", "FP32", [1000])]), 4000)
    chosen = placed(each, [0, 1, 4, 5])
    assert len({id(row.shelf) for row in chosen}) == 2
    assert [part.size for part in each.parts(chosen)] == [2, 2]
