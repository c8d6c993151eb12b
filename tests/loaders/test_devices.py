"""The port of devices, held by each of them (`loaders.memory.device`); and what the fake one pretends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from loaders.base import LoaderError
from loaders.memory.arrays import WEIGHT_DTYPES
from loaders.memory.device import DEVICES, CopyFailed, Device, DeviceFull, DeviceLost, Move, Span, open_device
from loaders.memory.fake import Clock, FakeDevice, Fault
from loaders.memory.layout import ITEM_BYTES, laid_out

MIB = 1 << 20


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


no_gpu = pytest.mark.skipif(not has_gpu(), reason="there is no NVIDIA GPU")


@pytest.fixture(params=[pytest.param(k, marks=[pytest.mark.gpu, no_gpu] if k == "cuda" else []) for k in DEVICES])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    opened = open_device(request.param, 4 * MIB, 2 * MIB)
    yield opened
    opened.close()


def _filled(device: Device, seed: int) -> bytes:
    given = np.random.default_rng(seed).integers(0, 255, MIB, np.uint8).tobytes()
    device.slab[:MIB] = given
    return given


def test_bytes_go_up_and_come_down(device: Device) -> None:
    given = _filled(device, 1)
    device.up([Move(0, 3 * MIB, 1000), Move(1000, MIB, MIB - 1000)]).wait()
    device.slab[:] = bytes(2 * MIB)
    copying = device.down([Move(3 * MIB, MIB, 1000), Move(MIB, MIB + 1000, MIB - 1000)])
    copying.wait()
    assert copying.done()
    assert bytes(device.slab[MIB:]) == given
    assert not any(device.slab[:MIB])


def test_bytes_are_moved_within_arena_and_slab(device: Device) -> None:
    given = _filled(device, 3)
    device.shift([Move(0, MIB, 1000), Move(5000, MIB + 1000, 24)], in_slab=True).wait()
    device.up([Move(MIB, 0, 1024)]).wait()
    device.shift([Move(0, 2 * MIB, 1024)], in_slab=False).wait()
    device.down([Move(2 * MIB, 0, 1024)]).wait()
    assert bytes(device.slab[:1024]) == given[:1000] + given[5000:5024]


def test_copies_end_in_the_order_in_which_they_were_started(device: Device) -> None:
    first = _filled(device, 1)
    early = device.up([Move(0, 0, MIB)])
    late = device.up([Move(512, 0, MIB - 512)])
    late.wait()
    early.wait()
    device.down([Move(0, MIB, MIB)]).wait()
    assert bytes(device.slab[MIB:]) == first[512:] + first[-512:]


@pytest.mark.parametrize("datatype", ITEM_BYTES)
def test_views_are_the_bytes_where_they_lie(device: Device, datatype: str) -> None:
    layout = laid_out([("w", datatype, (40_000,)), ("b", datatype, (3, 5)), ("none", datatype, (0, 2))])
    given = _filled(device, 2)
    large = layout.places[1].offset  # the run in two pieces, the second before the first
    spans = [Span(0, 2 * MIB, large), Span(large, MIB, layout.size_bytes - large)]
    device.up([Move(0, 2 * MIB, large), Move(large, MIB, layout.size_bytes - large)]).wait()
    views = device.views(layout, spans)
    assert list(views) == ["w", "b", "none"]
    for place in layout.places:
        found = views[place.name]
        assert tuple(found.shape) == place.shape
        if not isinstance(found, np.ndarray):
            import torch

            found = found.contiguous().view(torch.uint8).cpu().numpy()
        assert found.tobytes() == given[place.offset : place.end]


def test_the_device_tells_its_memory(device: Device) -> None:
    memory = device.memory()
    assert 0 < memory.used_bytes <= memory.total_bytes
    assert len(device.slab) == device.slab_bytes == 2 * MIB
    assert device.arena_bytes == 4 * MIB


@pytest.mark.parametrize("kind", ["host", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def test_memory_that_is_not_there_is_told(kind: str) -> None:
    with pytest.raises(DeviceFull, match="memory of 4611686018427387904 bytes cannot be had"):
        open_device(kind, 1 << 62, 0)
    with pytest.raises(DeviceFull, match="device memory of 2048 bytes cannot be had"):
        FakeDevice(2048, 0, total_bytes=1024)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(LoaderError, match="unknown kind of device 'tpu': expected one of cuda, host, fake"):
        open_device("tpu", 0, 0)


@pytest.mark.skipif(has_gpu(), reason="there is an NVIDIA GPU")
def test_no_gpu_is_told() -> None:
    pytest.importorskip("torch")
    with pytest.raises(LoaderError, match="there is no CUDA device 0: torch finds 0"):
        open_device("cuda", 0, 0)


def test_host_views_cannot_be_written() -> None:
    device = open_device("host", MIB, 0)
    view = device.views(laid_out([("w", "FP32", (4,))]), [Span(0, 0, 512)])["w"]
    assert view.dtype == WEIGHT_DTYPES["FP32"]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_the_link_is_a_token_bucket() -> None:
    clock = Clock()
    device = FakeDevice(MIB, MIB, link_bytes_per_s=1e6, copy_latency_s=0.5, burst_bytes=1e6, clock=clock)
    clock.advance_to(10)
    free = device.up([Move(0, 0, 500_000)])  # out of what idleness gathered
    queued = device.up([Move(0, 0, 1_000_000)])
    other_way = device.down([Move(0, 0, 1_000_000)])
    assert not free.done()
    free.wait()
    assert clock.now_s == 10.5
    other_way.wait()
    assert clock.now_s == 10.5  # credit of its own
    assert not queued.done()
    queued.wait()
    assert clock.now_s == 11.0


def test_faults_come_once_each_in_turn() -> None:
    device = FakeDevice(MIB, MIB)
    device.slab[:4] = b"abcd"
    device.faults += [Fault.FAILS, None, Fault.CORRUPT, Fault.LOST]
    with pytest.raises(CopyFailed):
        device.up([Move(0, 0, 4)]).wait()
    assert bytes(device.arena[:4]) == bytes(4)
    device.up([Move(0, 0, 4)]).wait()
    assert bytes(device.arena[:4]) == b"abcd"
    device.up([Move(0, 0, 4)]).wait()
    assert bytes(device.arena[:4]) != b"abcd"
    pending = device.up([Move(0, 0, 4)])
    behind = device.up([Move(0, 0, 4)])
    for copying in (pending, behind):
        with pytest.raises(DeviceLost):
            copying.wait()
    with pytest.raises(DeviceLost):
        device.up([])


def test_books_of_a_device_larger_than_the_machine() -> None:
    device = FakeDevice(1 << 45, 1 << 44, moves_bytes=False)
    device.up([Move(0, 1 << 44, 1 << 40)]).wait()
    assert device.clock.now_s == pytest.approx((1 << 40) / 50e9, rel=0.01)
