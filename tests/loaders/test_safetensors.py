"""`loaders.safetensors`: the module's own answers with weights that safetensors wrote, on a declared network and on an
exported one; many models, one skeleton. Authority: torch's modules; the safetensors format; `--allow-code`."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.safetensors import SafetensorsLoader, SafetensorsModel
from loaders.skeletons.family import families
from loaders.skeletons.header import read_header

LOADER = SafetensorsLoader()
PT2 = frozenset({"pt2"})
LAYERS: list[object] = [{"linear": "0"}, "relu", {"linear": "2"}]
MLP: dict[str, object] = {"input": {"shape": [-1, 8]}, "layers": LAYERS}


LOADED: list[SafetensorsModel] = []


def load(artifact: Artifact) -> SafetensorsModel:
    """A model that is unloaded after the test."""
    LOADED.append(LOADER.load(artifact))
    return LOADED[-1]


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    yield
    for model in LOADED:
        if model.weights:
            model.unload()
    LOADED.clear()


def mlp(seed: int = 0, hidden: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3)).eval()


def saved(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> Path:
    save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in module.state_dict().items()}, path)
    return path


def rows(*shape: int) -> Tensor:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 2, stride=2, bias=False)
        self.head = nn.Linear(96, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.down(torch.tanh(self.features(x))).flatten(1)).softmax(-1)
        return answer


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.words(x)
        answer: torch.Tensor = self.head((y + self.block(y)).mean(1))
        return answer


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Tensor]] = {
    "perceptron": (mlp, MLP, rows(5, 8)),
    "convolutions": (
        Convolutions,
        {
            "input": {"name": "image", "shape": [-1, 1, 8, 8]},
            "output": "probabilities",
            "layers": [
                {"conv2d": "features", "padding": 1},
                "tanh",
                {"conv2d": "down", "stride": 2},
                "flatten",
                {"linear": "head"},
                "softmax",
            ],
        },
        rows(2, 1, 8, 8),
    ),
    "words": (
        Words,
        {
            "input": {"datatype": "INT64", "shape": [-1, -1]},
            "layers": [
                {"embedding": "words"},
                {"residual": [{"layernorm": "block.0"}, {"linear": "block.1"}, "gelu"]},
                "mean",
                {"linear": "head"},
            ],
        },
        np.array([[1, 2, 19], [0, 0, 7]]),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_declared_network_answers_as_the_module_does(tmp_path: Path, name: str) -> None:
    make, declared, x = NETWORKS[name]
    module = make()
    path = saved(module, tmp_path / "weights.safetensors")
    model = load(Artifact(path, {"architecture": declared}))
    (given,), (answer,) = model.signature.inputs, model.signature.outputs
    found = model.infer({given.name: x}, [answer.name])[answer.name]
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (answer.datatype, answer.shape) == ("FP32", (-1, *expected.shape[1:]))
    model.unload()


def test_free_sizes_of_outputs_are_told(tmp_path: Path) -> None:
    declared = {"input": {"datatype": "INT64", "shape": [-1, -1]}, "layers": [{"embedding": "words"}]}
    save_file({"words.weight": torch.zeros(20, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "architecture.json").write_text(json.dumps(declared))
    assert load(Artifact(tmp_path)).signature.outputs == (TensorSpec("output", "FP32", (-1, -1, 8)),)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2), (torch.float64, 1e-5)])
def test_weights_of_other_floating_types(tmp_path: Path, dtype: torch.dtype, rtol: float) -> None:
    module, x = mlp(), rows(4, 8)
    model = load(Artifact(saved(module, tmp_path / "w.safetensors", dtype), {"architecture": MLP}))
    found = model.infer({"input": x}, ["output"])["output"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), rtol=rtol, atol=rtol)


def exported(module: nn.Module, path: Path) -> None:
    program = torch.export.export(module, (torch.ones(4, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, path)


def test_an_exported_skeleton_takes_any_tenants_weights(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net, self.norm = mlp(seed), nn.BatchNorm1d(3)
            self.norm.running_mean = torch.randn(3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.norm(self.net(x)), "twice": x * torch.tensor([2.0])}

    program = torch.export.export(Normed(0).eval(), (torch.ones(4, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    x, models = rows(3, 8), []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        torch.export.save(program, folder / "skeleton.pt2")
        module = Normed(seed).eval()
        saved(module, folder / "model.safetensors")
        model = load(Artifact(folder, allowed_code=PT2))
        models.append(model)
        found = model.infer({"x": x}, ["scores", "twice"])
        np.testing.assert_allclose(found["scores"], module(torch.from_numpy(x))["scores"].detach().numpy(), rtol=1e-5)
        np.testing.assert_array_equal(found["twice"], x * 2)
    assert models[0].architecture is models[1].architecture
    assert models[1].size_bytes < models[0].size_bytes  # the first pays for the skeleton


def test_a_skeleton_exported_without_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = mlp()
    program = torch.export.export(
        empty, (torch.ones(4, 8, device="meta"),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "mlp.pt2")
    module, x = mlp(3), rows(2, 8)
    path = saved(module, tmp_path / "model.safetensors")
    model = load(Artifact(path, {"skeleton": "mlp.pt2"}, allowed_code=PT2))
    found = model.infer({"input": x}, ["OUTPUT__0"])["OUTPUT__0"]
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-5)


def test_models_of_one_architecture_share_a_skeleton_until_the_last_goes(tmp_path: Path) -> None:
    artifacts = [
        Artifact(saved(mlp(seed), tmp_path / f"{seed}.safetensors"), {"architecture": MLP}) for seed in range(3)
    ]
    other = Artifact(saved(mlp(hidden=17), tmp_path / "wide.safetensors"), {"architecture": MLP})
    before = len(families.in_use())
    models = [load(artifact) for artifact in (*artifacts, other)]
    assert len({model.architecture for model in models}) == 2
    x = rows(1, 8)
    answers = [model.infer({"input": x}, ["output"])["output"] for model in models]
    assert len({answer.tobytes() for answer in answers}) == 4
    for model in models:
        model.unload()
    assert len(families.in_use()) == before


@pytest.mark.parametrize("kind", ["declared", "exported"])
def test_sizes_are_told_from_the_header(tmp_path: Path, kind: str) -> None:
    path = saved(mlp(hidden=4096), tmp_path / "model.safetensors")
    if kind == "exported":
        exported(mlp(hidden=4096), tmp_path / "skeleton.pt2")
    artifact = Artifact(path, {"architecture": MLP} if kind == "declared" else {}, allowed_code=PT2)
    estimate = LOADER.estimate_bytes(artifact)
    model = load(artifact)
    weights = 4 * (9 * 4096 + 3 * 4097)
    assert weights < model.size_bytes < estimate * 1.25 < weights * 2.2


def test_writing_to_a_weight_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "model.safetensors")
    before = path.read_bytes()
    model = load(Artifact(path, {"architecture": MLP}))
    model.weights["0.weight"].zero_()
    assert path.read_bytes() == before


def test_a_file_with_tensors_at_odd_addresses(tmp_path: Path) -> None:
    module, x = mlp(), rows(2, 8)
    data = saved(module, tmp_path / "even.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(struct.pack("<Q", length + 3) + data[8 : 8 + length] + b"   " + data[8 + length :])
    model = load(Artifact(odd, {"architecture": MLP}))
    found = model.infer({"input": x}, ["output"])["output"]
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-5)


def test_what_the_request_is_to_blame_for(tmp_path: Path) -> None:
    declared = {"input": {"datatype": "INT64", "shape": [-1, -1]}, "layers": [{"embedding": "words"}, "mean"]}
    save_file({"words.weight": torch.zeros(20, 8)}, tmp_path / "model.safetensors")
    model = load(Artifact(tmp_path / "model.safetensors", {"architecture": declared}))
    with pytest.raises(InferError, match="index out of range") as refusal:
        model.infer({"input": np.array([[20]])}, ["output"])
    assert refusal.value.bad_input


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGED: dict[str, tuple[object, bytes, str]] = {
    "no JSON": (b"{nope", b"", "its header is damaged: Expecting"),
    "too deep": (b"[" * 100_000, b"", "its header is damaged: "),
    "no object": ([1], b"", "expected a JSON object"),
    "one name twice": (b'{"a":{},"a":{}}', b"", "a name comes twice"),
    "no tensor": ({"a": 7}, b"", "'a': expected a tensor"),
    "unknown dtype": ({"a": {**F32, "dtype": "C64"}}, b"1234", "dtype of 'a': expected one of BOOL, .*not 'C64'"),
    "shape of texts": ({"a": {**F32, "shape": ["1"]}}, b"1234", "shape of 'a': expected at most 32 sizes"),
    "negative shape": ({"a": {**F32, "shape": [-1]}}, b"1234", "shape of 'a': expected at most 32 sizes"),
    "huge shape": ({"a": {**F32, "shape": [1 << 40, 1 << 40]}}, b"1234", "data_offsets of 'a': expected 48357"),
    "one offset": ({"a": {**F32, "data_offsets": [0]}}, b"1234", "data_offsets of 'a': expected begin and end"),
    "too few bytes": ({"a": {**F32, "data_offsets": [0, 3]}}, b"123", "expected 4 bytes, not 3"),
    "a hole": ({"a": {**F32, "data_offsets": [4, 8]}}, b"12345678", "'a': expected to begin at 0, not 4"),
    "overlap": ({"a": F32, "b": F32}, b"1234", "'b': expected to begin at 4, not 0"),
    "truncated": ({"a": F32}, b"123", "has 3 bytes of tensors: expected 4 by its header"),
    "more than told": ({"a": F32}, b"12345", "has 5 bytes of tensors: expected 4 by its header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, case: str) -> None:
    header, data, message = DAMAGED[case]
    path = header_file(tmp_path / "model.safetensors", header, data)
    for refuse in (LOADER.estimate_bytes, LOADER.load):
        with pytest.raises(LoaderError, match=message) as refusal:
            refuse(Artifact(path, {"architecture": MLP}))
        assert path.name in str(refusal.value)
        assert len(str(refusal.value)) < 700


@pytest.mark.parametrize("data", [b"", b"\1\0\0", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 1 << 60) + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoaderError, match=r"model.safetensors is no safetensors file, or truncated"):
        read_header(path)


def test_a_file_that_is_not_there_may_come(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.estimate_bytes(Artifact(tmp_path / "model.safetensors", {"architecture": MLP}))
    assert refusal.value.retryable


WIDER = {**MLP, "layers": [{"linear": "0"}, "relu", {"linear": "0"}, {"linear": "2"}]}
WRONG: dict[str, tuple[object, str]] = {
    "a text": ("mlp", "architecture: expected an object with input, output, layers"),
    "unknown field": ({**MLP, "code": 1}, "architecture: expected an object with input, output, layers"),
    "no input": ({"layers": ["relu"]}, "architecture: input: expected an object with name, datatype, shape"),
    "no batch": ({**MLP, "input": {"shape": [4, 8]}}, "input.shape: expected at most 8 sizes"),
    "no shape": ({**MLP, "input": {}}, "input.shape: expected at most 8 sizes"),
    "datatype": ({**MLP, "input": {"shape": [-1, 8], "datatype": "BYTES"}}, "input.datatype: expected FP32, "),
    "name": ({**MLP, "input": {"shape": [-1, 8], "name": 3}}, "input.name: expected a name"),
    "no layers": ({**MLP, "layers": []}, "layers: expected a list of at least one layer"),
    "many layers": ({**MLP, "layers": ["relu"] * 2000}, "layers: expected at most 1024"),
    "unknown layer": ({**MLP, "layers": ["lstm"]}, "layer 'lstm': expected linear, "),
    "a number": ({**MLP, "layers": [3]}, "expected names of layers, or objects"),
    "no weights": ({**MLP, "layers": ["linear"]}, "linear: expected what the names of its weights begin with"),
    "setting": ({**MLP, "layers": [{"linear": "0", "stride": 2}]}, "setting 'stride' is not right: expected none"),
    "setting's type": ({**MLP, "layers": [{"conv2d": "0", "stride": "2"}]}, "setting 'stride' is not right"),
    "missing weight": ({**MLP, "layers": [{"linear": "9"}]}, "needs 9.weight, the file has 0.bias, 0.weight, 2.bias"),
    "weights left": ({**MLP, "layers": [{"linear": "0"}]}, "the file has 2.bias, 2.weight, of which the architecture"),
    "widths": (WIDER, "the weights do not fit the architecture: .*got .40, 16. X .8, 16."),
    "input's width": ({**MLP, "input": {"shape": [-1, 9]}}, "do not fit the architecture: .*got .40, 9. X .8, 16."),
    "no rows": ({**MLP, "layers": [*LAYERS, "mean", "mean"]}, "do not fit the architecture"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_declaration_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    declared, message = WRONG[case]
    before = families.in_use()
    path = saved(mlp(), tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match=message):
        load(Artifact(path, {"architecture": declared}))
    assert families.in_use() == before


def test_residuals_nest_only_so_deep(tmp_path: Path) -> None:
    layer: Any = "relu"
    for _ in range(20):
        layer = {"residual": [layer]}
    path = saved(mlp(), tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match="residual"):
        load(Artifact(path, {"architecture": {**MLP, "layers": [layer, *LAYERS]}}))


def test_weights_of_mixed_types_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.half() if name == "0.bias" else tensor for name, tensor in mlp().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match="the weights are FP16 and FP32: expected all of one of FP32"):
        load(Artifact(tmp_path / "model.safetensors", {"architecture": MLP}))


def test_a_file_needs_an_architecture_and_code_needs_permission(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "model.safetensors")
    with pytest.raises(LoaderError, match=r"without an architecture: expected parameter 'architecture', or architec"):
        load(Artifact(path))
    exported(mlp(), tmp_path / "skeleton.pt2")
    with pytest.raises(LoaderError, match=r"skeleton.pt2 can run its author's code .* without --allow-code pt2"):
        load(Artifact(path))
    with pytest.raises(LoaderError, match=r"skeleton.pt2 can run its author's code .* without --allow-code pt2"):
        LOADER.estimate_bytes(Artifact(path))
    load(Artifact(path, allowed_code=PT2))
    for wrong in ("../skeleton.pt2", "/etc/skeleton.pt2", "skeleton.pt", 3):
        with pytest.raises(LoaderError, match=r"'skeleton' is .*: expected the name of a .pt2 file beside"):
            load(Artifact(path, {"skeleton": wrong}, allowed_code=PT2))
    with pytest.raises(LoaderError, match="'together' is 1: expected true or false"):
        load(Artifact(path, {"together": 1}, allowed_code=PT2))
    with pytest.raises(LoaderError, match="unknown parameter 'shape'"):
        load(Artifact(path, {"shape": []}))


def test_weights_that_do_not_fit_a_skeleton_are_told_with_it(tmp_path: Path) -> None:
    exported(mlp(hidden=16), tmp_path / "skeleton.pt2")
    for state, message in (
        (mlp(hidden=17).state_dict(), r"needs 0.weight FP32 \[16, 8\], the weights have FP32 \[17, 8\]"),
        (mlp().half().state_dict(), r"needs 0.weight FP32 \[16, 8\], the weights have FP16 \[16, 8\]"),
        ({"0.weight": torch.zeros(16, 8)}, r"needs 0.bias FP32 \[16\], the weights have nothing of that name"),
        (
            {**mlp().state_dict(), "3.bias": torch.zeros(2)},
            r"the weights have 3.bias FP32 \[2\], skeleton.pt2 has noth",
        ),
    ):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(LoaderError, match=message):
            load(Artifact(tmp_path / "model.safetensors", allowed_code=PT2))


def test_skeletons_that_are_none(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Buffer(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.view(-1).add_(1)
            return x + self.seen

    artifact = Artifact(tmp_path, allowed_code=PT2)
    saved(Counting(), tmp_path / "model.safetensors")
    exported(Counting(), tmp_path / "skeleton.pt2")
    with pytest.raises(LoaderError, match="changes its own weights or inputs"):
        load(artifact)
    (tmp_path / "skeleton.pt2").write_bytes(b"PK")
    with pytest.raises(LoaderError, match=r"skeleton.pt2 is not a torch.export archive"):
        load(artifact)
    whole = tmp_path / "whole.pt2"
    exported(mlp(), whole)
    (tmp_path / "skeleton.pt2").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(LoaderError, match=r"skeleton.pt2 is not a torch.export archive"):
        load(artifact)


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_text(json.dumps(MLP))
    with pytest.raises(LoaderError, match=r"holds 0 .safetensors files: expected one"):
        load(Artifact(tmp_path))
    saved(mlp(), tmp_path / "a.safetensors")
    load(Artifact(tmp_path))
    saved(mlp(), tmp_path / "b.safetensors")
    with pytest.raises(LoaderError, match=r"holds 2 .safetensors files: expected one, or model.safetensors"):
        load(Artifact(tmp_path))
    saved(mlp(), tmp_path / "model.safetensors")
    load(Artifact(tmp_path))
    for text, message in (("{", "expected JSON"), (" " * (300 << 10), "expected at most 262144 bytes")):
        (tmp_path / "architecture.json").write_text(text)
        with pytest.raises(LoaderError, match=message):
            load(Artifact(tmp_path))


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    artifact = Artifact(saved(mlp(), tmp_path / "model.safetensors"), {"architecture": MLP})
    before = len(os.listdir("/proc/self/fd"))
    models = [load(artifact) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    for model in models:
        model.unload()
