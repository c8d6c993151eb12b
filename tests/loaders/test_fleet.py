"""`loaders.fleet`: models that share a session answer as their own would, and what they took is given back."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from skl2onnx import to_onnx
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from bench import networks
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.fleet import architectures as fleet_architectures
from loaders.fleet.architectures import FACTS_FILE, SKELETON_FILE, WEIGHTS_FILE, architectures
from loaders.fleet.model import SharedLoader, SharedModel
from loaders.fleet.promotion import Promotions, Worth, build_s, promotions
from loaders.fleet.split import split
from loaders.memory import process
from loaders.memory.weights import WeightsFile
from loaders.prepare import Damaged, NotPreparable

LOADER = SharedLoader()
RNG = np.random.default_rng(3)
Save = Callable[..., Path]


def lstm(path: Path, seed: int) -> None:
    graph = networks.Graph(seed)
    weights = graph.weight(1, 64, 8), graph.weight(1, 64, 16), graph.weight(1, 128)
    x = graph.node("Transpose", "input", perm=(1, 0, 2))
    last = graph.node("Squeeze", graph.node("LSTM", x, *weights, hidden_size=16), graph.constant(np.array([1])))
    last = graph.node("Gather", last, graph.constant(np.array(-1)))
    graph.write(path, ("input", TensorProto.FLOAT, ["batch", "steps", 8]), last, ["batch", 16])


def quantised(path: Path, seed: int) -> None:
    networks.mlp(path.with_suffix(".fp32"), seed, (32, 64, 10))
    quantize_dynamic(path.with_suffix(".fp32"), path)


def quantised_convolution(path: Path, seed: int) -> None:
    """QLinearConv, whose scales and zero points are inputs as its weights are."""
    rng, graph = np.random.default_rng(seed), networks.Graph(seed)
    zero, small = graph.constant(np.uint8(128)), graph.constant(np.float32(0.02 + seed / 1000))
    kernel = graph.constant(rng.integers(-100, 100, (64, 3, 3, 3)).astype(np.int8))
    bias = graph.constant(rng.integers(-1000, 1000, 64).astype(np.int32))
    x = graph.node("QuantizeLinear", "input", small, zero)
    x = graph.node("QLinearConv", x, small, zero, kernel, small, graph.constant(np.int8(0)), small, zero, bias)
    x = graph.node("GlobalAveragePool", graph.node("DequantizeLinear", x, small, zero))
    graph.write(path, ("input", TensorProto.FLOAT, ["batch", 3, 8, 8]), graph.node("Flatten", x), ["batch", 64])


def half(path: Path, seed: int) -> None:
    rng, graph = np.random.default_rng(seed), networks.Graph(seed)
    x = graph.node("Cast", "input", to=TensorProto.FLOAT16)
    x = graph.node("MatMul", x, graph.constant((rng.standard_normal((32, 64)) / 6).astype(np.float16)))
    graph.write(
        path, ("input", TensorProto.FLOAT, ["batch", 32]), graph.node("Cast", x, to=TensorProto.FLOAT), ["batch", 64]
    )


def rows(width: int) -> Tensor:
    return RNG.standard_normal((3, width), np.float32)


NETWORKS: dict[str, tuple[Callable[[Path, int], object], Tensor]] = {
    "mlp": (lambda path, seed: networks.mlp(path, seed, (32, 64, 10)), rows(32)),
    "residual, batch normalisation": (
        lambda path, seed: networks.resnet(path, seed, (1, 1), 8),
        RNG.standard_normal((2, 3, 48, 32), np.float32),
    ),
    "transformer": (
        lambda path, seed: networks.bert(path, seed, layers=2, width=32, words=100, heads=4),
        RNG.integers(0, 100, (2, 9)),
    ),
    "lstm": (lstm, RNG.standard_normal((3, 5, 8), np.float32)),
    "quantised": (quantised, rows(32)),
    "quantised convolution": (quantised_convolution, RNG.standard_normal((2, 3, 8, 8), np.float32)),
    "fp16": (half, rows(32)),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`make(write, seed)`: the file, and the folder that it was split into."""

    def make(write: Callable[[Path, int], object], seed: int = 1) -> tuple[Path, Path]:
        path, folder = tmp_path / f"{seed}.onnx", tmp_path / f"{seed}"
        folder.mkdir()
        write(path, seed)
        split(Artifact(path), folder)
        return path, folder

    return make


def load(folder: Path, **declared: Any) -> SharedModel:
    return LOADER.load(Artifact(folder, **declared))


