"""`loaders.torch`: the module's own answers from exported and scripted files; that both formats can hold code."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loaders import LOADERS
from loaders.base import Artifact, InferError, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.memory.process import malloc_bytes
from loaders.torch import TorchLoader

LOADER = TorchLoader()


class Classifier(torch.nn.Module):
    """Logits of digits; weights are seeded."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images)
        return logits


class SumAndDifference(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": a + b, "difference": a - b}


class Pair(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b, a - b


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def exported(module: torch.nn.Module, path: Path, *examples: torch.Tensor, dynamic: bool = True) -> Artifact:
    sizes = tuple({0: torch.export.Dim("n")} for _ in examples) if dynamic else None
    torch.export.save(torch.export.export(module, examples, dynamic_shapes=sizes), path)
    return Artifact(path)


def scripted(module: torch.nn.Module, path: Path) -> Artifact:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end at every call
        torch.jit.script(module).save(str(path))  # type: ignore[no-untyped-call]
    return Artifact(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The same classifier in both formats, by extension."""
    folder = tmp_path_factory.mktemp("classifier")
    module = Classifier().eval()
    return {
        ".pt2": exported(module, folder / "model.pt2", torch.ones(4, 64)),
        ".pt": scripted(module, folder / "model.pt"),
    }


FORMATS = LOADERS["torch"].extensions


@pytest.mark.parametrize("extension", FORMATS)
def test_answers_are_the_modules_own(
    classifier: dict[str, Artifact], digits: tuple[Tensor, Tensor], extension: str
) -> None:
    images = digits[0].astype(np.float32)
    images.flags.writeable = False  # as tensors of requests are
    model = LOADER.load(classifier[extension])
    answer = model.infer({"images": images}, ["OUTPUT__0"])["OUTPUT__0"]
    with torch.inference_mode():
        expected = Classifier()(torch.from_numpy(images.copy())).numpy()
    np.testing.assert_allclose(answer, expected, rtol=1e-5)
    assert answer.flags.c_contiguous


def test_signatures(classifier: dict[str, Artifact]) -> None:
    program = LOADER.load(classifier[".pt2"]).signature
    assert program.inputs == (TensorSpec("images", "FP32", (-1, 64)),)
    assert program.outputs == (TensorSpec("OUTPUT__0", "FP32", (-1, 10)),)
    script = LOADER.load(classifier[".pt"]).signature
    assert [spec.name for spec in (*script.inputs, *script.outputs)] == ["images", "OUTPUT__0"]
    assert (program.lenient, script.lenient) == (False, True)


@pytest.mark.parametrize("extension", FORMATS)
def test_declared_names_in_tritons_convention(classifier: dict[str, Artifact], extension: str) -> None:
    # Triton, PyTorch backend, "Naming convention": <name>__<index>
    path = classifier[extension].path
    takes, gives = (TensorSpec("INPUT__0", "FP32", (-1, 64)),), (TensorSpec("logits", "FP32", (-1, 10)),)
    model = LOADER.load(Artifact(path, inputs=takes, outputs=gives))
    assert (model.signature.inputs, model.signature.outputs, model.signature.lenient) == (takes, gives, False)
    assert model.infer({"INPUT__0": np.ones((2, 64), np.float32)}, ["logits"])["logits"].shape == (2, 10)
    with pytest.raises(LoaderError, match=r"declared input.*pixels.*images"):
        LOADER.load(Artifact(path, inputs=(TensorSpec("pixels", "FP32", (-1, 64)),)))


def test_several_tensors_by_name_and_by_position(tmp_path: Path) -> None:
    a, b = np.array([[5, 7]], np.int64), np.array([[1, 2]], np.int64)
    example = torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)
    program = LOADER.load(exported(SumAndDifference(), tmp_path / "m.pt2", *example))
    assert [spec.name for spec in program.signature.outputs] == ["sum", "difference"]
    answer = program.infer({"b": b, "a": a}, ["difference"])
    assert {name: tensor.tolist() for name, tensor in answer.items()} == {"difference": [[4, 5]]}

    pair = scripted(Pair(), tmp_path / "m.pt").path
    with pytest.raises(LoaderError, match="forward takes a, b: declare names, datatypes and shapes of inputs"):
        LOADER.load(Artifact(pair))
    takes = tuple(TensorSpec(f"INPUT__{i}", "INT64", (-1, 2)) for i in (1, 0))
    script = LOADER.load(Artifact(pair, inputs=takes))
    answer = script.infer({"INPUT__1": b, "INPUT__0": a}, ["OUTPUT__1", "OUTPUT__0"])
    assert {name: tensor.tolist() for name, tensor in answer.items()} == {"OUTPUT__1": [[4, 5]], "OUTPUT__0": [[6, 9]]}

    keys = scripted(SumAndDifference(), tmp_path / "d.pt").path
    with pytest.raises(LoaderError, match="declare names, datatypes and shapes of outputs"):
        LOADER.load(Artifact(keys, inputs=takes))
    gives = (TensorSpec("difference", "INT64", (-1, 2)),)
    too_many = tuple(TensorSpec(name, "INT64", (-1, 2)) for name in ("sum", "difference", "product"))
    model = LOADER.load(Artifact(pair, inputs=takes, outputs=too_many))
    with pytest.raises(InferError, match="did not answer product") as failure:
        model.infer({"INPUT__1": b, "INPUT__0": a}, ["sum"])
    assert not failure.value.bad_input
    answer = LOADER.load(Artifact(keys, inputs=takes, outputs=gives)).infer(
        {"INPUT__1": b, "INPUT__0": a}, ["difference"]
    )
    assert answer["difference"].tolist() == [[4, 5]]


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name != "BYTES"])
def test_every_datatype_passes_bit_for_bit(same: Artifact, datatype: str) -> None:
    dtype = DTYPES[datatype]
    bits = np.random.default_rng(3).integers(0, 2 if datatype == "BOOL" else 256, 4 * dtype.itemsize, np.uint8)
    tensor = np.frombuffer(bits.tobytes(), dtype).reshape(2, 2)
    answer = LOADER.load(same).infer({"anything": tensor}, ["OUTPUT__0"])["OUTPUT__0"]
    assert (answer.dtype, answer.shape, answer.tobytes()) == (dtype, (2, 2), tensor.tobytes())


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return scripted(Same(), tmp_path_factory.mktemp("same") / "model.pt")


def test_strings_do_not_exist_in_torch(same: Artifact) -> None:
    with pytest.raises(InferError, match="no BYTES") as refusal:
        LOADER.load(same).infer({"x": np.array([b"a"], dtype=object)}, ["OUTPUT__0"])
    assert refusal.value.bad_input
    with pytest.raises(LoaderError, match="is BYTES, which PyTorch does not have"):
        LOADER.load(Artifact(same.path, inputs=(TensorSpec("x", "BYTES", (-1,)),)))


@pytest.mark.parametrize("extension", FORMATS)
def test_sizes_that_do_not_fit_are_the_clients_fault(classifier: dict[str, Artifact], extension: str) -> None:
    with pytest.raises(InferError, match=r"Guard failed|cannot be multiplied") as refusal:
        LOADER.load(classifier[extension]).infer({"images": np.ones((2, 63), np.float32)}, ["OUTPUT__0"])
    assert refusal.value.bad_input
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize("extension", FORMATS)
def test_a_damaged_or_missing_file_is_refused(
    classifier: dict[str, Artifact], tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = classifier[extension].path.read_bytes()
    path = tmp_path / f"bad{extension}"
    for content in (b"", b"junk" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(LoaderError, match=f"bad{extension}"):
            LOADER.load(Artifact(path))
    path.unlink()
    with pytest.raises(LoaderError, match="does not exist") as refusal:
        LOADER.load(Artifact(path))
    assert refusal.value.retryable
    assert not caplog.records


@pytest.mark.parametrize("place", ["pickled weight", "symbolic size"])
def test_an_exported_program_can_run_code_which_is_why_it_needs_permission(
    classifier: dict[str, Artifact], tmp_path: Path, place: str
) -> None:
    """Evidence for `Format.runs_code`: if this fails one day, torch has become safer. The refusal: test_artifacts.py"""
    mark = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (mark,)

    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(classifier[".pt2"].path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if place == "pickled weight" and name.endswith("model_weights_config.json"):
                config = json.loads(data)
                for weight in config["config"].values():
                    weight["use_pickle"] = True
                data = json.dumps(config).encode()
            elif place == "pickled weight" and name.endswith("weights/weight_0"):
                torch.save(Payload(), buffer := io.BytesIO())
                data = buffer.getvalue()
            elif place == "symbolic size" and name.endswith("models/model.json"):
                code = json.dumps(f"__import__('os').mkdir({str(mark)!r})").encode()
                data = re.sub(rb'(?<="expr_str": )"[^"]*"', code, data, count=1)
            target.writestr(name.replace("model/", "evil/", 1), data)
    with pytest.raises(LoaderError):
        LOADER.load(Artifact(evil))
    assert mark.exists()


def test_one_thread_in_every_thread() -> None:
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert found == [torch.get_num_threads()] == [1]


def test_unknown_parameters_are_refused(classifier: dict[str, Artifact]) -> None:
    with pytest.raises(LoaderError, match="unknown parameter 'device': torch models take none"):
        LOADER.load(Artifact(classifier[".pt2"].path, {"device": "cuda"}))


@pytest.mark.parametrize("extension", FORMATS)
def test_concurrent_requests_get_their_own_answers(
    classifier: dict[str, Artifact], extension: str, from_eight_threads: Callable[[Callable[[int], bool]], bool]
) -> None:
    model = LOADER.load(classifier[extension])
    inputs = [np.random.default_rng(i).standard_normal((1 + i % 5, 64), np.float32) for i in range(200)]
    expected = [model.infer({"images": x}, ["OUTPUT__0"])["OUTPUT__0"] for x in inputs]
    assert from_eight_threads(
        lambda i: np.allclose(model.infer({"images": inputs[i]}, ["OUTPUT__0"])["OUTPUT__0"], expected[i], rtol=1e-5)
    )


def test_concurrent_loads_do_not_disturb_each_other(classifier: dict[str, Artifact]) -> None:
    models = []
    workers = [threading.Thread(target=lambda: models.append(LOADER.load(classifier[".pt2"]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {model.signature for model in models} == {models[0].signature}
    assert len(models) == 4


@pytest.mark.parametrize("extension", FORMATS)
def test_sizes_are_the_weights_and_unloading_frees_them(tmp_path: Path, extension: str) -> None:
    module = Classifier(40_000).eval()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    path = tmp_path / f"model{extension}"
    artifact = exported(module, path, torch.ones(4, 64)) if extension == ".pt2" else scripted(module, path)
    models = [LOADER.load(artifact) for _ in range(4)]
    assert models[0].size_bytes == pytest.approx(weights, rel=0.05)
    assert LOADER.estimate_bytes(artifact) == pytest.approx(models[0].size_bytes, rel=0.05)
    held = malloc_bytes()
    for model in models:
        model.unload()
    assert held - malloc_bytes() > 3.8 * weights  # without waiting for the garbage collector


def test_native_code_is_refused(tmp_path: Path) -> None:
    """As `torch._inductor.aoti_compile_and_package` lays it out: what is allowed for `.pt2` is not meant for it."""
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/c.wrapper.so", b"ELF")
    for refuse in (LOADER.estimate_bytes, LOADER.load):
        with pytest.raises(LoaderError, match=r"native code of AOTInductor: refused without --allow-code aoti"):
            refuse(Artifact(path, allowed_code=frozenset({"pt2"})))


@pytest.mark.skipif(
    not os.environ.get("DENSEMESH_COMPILE"), reason="compiling takes half a minute: DENSEMESH_COMPILE=1"
)
@pytest.mark.filterwarnings("ignore")  # of the compiler, not of the loader
def test_native_code(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    program = torch.export.export(
        network, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},)
    )
    path = Path(torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2")))
    model = LOADER.load(Artifact(path, allowed_code=frozenset({"aoti", "pt2"})))
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(model.infer({"x": rows}, ["OUTPUT__0"])["OUTPUT__0"], expected, rtol=1e-5, atol=1e-6)
    for wrong in (rows[:, :3], rows.astype(np.float64), rows[0], np.zeros((65, 4), np.float32)):
        with pytest.raises(InferError) as refusal:
            model.infer({"x": np.ascontiguousarray(wrong)}, ["OUTPUT__0"])
        assert refusal.value.bad_input
    model.unload()
