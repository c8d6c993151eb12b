"""`loaders.memory.tiered` with `safetensors` models: the answers of `SafetensorsLoader.load`, wherever the weights have
been, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loaders.base import Artifact, Tensor
from loaders.memory.device import CopyFailed, DeviceLost, open_device
from loaders.memory.fake import FakeDevice, Fault
from loaders.memory.store import Store
from loaders.memory.tier import NoRoom
from loaders.memory.tiered import TieredLoader, TieredModel, load_tiered
from loaders.safetensors import SafetensorsLoader
from loaders.skeletons.family import families
from tests.loaders.test_devices import no_gpu
from tests.loaders.test_safetensors import MLP, mlp, rows, saved

BUFFER = 32 << 10
LOADER = SafetensorsLoader()


def artifact(tmp_path: Path, seed: int, hidden: int = 300, dtype: torch.dtype | None = None) -> Artifact:
    return Artifact(saved(mlp(seed, hidden), tmp_path / f"{seed}.safetensors", dtype), {"architecture": MLP})


def answers(of: Artifact, x: Tensor) -> Tensor:
    model = LOADER.load(of)
    try:
        return model.infer({model.signature.inputs[0].name: x}, ["output"])["output"]
    finally:
        model.unload()


def asked(model: TieredModel, x: Tensor) -> Tensor:
    return model.infer({model.signature.inputs[0].name: x}, ["output"])["output"]


def brought(store: Store, key: str, of: Artifact, *, keep_in_host: bool = False) -> TieredModel:
    return load_tiered(store, key, LOADER, of, keep_in_host=keep_in_host)


@pytest.mark.parametrize("kind", ["fake", "host", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_answers_are_the_same_wherever_the_weights_were(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    assert isinstance(LOADER, TieredLoader)
    x = rows(2, 8)
    of = [artifact(tmp_path, seed, dtype=dtype) for seed in (1, 2)]
    expected = [answers(each, x) for each in of]
    store = Store(open_device(kind, 1 << 20, (1 << 20) + 2 * BUFFER), BUFFER)
    one, two = (brought(store, str(n), each, keep_in_host=n == 1) for n, each in enumerate(of))
    assert one.size_bytes == LOADER.weights_bytes(of[0]) == store.usage(store.device).taken_bytes // 2
    assert [family.models for family in families.in_use()] == [2]
    for model, answer in ((one, expected[0]), (two, expected[1])):
        np.testing.assert_allclose(
            asked(model, x).astype(float), answer.astype(float), rtol=1e-2 if kind == "cuda" else 0
        )
    one.demote()
    one.drop(store.device)
    two.drop(store.device)
    two.promote()
    one.promote()
    for model, answer in ((one, expected[0]), (two, expected[1])):
        np.testing.assert_allclose(
            asked(model, x).astype(float), answer.astype(float), rtol=1e-2 if kind == "cuda" else 0
        )
    for model in (one, two):
        model.unload()
    assert store.usage(store.device).taken_bytes == store.usage(store.host).taken_bytes == 0
    assert not families.in_use()


def test_tensors_that_tenants_share_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = nn.Linear(512, 512)
    store = Store(FakeDevice(1 << 23, 2 * BUFFER), BUFFER)
    layers = {"input": {"shape": [-1, 512]}, "layers": [{"linear": "0"}, {"linear": "1"}]}
    models = []
    for seed in range(3):
        torch.manual_seed(seed + 1)
        path = saved(nn.Sequential(backbone, nn.Linear(512, 4)), tmp_path / f"{seed}.safetensors")
        models.append(brought(store, str(seed), Artifact(path, {"architecture": layers})))
    usage = store.usage(store.device)
    assert usage.saved_bytes >= 2 * 512 * 512 * 4
    for model in models:
        model.unload()


@pytest.mark.parametrize("keep_in_host", [False, True])
@pytest.mark.parametrize(("fault", "error"), [(Fault.FAILS, CopyFailed), (Fault.LOST, DeviceLost)])
def test_a_copy_that_fails_leaves_nothing(
    tmp_path: Path, keep_in_host: bool, fault: Fault, error: type[Exception]
) -> None:
    device = FakeDevice(1 << 20, (1 << 20) + 2 * BUFFER)
    store = Store(device, BUFFER)
    device.faults.append(fault)
    with pytest.raises(error):
        brought(store, "m", artifact(tmp_path, 1), keep_in_host=keep_in_host)
    assert store.usage(store.device).taken_bytes == store.usage(store.host).taken_bytes == 0
    assert not families.in_use()
    assert bool(store.lost) == (fault is Fault.LOST)


def test_a_full_host_is_no_failure_and_a_full_device_is(tmp_path: Path) -> None:
    store = Store(FakeDevice(20 << 10, (10 << 10) + 2 * BUFFER), BUFFER)
    model = brought(store, "m", artifact(tmp_path, 1), keep_in_host=True)
    assert not model.in_host
    with pytest.raises(NoRoom):
        brought(store, "n", artifact(tmp_path, 2), keep_in_host=True)
    model.unload()
    assert not families.in_use()