def own_answer(path: Path, x: Tensor) -> Tensor:
    answer: Tensor = ort.InferenceSession(str(path)).run(["output"], {"input": x})[0]
    return answer


@pytest.mark.parametrize("name", NETWORKS)
def test_fine_tunes_share_a_session_and_answer_as_their_own_would(
    make: Callable[..., tuple[Path, Path]], name: str
) -> None:
    write, x = NETWORKS[name]
    made = [make(write, seed) for seed in (1, 2)]
    models = [load(folder) for _, folder in made]
    (architecture,) = architectures.in_use()
    assert architecture.models == 2
    answers = [model.infer({"input": x}, ["output"])["output"] for model in models]
    for (path, _), answer in zip(made, answers, strict=True):
        expected = own_answer(path, x)
        np.testing.assert_allclose(answer, expected, 1e-4, 1e-4 * np.abs(expected).max())
    assert not np.allclose(answers[0], answers[1], rtol=0.01)
    for model in models:
        assert model.promote()
        again = model.infer({"input": x}, ["output"])["output"]
        np.testing.assert_allclose(again, answers[models.index(model)], 1e-4, 1e-4 * np.abs(again).max())
        model.unload()
    assert not architectures.in_use()


def in_a_loop(path: Path, seed: int) -> None:
    graph = networks.Graph(seed)
    weight = graph.weight(4, 4)
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["input", weight], [f"b{n}"])],
            "branch",
            [],
            [helper.make_tensor_value_info(f"b{n}", TensorProto.FLOAT, ["n", 4])],
        )
        for n in (0, 1)
    ]
    first = graph.node("ReduceMax", "input", keepdims=0)
    condition = graph.node("Greater", first, graph.constant(np.float32(0)))
    last = graph.node("If", condition, then_branch=branches[0], else_branch=branches[1])
    graph.write(path, ("input", TensorProto.FLOAT, ["n", 4]), last, ["n", 4])


def forest(path: Path, seed: int) -> None:
    trees = RandomForestClassifier(4, random_state=seed).fit(rows(4).repeat(9, 0), np.arange(27) % 3)
    path.write_bytes(to_onnx(trees, rows(4), options={"zipmap": False}).SerializeToString())


def regression(path: Path, seed: int) -> None:
    fitted = LogisticRegression().fit(rows(400).repeat(9, 0), np.arange(27) % 3)
    path.write_bytes(to_onnx(fitted, rows(400), options={"zipmap": False}).SerializeToString())


def outside(path: Path, seed: int) -> None:
    networks.mlp(path, seed, (32, 64, 10))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)


def random(path: Path, seed: int) -> None:
    graph = networks.Graph(seed)
    last = graph.node("Add", graph.linear("input", 32, 32), graph.node("RandomNormalLike", "input"))
    graph.write(path, ("input", TensorProto.FLOAT, ["n", 32]), last, ["n", 32])


def overridable(path: Path, seed: int) -> None:
    networks.mlp(path, seed, (32, 64, 10))
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [32, 64]))
    onnx.save(model, path)


def texts(path: Path, seed: int) -> None:
    graph = networks.Graph(seed)
    sums = graph.node("MatMul", graph.node("Cast", "input", to=TensorProto.FLOAT), graph.weight(32, 32))
    graph.write(path, ("input", TensorProto.STRING, ["n", 32]), sums, ["n", 32])


def picky(path: Path, seed: int) -> None:
    graph = networks.Graph(seed)
    x = graph.node("Reshape", "input", graph.constant(np.array([-1, 11])))
    graph.write(
        path, ("input", TensorProto.FLOAT, ["n", "m"]), graph.node("MatMul", x, graph.weight(11, 90)), ["n", 90]
    )


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (in_a_loop, "control flow"),
        (forest, "most of it is graph"),
        (regression, "most of it is graph"),
        (outside, "external data"),
        (random, "answers differently"),
        (overridable, "inputs or outputs too"),
        (texts, "strings"),
        (picky, "no probe runs"),
    ],
)
def test_what_is_not_clearly_splittable_is_refused(
    tmp_path: Path, write: Callable[[Path, int], object], says: str
) -> None:
    write(tmp_path / "model.onnx", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotPreparable, match=says):
        split(Artifact(tmp_path / "model.onnx"), tmp_path / "folder")


