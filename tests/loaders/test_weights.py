"""`loaders.memory.weights`: what comes back is what was written, and what is not whole is told by field."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.base import LoaderError, Tensor
from loaders.memory import weights
from loaders.memory.arrays import WEIGHT_DTYPES
from loaders.memory.layout import ITEM_BYTES, LARGE_BYTES, Layout, laid_out
from loaders.memory.weights import WeightsFile, write_weights
from loaders.memory.weights_index import CorruptWeights

HEAD = struct.Struct("<8sQQQ32s")


def tensors(seed: int = 1) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.normal(size=(200, 128)).astype(np.float32),
        "bias": rng.normal(size=7).astype(np.float32),
        "scale": np.full((), seed, np.float32),
        "dense": rng.normal(size=(256, 256)).astype(np.float32),
        "nothing": np.empty((0, 3), np.int64),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.weights"


@pytest.mark.parametrize("datatype", WEIGHT_DTYPES)
def test_every_datatype_comes_back(path: Path, datatype: str) -> None:
    dtype = WEIGHT_DTYPES[datatype]
    assert dtype.itemsize == ITEM_BYTES[datatype]
    given = np.arange(6).reshape(2, 3).astype(dtype)
    write_weights(path, {"w": given})
    with WeightsFile(path) as file:
        assert file.layout.places[0].datatype == datatype
        found = file.views()["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, given)


def test_views_are_the_files_in_order_and_read_only(path: Path) -> None:
    given = tensors()
    contents = write_weights(path, given, architecture="abc")
    with WeightsFile(path) as file:
        assert (file.contents, file.architecture) == (contents, "abc")
        found = file.views()
    assert list(found) == list(given)  # and they outlive the file object
    for name, tensor in given.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].shape == tensor.shape
        assert not found[name].flags.writeable
        assert not found[name].flags.owndata


def test_other_orders_of_bytes_and_memory_are_stored_as_ours(path: Path) -> None:
    given = np.arange(12, dtype=">f8").reshape(3, 4).T
    write_weights(path, {"w": given})
    with WeightsFile(path) as file:
        np.testing.assert_array_equal(file.views()["w"], given)


def test_tensors_are_written_as_they_are_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one size, and none is held until the end."""
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 8192)
    sizes: list[int] = []

    def made() -> Iterator[tuple[str, Tensor]]:
        for n in range(3):
            sizes.append((path.parent / next(iter(os.listdir(path.parent)))).stat().st_size)
            yield f"w{n}", np.full(LARGE_BYTES, n, np.uint8)

    write_weights(path, made())
    assert sizes == [0, LARGE_BYTES, 2 * LARGE_BYTES]
    with WeightsFile(path) as file:
        assert [int(tensor[-1]) for tensor in file.views().values()] == [0, 1, 2]


def test_any_piece_is_read_into_a_buffer(path: Path) -> None:
    write_weights(path, tensors())
    with WeightsFile(path) as file:
        whole = bytearray(file.layout.size_bytes)
        file.read_into(memoryview(whole)[:1000], 0)
        file.read_into(memoryview(whole)[1000:], 1000)
        assert np.frombuffer(whole, np.uint8).tobytes() == file.run.tobytes()


def test_a_file_without_tensors(path: Path) -> None:
    write_weights(path, {})
    with WeightsFile(path) as file:
        file.verify()
        assert file.views() == {}


@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 200), max_size=3)), max_size=30))
def test_places_are_aligned_and_apart(drawn: list[tuple[str, list[int]]]) -> None:
    layout = laid_out((f"t{n}", datatype, shape) for n, (datatype, shape) in enumerate(drawn))
    end = 0
    for place in layout.places:
        assert end <= place.offset < end + 4096
        assert place.offset % (4096 if place.size_bytes >= LARGE_BYTES else 64) == 0
        end = place.end
    assert layout.size_bytes % 512 == 0
    assert end <= layout.size_bytes < end + 512


def test_contents_do_not_change_a_layout(path: Path) -> None:
    assert write_weights(path, tensors(1)).layout.key == write_weights(path, tensors(2)).layout.key
    assert write_weights(path, {**tensors(1), "more": np.zeros(1)}).layout.key != Layout(()).key


def test_a_failed_write_leaves_the_file_that_was_there(path: Path) -> None:
    write_weights(path, tensors(1))
    was = path.read_bytes()
    for bad in ({"ok": np.zeros(3), "text": np.array(["a"])}, {"": np.zeros(1)}, {"c": np.zeros(1, complex)}):
        with pytest.raises(ValueError, match="expected"):
            write_weights(path, bad)
    with pytest.raises(ValueError, match="'a' is one too many"):
        write_weights(path, [("a", np.zeros(1)), ("a", np.zeros(1))])
    assert path.read_bytes() == was
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="cannot be written: No such file") as refused:
        write_weights(tmp_path / "missing" / "model.weights", tensors())
    assert refused.value.retryable
    with pytest.raises(LoaderError, match="cannot be read: No such file"):
        WeightsFile(tmp_path / "missing")


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        was = file.read(1)[0]
        file.seek(at)
        file.write(bytes([was ^ 1]))


