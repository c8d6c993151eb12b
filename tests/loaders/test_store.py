"""`loaders.memory.store` on the fake device: bytes where they should be, exact books, and one clear error each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaders.base import LoaderError, Tensor
from loaders.memory.device import CopyFailed, DeviceLost, Move
from loaders.memory.fake import FakeDevice, Fault
from loaders.memory.store import Store
from loaders.memory.tier import NoRoom, Tier, TooLarge
from loaders.memory.weights import CorruptWeights, WeightsFile, write_weights
from tests.loaders.weights_made import KIB, Made, made, tensor

BUFFER = 32 * KIB


def opened(arena: int = 1024 * KIB, host: int = 1024 * KIB) -> tuple[Store, FakeDevice]:
    device = FakeDevice(arena, host + 2 * BUFFER)
    return Store(device, BUFFER), device


def found(store: Store, device: FakeDevice, key: object, tier: Tier) -> bytes:
    """What lies where the model should."""
    buffer = device.arena if tier is store.device else device.slab
    return b"".join(bytes(buffer[at : at + size]) for _, at, size in tier.models[key].spans)


def is_right(store: Store, device: FakeDevice, key: object, tier: Tier, model: Made) -> bool:
    spans = tier.models[key].spans
    assert [span.run_offset for span in spans] == [sum(s.size_bytes for s in spans[:n]) for n in range(len(spans))]
    whole = np.frombuffer(found(store, device, key, tier), np.uint8)
    return all(
        whole[place.offset : place.end].tobytes() == model.run[place.offset : place.end].tobytes()
        for place in model.contents.layout.places
    )


def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        threading.Event().wait(0.001)


def test_a_model_goes_through_all_tiers(tmp_path: Path) -> None:
    store, device = opened()
    given: dict[str, Tensor] = {"w": np.arange(40_000, dtype=np.float32).reshape(200, 200), "b": np.ones(3, np.float16)}
    write_weights(tmp_path / "model.weights", given)
    with WeightsFile(tmp_path / "model.weights") as file:
        store.fill("m", file)
        store.promote("m")
        store.drop("m", store.host)
        store.demote("m")
        store.drop("m", store.device)
        store.promote("m")
        with store.using("m") as slot:
            assert list(slot.views) == ["w", "b"]
            for name, array in given.items():
                np.testing.assert_array_equal(slot.views[name], array)
        store.drop("m", store.device)
        store.drop("m", store.host)
        store.load("m", file)  # past the host, through the buffers
        store.check("m", store.device)
        with store.using("m") as slot:
            np.testing.assert_array_equal(slot.views["w"], given["w"])
    assert store.usage(store.host).taken_bytes == 0
    assert store.slots.made == 1  # the address is the same all the time
    assert device.clock.now_s > 0


def test_models_of_one_architecture_meet_each_others_slots() -> None:
    store, _ = opened(arena=400 * KIB)
    for n in range(6):
        store.fill(n, made([tensor(10 * n, 100 * KIB), tensor(10 * n + 1, 10)]))
    for n in range(6):
        if n >= 3:
            store.drop(n - 3, store.device)
        store.promote(n)
    assert store.slots.made == 3


def test_shared_tensors_lie_in_a_tier_once() -> None:
    store, device = opened()
    backbone = [tensor(n, 64 * KIB) for n in range(4)]
    fleet = {n: made([*backbone, tensor(50 + n, 64 * KIB)]) for n in range(5)}
    for n, model in fleet.items():
        store.fill(n, model)
        store.promote(n)
    for tier in (store.host, store.device):
        usage = store.usage(tier)
        assert (usage.taken_bytes, usage.saved_bytes) == (9 * 64 * KIB, 16 * 64 * KIB)
        assert [store.charged_bytes(n, tier) for n in fleet] == [5 * 64 * KIB, *[64 * KIB] * 4]
        assert {store.marginal_bytes(n, tier) for n in fleet} == {64 * KIB}
        assert all(is_right(store, device, n, tier, model) for n, model in fleet.items())
    store.drop(0, store.device)
    assert store.usage(store.device).taken_bytes == 8 * 64 * KIB
    assert store.charged_bytes(1, store.device) == 5 * 64 * KIB  # whoever is here longest
    for n in range(1, 5):
        assert is_right(store, device, n, store.device, fleet[n])


def test_a_full_tier_and_a_model_that_never_fits_are_told_apart() -> None:
    store, _ = opened(arena=128 * KIB, host=256 * KIB)
    store.fill("a", made([tensor(1, 100 * KIB)]))
    store.promote("a")
    store.fill("b", made([tensor(2, 100 * KIB)]))
    with pytest.raises(NoRoom, match="102400 bytes more, but 28672 of the device's memory are free") as full:
        store.promote("b")
    assert full.value.retryable
    with pytest.raises(
        NoRoom, match="102400 bytes more, but 57344 of the host's memory are free, 57344 of them in a row"
    ):
        store.fill("c", made([tensor(3, 100 * KIB)]))
    store.drop("b", store.host)
    large = made([tensor(3, 150 * KIB)])
    with pytest.raises(TooLarge, match="153600 bytes, and the device's memory has 131072") as never:
        store.load("large", large)
    assert not never.value.retryable
    assert store.usage(store.device).models == 1
    assert set(store._catalogue.models) == {"a"}


def test_a_model_in_use_stays() -> None:
    store, _ = opened()
    store.load("m", made([tensor(1)]))
    with store.using("m"), pytest.raises(ValueError, match="in use in the device's memory 1 times"):
        store.drop("m", store.device)
    store.drop("m", store.device)
    with pytest.raises(ValueError, match="'m' is not in the device's memory"), store.using("m"):
        pass


def test_what_a_demotion_reads_stays_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    store, device = opened()
    store.load("m", made([tensor(1)]))
    down = device.down

    def meanwhile(moves: list[Move]) -> object:
        with pytest.raises(ValueError, match="in use"):
            store.drop("m", store.device)
        with pytest.raises(ValueError, match="'m' is not in the host's memory"):
            store.drop("m", store.host)
        return down(moves)

    monkeypatch.setattr(device, "down", meanwhile)
    store.demote("m")
    store.drop("m", store.device)


def _with_holes() -> tuple[Store, FakeDevice, dict[str, Made]]:
    """An arena with four that has room for hardly more, of which the first and the third are given up."""
    store, device = opened(arena=264 * KIB)
    models = {key: made([tensor(n)]) for n, key in enumerate("abcd")}
    for key, model in models.items():
        store.load(key, model)
    for key in "ac":
        store.drop(key, store.device)
        del models[key]
    return store, device, models


def test_room_that_is_in_pieces_is_joined() -> None:
    store, device, models = _with_holes()
    models["large"] = made([tensor(9, 128 * KIB)])
    store.load("large", models["large"])
    assert store.device.compacted_bytes == 64 * KIB
    for key, model in models.items():
        assert is_right(store, device, key, store.device, model)
        with store.using(key) as slot:
            assert slot.views["t0"].tobytes() == model.run.tobytes()
            assert slot.spans == store.device.models[key].spans


def test_what_is_in_use_is_not_moved() -> None:
    store, device, models = _with_holes()
    with store.using("b"), store.using("d"), pytest.raises(NoRoom, match="139264 of the device's memory are free"):
        store.load("large", made([tensor(9, 128 * KIB)]))
    assert store.device.compacted_bytes == 0
    assert all(is_right(store, device, key, store.device, model) for key, model in models.items())


@pytest.mark.parametrize(("fault", "error"), [(Fault.FAILS, CopyFailed), (Fault.LOST, DeviceLost)])
def test_a_move_that_fails_leaves_all_as_it_was(fault: Fault, error: type[LoaderError]) -> None:
    store, device, models = _with_holes()
    spans = {key: store.device.models[key].spans for key in models}
    device.faults.append(fault)
    with pytest.raises(error):
        store.load("large", made([tensor(9, 128 * KIB)]))
    assert bool(store.lost) == (fault is Fault.LOST)
    assert {key: store.device.models[key].spans for key in models} == spans
    assert store.usage(store.device).taken_bytes == 128 * KIB
    assert all(is_right(store, device, key, store.device, model) for key, model in models.items())


def _load(store: Store, model: Made) -> None:
    store.load("m", model)


def _promote(store: Store, model: Made) -> None:
    store.fill("m", model)
    store.promote("m")


WAYS: dict[str, Callable[[Store, Made], None]] = {"load": _load, "promote": _promote}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_fails_leaves_the_books_as_they_were(way: str) -> None:
    store, device = opened()
    model = made([tensor(1, 100 * KIB)])
    device.faults.append(Fault.FAILS)
    with pytest.raises(CopyFailed) as failed:
        WAYS[way](store, model)
    assert failed.value.retryable
    assert store.usage(store.device).taken_bytes == 0
    assert not store.holds("m", store.device)
    if way == "promote":
        store.promote("m")
    else:
        store.load("m", model)
    assert is_right(store, device, "m", store.device, model)


@pytest.mark.parametrize("way", WAYS)
def test_a_device_lost_in_the_middle_of_a_copy_is_fenced(way: str) -> None:
    store, device = opened()
    store.load("other", made([tensor(2)]))
    device.faults += [None, Fault.LOST] if way == "load" else [Fault.LOST]
    model = made([tensor(1, 100 * KIB)])
    with pytest.raises(DeviceLost) as lost:
        WAYS[way](store, model)
    assert lost.value.retryable  # elsewhere
    assert "middle of a copy" in store.lost
    for refused in (
        lambda: store.load("new", model),
        lambda: store.demote("other"),
        lambda: store.using("other").__enter__(),
    ):
        with pytest.raises(DeviceLost):
            refused()
    store.drop("other", store.device)
    assert store.usage(store.device).taken_bytes == 0
    store.fill("host", made([tensor(3)]))  # the host tier lives on
    assert is_right(store, device, "host", store.host, made([tensor(3)]))


def test_a_device_lost_while_it_computes_is_fenced() -> None:
    store, _ = opened()
    store.load("m", made([tensor(1)]))
    with pytest.raises(DeviceLost), store.using("m"):
        raise DeviceLost("an illegal address was met")
    assert store.lost == "an illegal address was met"
    store.drop("m", store.device)


def test_a_corrupt_file_reaches_no_tier(tmp_path: Path) -> None:
    path = tmp_path / "model.weights"
    write_weights(path, {"w": tensor(1)})
    whole = bytearray(path.read_bytes())
    whole[5000] ^= 1
    path.write_bytes(whole)
    store, _ = opened()
    with WeightsFile(path) as file:
        for bring in (store.fill, store.load):
            with pytest.raises(CorruptWeights, match="checksum of tensor 'w' differs"):
                bring("m", file)
    assert store.usage(store.host).models == store.usage(store.device).models == 0


def test_a_byte_that_changed_on_the_way_is_found_by_a_check() -> None:
    store, device = opened()
    store.fill("m", made([tensor(1, 200 * KIB), tensor(2, 5)]))
    device.faults.append(Fault.CORRUPT)
    store.promote("m")
    store.check("m", store.host)
    with pytest.raises(CorruptWeights, match="tensor 't0' of 'm' in the device's memory has changed"):
        store.check("m", store.device)


def test_a_source_that_cannot_be_read_leaves_nothing() -> None:
    class Gone(Made):
        def read_into(self, target: memoryview, offset: int) -> None:
            if offset:
                raise LoaderError("it is gone")
            super().read_into(target, offset)

    store, device = opened()
    model = made([tensor(1, 100 * KIB)])
    with pytest.raises(LoaderError, match="it is gone"):
        store.load("m", Gone(model.contents, model.run))
    assert store.usage(store.device).taken_bytes == 0
    store.load("m", model)
    assert is_right(store, device, "m", store.device, model)


def test_bytes_that_another_load_brings_are_waited_for() -> None:
    """Two fine-tunes at once: the second copies its head only, and is there when the backbone is."""
    store, device = opened()
    backbone = [tensor(n) for n in range(3)]
    first, second = made([*backbone, tensor(10)]), made([*backbone, tensor(11)])
    store.load("before", first)  # so that backbone and head are parts of their own
    store.load("too", second)
    store.drop("before", store.device)
    reading, go, asked = threading.Event(), threading.Event(), list[int]()

    class Slow(Made):
        def read_into(self, target: memoryview, offset: int) -> None:
            reading.set()
            assert go.wait(10)
            super().read_into(target, offset)

    class Counted(Made):
        def read_into(self, target: memoryview, offset: int) -> None:
            asked.append(len(target))
            super().read_into(target, offset)

    store.fill("kept", second)  # on the host: the parts stay as they are
    store.drop("too", store.device)
    assert store.usage(store.device).taken_bytes == 0
    slow = threading.Thread(target=store.load, args=("a", Slow(second.contents, second.run)))
    slow.start()
    assert reading.wait(10)
    other = threading.Thread(target=store.load, args=("b", Counted(first.contents, first.run)))
    other.start()
    _until(lambda: "b" in store.device.models)
    go.set()
    for thread in (slow, other):
        thread.join(10)
    assert sum(asked) == 64 * KIB
    for key, model in (("a", second), ("b", first)):
        assert store.holds(key, store.device)
        assert is_right(store, device, key, store.device, model)


def test_bytes_that_another_load_fails_to_bring_fail_both() -> None:
    store, _ = opened()
    model = made([tensor(1)])
    reading, go = threading.Event(), threading.Event()

    class Broken(Made):
        def read_into(self, target: memoryview, offset: int) -> None:
            reading.set()
            assert go.wait(10)
            raise LoaderError("it is gone")

    told: list[LoaderError] = []

    def load(key: str, source: Made) -> None:
        try:
            store.load(key, source)
        except LoaderError as error:
            told.append(error)

    first = threading.Thread(target=load, args=("a", Broken(model.contents, model.run)))
    first.start()
    assert reading.wait(10)
    second = threading.Thread(target=load, args=("b", model))
    second.start()
    _until(lambda: "b" in store.device.models)
    go.set()
    first.join(10)
    second.join(10)
    assert [str(error) for error in told] == [
        "it is gone",
        "bytes that it shares with another model did not arrive: it is gone",
    ]
    assert store.usage(store.device).taken_bytes == 0
    store.load("b", model)


class AnyOrder(RuleBasedStateMachine):
    """Models that share tensors, moved about as an engine might; the bytes and the books are looked at each time."""

    POOL = (64 * KIB, 64 * KIB, 96 * KIB, 1 * KIB, 200, 128 * KIB, 64 * KIB)
    MODELS = (
        (0, 1, 2, 3),
        (0, 1, 2, 4),
        (2, 0, 1),
        (5, 3, 4),
        (0, 6, 2, 3),
        (3, 4),
        (3, 4),
        (1, 1, 0),
        (0, 1, 2, 5, 6),
    )

    def __init__(self) -> None:
        super().__init__()
        self.store, self.fake = opened(arena=512 * KIB, host=448 * KIB)
        self.models = {key: made([tensor(n, self.POOL[n]) for n in which]) for key, which in enumerate(self.MODELS)}

    def _try(self, do: Callable[[], None]) -> None:
        before = [(tier.arena.taken_bytes, set(tier.models)) for tier in (self.store.host, self.store.device)]
        try:
            do()
        except (NoRoom, CopyFailed, ValueError):
            after = [(tier.arena.taken_bytes, set(tier.models)) for tier in (self.store.host, self.store.device)]
            assert before == after

    keys = st.integers(0, len(MODELS) - 1)

    @rule(key=keys)
    def fill(self, key: int) -> None:
        self._try(lambda: self.store.fill(key, self.models[key]))

    @rule(key=keys)
    def load(self, key: int) -> None:
        self._try(lambda: self.store.load(key, self.models[key]))

    @rule(key=keys, fails=st.booleans())
    def promote(self, key: int, fails: bool) -> None:
        self.fake.faults.extend([Fault.FAILS] if fails else [])
        self._try(lambda: self.store.promote(key))
        self.fake.faults.clear()

    @rule(key=keys)
    def demote(self, key: int) -> None:
        self._try(lambda: self.store.demote(key))

    @rule(key=keys, lower=st.booleans())
    def drop(self, key: int, lower: bool) -> None:
        tier = self.store.host if lower else self.store.device
        if key in tier.models:
            marginal, taken = self.store.marginal_bytes(key, tier), tier.arena.taken_bytes
            self.store.drop(key, tier)
            assert tier.arena.taken_bytes == taken - marginal

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        for tier in (self.store.host, self.store.device):
            for key in tier.models:
                assert is_right(self.store, self.fake, key, tier, self.models[key])  # type: ignore[index]
            usage = self.store.usage(tier)
            assert usage.taken_bytes == sum(part.size_bytes for part in tier.parts)
            assert usage.taken_bytes == sum(tier.charged_bytes(key) for key in tier.models)
            pieces = [extent for stored in tier.parts.values() for extent in stored.extents]
            assert sum(piece.size_bytes for piece in pieces) == usage.taken_bytes
        assert set(self.store._catalogue.models) == {*self.store.host.models, *self.store.device.models}
        assert all(part.transfers == 0 for part in (*self.store.host.parts, *self.store.device.parts))


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