def test_models_that_ask_for_a_device_are_served_as_they_are(tmp_path: Path) -> None:
    networks.mlp(tmp_path / "model.onnx", 1, (32, 64, 10))
    for parameters in ({"device": "cuda"}, {"providers": ["CPUExecutionProvider"]}):
        with pytest.raises(NotPreparable, match="device"):
            split(Artifact(tmp_path / "model.onnx", parameters), tmp_path)
    (tmp_path / "folder").mkdir()
    split(Artifact(tmp_path / "model.onnx", {"device": "cpu", "storage_key": "x"}), tmp_path / "folder")


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"junk")
    with pytest.raises(LoaderError, match=r"model\.onnx"):
        split(Artifact(tmp_path / "model.onnx"), tmp_path)


def test_what_authors_write_makes_no_architecture(make: Callable[..., tuple[Path, Path]]) -> None:
    def signed(path: Path, seed: int) -> None:
        networks.mlp(path, seed, (32, 64, 10))
        model = onnx.load(path)
        model.producer_name, model.doc_string, model.graph.name = f"author {seed}", "words " * seed, f"tenant-{seed}"
        model.graph.node[0].doc_string = f"line {seed}"
        for n, node in enumerate(model.graph.node):
            node.name = f"{seed}/{n}"
            node.input[:] = [name if name == "input" else f"{name}/{seed}" for name in node.input]
            node.output[:] = [name if name == "output" else f"{name}/{seed}" for name in node.output]
        for tensor in model.graph.initializer:
            tensor.name += f"/{seed}"
        model.metadata_props.add(key="accuracy", value=f"0.{seed}")
        onnx.save(model, path)

    folders = [make(signed, seed)[1] for seed in (1, 2)]
    assert len({(folder / SKELETON_FILE).read_bytes() for folder in folders}) == 1