def test_a_flipped_bit_is_found_wherever_it_is(path: Path) -> None:
    contents = write_weights(path, tensors())
    start = HEAD.unpack(path.read_bytes()[: HEAD.size])[1]
    for at, told in ((3, "magic"), (9, "index: "), (40, "index: its checksum"), (start + 5, "index: its checksum")):
        _flip(path, at)
        with pytest.raises(CorruptWeights, match=f"^model.weights: {told}"):
            WeightsFile(path)
        _flip(path, at)
    _flip(path, 4096 + contents.layout.places[1].offset)
    with WeightsFile(path) as file, pytest.raises(CorruptWeights, match="checksum of tensor 'bias' differs"):
        file.verify()


def test_a_file_is_verified_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(path, tensors())
    path.write_bytes(path.read_bytes())  # another writer's
    checked: list[str] = []
    monkeypatch.setattr(weights, "check_digests", lambda name, *_: checked.append(name))
    for _ in range(3):
        with WeightsFile(path) as file:
            file.verify()
    assert checked == [path.name]


@pytest.mark.parametrize("cut", [0, 30, 5000, -1])
def test_a_file_cut_short_is_refused(path: Path, cut: int) -> None:
    write_weights(path, tensors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptWeights, match=r"magic|file size"):
        WeightsFile(path)


def _forged(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An index that says something else, with all checksums right."""
    whole = path.read_bytes()
    start = HEAD.unpack(whole[: HEAD.size])[1]
    head, _, digests = whole[start:].partition(b"\n")
    told = {**json.loads(head), "digests": digests.decode()}
    change(told)
    last = told.pop("digests", "")
    index = json.dumps(told).encode() + b"\n" + last.encode()
    head = HEAD.pack(b"densemw1", start, len(index), start + len(index), hashlib.sha256(index).digest())
    path.write_bytes(head + whole[HEAD.size : start] + index)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda told: told.clear(), "index: expected an object"),
        (lambda told: told.update(architecture=7), "architecture: expected"),
        (lambda told: told.update(more=1), "index: expected an object"),
        (lambda told: told.update(tensors={}), "tensors: expected a list"),
        (lambda told: told["tensors"][1].pop("length"), r"tensors\[1\]: expected name"),
        (lambda told: told["tensors"][1].update(offset=True), r"tensors\[1\]: expected name"),
        (lambda told: told["tensors"][1].update(offset=64), r"tensors\[1\]\.offset, length: expected"),
        (lambda told: told["tensors"][1].update(length=1 << 40), r"tensors\[1\]\.offset, length: expected"),
        (lambda told: told["tensors"][1].update(shape=[1 << 60]), "shape of 'bias': expected at most"),
        (lambda told: told["tensors"][1].update(shape=[-1]), "shape of 'bias': expected"),
        (lambda told: told["tensors"][1].update(shape=[1] * 33), "shape of 'bias': expected at most 32"),
        (lambda told: told["tensors"][1].update(shape=[7.0]), r"tensors\[1\]\.shape: expected integers"),
        (lambda told: told["tensors"][1].update(datatype="BYTES"), "datatype of 'bias': expected one of"),
        (lambda told: told["tensors"][1].update(name="x" * 2000), "name: expected 1 to 1024"),
        (lambda told: told["tensors"][1].update(name="dense"), "name: expected to be unique"),
        (lambda told: told.update(digests=told["digests"][1:]), "digests: expected"),
        (lambda told: told.update(digests=told["digests"] + "\n" + 64 * "0"), "digests: expected"),
        (lambda told: told["tensors"].pop(3), r"tensors\[3\]\.offset|digests: expected"),
    ],
)
def test_a_hostile_index_is_refused_by_field(path: Path, change: Callable[[dict[str, Any]], object], told: str) -> None:
    write_weights(path, tensors())
    _forged(path, change)
    with pytest.raises(CorruptWeights, match=told):
        WeightsFile(path)


def test_models_of_one_architecture_share_their_layout(path: Path) -> None:
    """It is parsed once, and kept once for a thousand of them."""
    write_weights(path, tensors(), "a")
    other = path.with_name("other.weights")
    write_weights(other, {name: array * 0 for name, array in tensors().items()}, "a")
    with WeightsFile(path) as one, WeightsFile(other) as two:
        assert one.layout is two.layout
        assert one.contents.digests != two.contents.digests


def test_a_populated_file_is_resident_before_it_is_read(path: Path) -> None:
    write_weights(path, {"w": np.ones(4 << 20, np.uint8)})
    with WeightsFile(path) as file:
        file.populate()
        start = file.run.ctypes.data
        with open("/proc/self/smaps") as smaps:
            lines = iter(smaps)
            mapped = next(line for line in lines if line.startswith(f"{start - 4096:x}-"))
            resident_kb = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        assert path.name in mapped
        assert resident_kb >= 4096
        assert (file.views()["w"] == 1).all()