def test_signature_is_the_models_own(make: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = make(NETWORKS["mlp"][0])
    model = load(folder)
    assert model.signature.inputs == (TensorSpec("input", "FP32", (-1, 32)),)
    assert model.signature.outputs == (TensorSpec("output", "FP32", (-1, 10)),)
    declared = (TensorSpec("input", "FP32", (4, 32)),)
    other = load(folder, inputs=declared)
    assert other.signature.inputs == declared
    with pytest.raises(LoaderError, match="contradicts"):
        load(folder, inputs=(TensorSpec("input", "FP64", (4, 32)),))
    assert architectures.in_use()[0].models == 2
    model.unload()
    other.unload()


@pytest.mark.parametrize("promoted", [False, True])
def test_what_onnxruntime_calls_invalid_is_the_clients_fault(
    make: Callable[..., tuple[Path, Path]], promoted: bool
) -> None:
    _, folder = make(NETWORKS["mlp"][0])
    model = load(folder)
    if promoted:
        model.promote()
    with pytest.raises(InferError, match="Got: 3 Expected: 32") as refusal:
        model.infer({"input": np.ones((1, 3), np.float32)}, ["output"])
    assert refusal.value.bad_input
    assert model.infer({"input": np.ones((1, 32), np.float32)}, ["output"])["output"].shape == (1, 10)
    model.unload()


def test_a_request_is_not_held_after_its_answer(make: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = make(NETWORKS["mlp"][0])
    model, x = load(folder), rows(32)
    before = sys.getrefcount(x)
    answer = model.infer({"input": x}, ["output"])["output"]
    assert sys.getrefcount(x) == before
    assert answer.flags.owndata
    model.unload()


def test_concurrent_requests_get_their_own_answers(
    make: Callable[..., tuple[Path, Path]], from_eight_threads: Callable[[Callable[[int], bool]], bool]
) -> None:
    made = [make(NETWORKS["mlp"][0], seed) for seed in (1, 2, 3)]
    models = [load(folder) for _, folder in made]
    x = rows(32)
    expected = [own_answer(path, x) for path, _ in made]

    def check(i: int) -> bool:
        if i == 50:
            models[0].promote()
        if i == 150:
            models[0].demote()
        return np.allclose(models[i % 3].infer({"input": x}, ["output"])["output"], expected[i % 3], atol=1e-5)

    assert from_eight_threads(check)
    for model in models:
        model.unload()


def test_models_take_their_weights_and_no_threads_and_give_them_back(tmp_path: Path) -> None:
    folders = []
    for seed in range(12):
        folders.append(tmp_path / f"{seed}")
        folders[-1].mkdir()
        networks.mlp(tmp_path / "m.onnx", seed, (256, 1024, 512, 64))
        split(Artifact(tmp_path / "m.onnx"), folders[-1])
    x = {"input": np.ones((1, 256), np.float32)}
    load(folders[0]).unload()
    gc.collect()
    process.give_back._trim()
    threads, before = len(os.listdir("/proc/self/task")), process.resident_bytes()
    estimates = [LOADER.estimate_bytes(Artifact(folder)) for folder in folders]
    models = [load(folder) for folder in folders]
    for model in models:
        model.infer(x, ["output"])
    taken = process.resident_bytes() - before
    assert len(os.listdir("/proc/self/task")) <= threads + 1  # a timer's, for the next trim
    assert sum(model.size_bytes for model in models) == pytest.approx(taken, rel=0.1)
    assert estimates[0] == models[0].size_bytes > models[1].size_bytes == LOADER.estimate_bytes(Artifact(folders[1]))
    unique = sum(os.path.getsize(folder / WEIGHTS_FILE) for folder in folders)
    assert taken < 1.1 * unique
    assert models[0].promote()
    models[0].infer(x, ["output"])
    assert process.resident_bytes() - before < taken + (2 << 20)  # the copy is there instead of the mapped weights
    for model in models:
        model.unload()
    del models, model
    process.give_back._trim()
    assert process.resident_bytes() - before < taken / 4


def test_damaged_files_are_told(make: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = make(NETWORKS["mlp"][0])
    with monkeypatch.context() as patch:
        patch.setattr(fleet_architectures, "machine", lambda: "another")
        with pytest.raises(Damaged, match="another kind of CPU"):
            load(folder)
    kept = {name: (folder / name).read_bytes() for name in (FACTS_FILE, SKELETON_FILE, WEIGHTS_FILE)}
    for name, content in kept.items():
        (folder / name).write_bytes(content[:-9] + b"x" * 9)
        with pytest.raises(Damaged, match=r"damaged|checksum") as refusal:
            load(folder)
        assert refusal.value.retryable
        (folder / name).write_bytes(content)
    turned = bytearray(kept[WEIGHTS_FILE])
    turned[5000] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(turned)
    with pytest.raises(Damaged, match="checksum of tensor"):
        load(folder)
    assert not architectures.in_use()


def test_a_busy_model_is_promoted_once_that_would_have_paid(make: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = make(lambda path, seed: networks.mlp(path, seed, (256, 512, 64)))
    facts = (folder / FACTS_FILE).read_text().replace('"saving": ', '"saving": 0.5, "was": ')
    (folder / FACTS_FILE).write_text(facts[: facts.index(', "was"')] + facts[facts.index(', "machine"') :])
    model, x = load(folder), {"input": np.ones((1, 256), np.float32)}
    expected = model.infer(x, ["output"])["output"]
    while not promotions.count:
        model.infer(x, ["output"])
    if (thread := promotions.building) is not None:
        thread.join()
    assert promotions.count == 1
    assert promotions.session_bytes == model.session_bytes
    np.testing.assert_allclose(model.infer(x, ["output"])["output"], expected, atol=1e-5)
    model.unload()
    assert promotions.count == 0
    assert not model.promote()  # too late
    assert not architectures.in_use()


class Model:
    """What `Promotions` sees of one."""

    def __init__(self, worth_s: float, session_bytes: int = 10) -> None:
        self.worth, self.session_bytes, self.is_promoted = Worth(), session_bytes, False
        self.worth.add(worth_s, time.perf_counter())

    def promote(self) -> bool:
        self.is_promoted = True
        return True

    def demote(self) -> None:
        self.is_promoted = False


def test_a_place_is_taken_from_what_is_worth_less_than_half() -> None:
    table = Promotions(max_bytes=30)

    def consider(model: Model) -> bool:
        table.consider(model)
        if (thread := table.building) is not None:
            thread.join()
        return model.is_promoted

    first, second, third = Model(4.0), Model(1.0), Model(8.0)
    assert all(map(consider, (first, second, third)))
    assert not consider(Model(1.5))
    assert consider(Model(3.0))
    assert (first.is_promoted, second.is_promoted, third.is_promoted) == (True, False, True)
    assert not consider(Model(1e3, session_bytes=31))
    assert consider(Model(100.0, session_bytes=25))
    assert table.count == 1
    assert table.session_bytes == 25


def test_what_was_spared_counts_half_after_a_minute() -> None:
    worth = Worth()
    worth.add(2.0, 100.0)
    assert worth.at(160.0) == pytest.approx(1.0)
    assert worth.add(1.0, 220.0) == pytest.approx(1.5)
    assert build_s(0) < build_s(1 << 30) / 100


def test_the_weights_file_has_the_architecture(make: Callable[..., tuple[Path, Path]]) -> None:
    path, folder = make(NETWORKS["mlp"][0])
    with WeightsFile(folder / WEIGHTS_FILE) as file:
        assert len(file.architecture) == 64
        stored = file.views()
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert sorted(array.tobytes() for array in stored.values()) == sorted(array.tobytes() for array in given.values())
