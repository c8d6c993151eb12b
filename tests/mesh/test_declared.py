"""What is declared of a model that is registered by its directory, over what it says itself; and its warm-up.

Authority: mesh/models.py (what goes over what); MLServer, "Model Settings"; Triton, "Model Configuration", with its
`model_warmup`; ModelMesh's `schema_path` (kserve/modelmesh-serving, docs/predictors/predictor-spec.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.base import InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.storage.source import Storage
from mesh.declared import MAX_CONFIG_BYTES
from mesh.models import Models
from mesh.resident import Resident
from mesh.warmup import samples_in, warm_up
from placement.records import ModelRecord
from protos import management_pb2 as mm
from tests.loaders.object_server import ObjectServer, serving
from tests.mesh.models import write_repository
from tests.mesh.pods import Loads, running

MODEL_KEY = {"type": "s3", "access_key_id": "a", "secret_access_key": "hidden", "bucket": "b"}


def spec(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": list(shape)}


CONFIG = "max_batch_size: 4 input { name: 'x' data_type: TYPE_FP32 dims: 8 }"
SETTINGS = json.dumps({"inputs": [spec("x", -1, 8)], "max_batch_size": 5, "parameters": {"uri": "./model.onnx"}})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """`mlp`: x FP32 [n, 8] to y FP32 [n, 3]."""
    write_repository(tmp_path / "models")
    model = tmp_path / "m"
    model.mkdir()
    (model / "model.onnx").write_bytes((tmp_path / "models" / "mlp" / "model.onnx").read_bytes())
    return model


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Any]:
    """Loads a path with a key."""
    models = Models(Storage(tmp_path / "cache", None, None, tmp_path), frozenset())
    residents: list[Resident] = []

    def load(path: Path | str, **key: Any) -> Resident:
        residents.append(models.load(ModelRecord("m", "onnx", str(path), json.dumps(key), 0)))
        return residents[-1]

    yield load
    for resident in residents:
        resident.unload()


@pytest.mark.parametrize(
    ("files", "key", "max_batch_size", "rows"),
    [
        ({}, {}, 0, -1),
        ({"config.pbtxt": CONFIG}, {}, 4, -1),
        ({"model-settings.json": SETTINGS}, {}, 5, -1),
        ({"schema.json": json.dumps({"inputs": [spec("x", 3, 8)]})}, {}, 0, 3),
        ({"config.pbtxt": CONFIG, "schema.json": json.dumps({"inputs": [spec("x", 3, 8)]})}, {}, 4, 3),
        (
            {"schema.json": json.dumps({"inputs": [spec("x", 3, 8)]}), "s": json.dumps({"inputs": [spec("x", 4, 8)]})},
            {"schema_path": "s"},
            0,
            4,
        ),
        (
            {"config.pbtxt": CONFIG, "s": json.dumps({"inputs": [spec("x", 4, 8)]})},
            {"schema_path": "s", "inputs": [spec("x", 5, 8)], "max_batch_size": 6},
            6,
            5,
        ),
    ],
)
def test_what_goes_over_what(
    directory: Path, loaded: Any, files: dict[str, str], key: dict[str, Any], max_batch_size: int, rows: int
) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)
    resident = loaded(directory, **key)
    assert resident.settings.max_batch_size == max_batch_size
    (x,) = resident.model.signature.inputs
    assert x == TensorSpec("x", "FP32", (rows, 8))


def test_a_file_is_not_declared_by_its_neighbours(directory: Path, loaded: Any) -> None:
    (directory / "config.pbtxt").write_text(CONFIG)
    assert loaded(directory / "model.onnx").settings.max_batch_size == 0


@pytest.mark.parametrize(
    ("files", "key", "reason"),
    [
        ({"schema.json": "{"}, {}, "schema.json is not JSON"),
        ({"schema.json": "{}"}, {}, "schema.json: expected inputs or outputs"),
        ({"schema.json": '{"inputs": [{"name": "X"}]}'}, {}, "schema.json: inputs[0] 'X': unknown datatype ''"),
        ({"config.pbtxt": "input ["}, {}, "config.pbtxt: 1:"),
        ({"config.pbtxt": "x" * (MAX_CONFIG_BYTES + 1)}, {}, "config.pbtxt has more than 1048576 bytes"),
        ({"config.pbtxt": "", "model-settings.json": "{}"}, {}, "it has both model-settings.json and config.pbtxt"),
        ({"model-settings.json": '{"parameters": {"uri": "../x"}}'}, {}, "'x' leads out of 'm'"),
        ({"model-settings.json": '{"parameters": {"uri": "absent.onnx"}}'}, {}, "absent.onnx does not exist"),
        ({"s": '{"outputs": 1}'}, {"schema_path": "s"}, "schema_path 's': outputs is not a list"),
        ({}, {"schema_path": "absent"}, "absent does not exist"),
        # a declared signature that the model does not have
        (
            {"schema.json": json.dumps({"inputs": [spec("Z", -1, 8)]})},
            {},
            "declared input Z FP32 [-1, 8] is none of the model's: x FP32 [-1, 8]",
        ),
        (
            {"config.pbtxt": CONFIG.replace("8", "9")},
            {},
            "declared input x FP32 [-1, 9] contradicts the model's x FP32 [-1, 8]",
        ),
    ],
)
def test_a_bad_declaration_fails_the_load(
    directory: Path, loaded: Any, files: dict[str, str], key: dict[str, Any], reason: str
) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(LoaderError) as caught:
        loaded(directory, **key)
    assert reason in str(caught.value)


@pytest.fixture
def server(directory: Path) -> Iterator[ObjectServer]:
    with serving() as server:
        server.objects["a/model.onnx"] = (directory / "model.onnx").read_bytes()
        server.objects["schemas/bad.json"] = json.dumps({"outputs": [spec("y", -1, 4)]}).encode()
        server.objects["schemas/good.json"] = json.dumps({"inputs": [spec("x", 2, 8)]}).encode()
        server.objects["schemas/huge.json"] = b" " * (MAX_CONFIG_BYTES + 1)
        yield server


async def test_a_schema_in_the_models_bucket(tmp_path: Path, server: ObjectServer) -> None:
    # ModelMesh: schema_path is a key of the same bucket; what contradicts the model is its status before any request
    config = tmp_path / "storage.json"
    config.write_text(json.dumps({"minio": {**MODEL_KEY, "endpoint_url": server.url}}))
    stored = {"storage_config": str(config), "cache_dir": str(tmp_path / "cache")}
    async with running("a", Loads(), **stored) as mesh:

        async def status(model_id: str, path: str, schema: str) -> mm.ModelStatusInfo:
            key = json.dumps({"storage_key": "minio", "schema_path": schema})
            info = mm.ModelInfo(type="onnx", path=path, key=key)
            request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
            found = await mesh.clients["a"].call("registerModel", request)
            assert isinstance(found, mm.ModelStatusInfo)
            return found

        assert (await status("1", "a", "schemas/good.json")).status == mm.ModelStatusInfo.LOADED
        assert (await status("2", "s3://b/a", "schemas/good.json")).status == mm.ModelStatusInfo.LOADED
        for model_id, name, reason in (
            ("3", "bad", "declared output y FP32 [-1, 4] contradicts the model's y FP32 [-1, 3]"),
            ("4", "huge", "at most 1048576 are allowed"),
            ("5", "absent", "schemas/absent.json"),
        ):
            told = await status(model_id, "a", f"schemas/{name}.json")
            assert told.status == mm.ModelStatusInfo.LOADING_FAILED
            assert reason in told.errors[0]


class Recorder:
    """A model that keeps what it was asked."""

    waits = 0

    def __init__(self, *inputs: TensorSpec, lenient: bool = False) -> None:
        self.signature = Signature(inputs, (TensorSpec("Y", "FP32", (-1,)),), "test", lenient=lenient)
        self.size_bytes = 1
        self.asked: list[dict[str, Tensor]] = []
        self.unloaded = False

    def infer(self, inputs: Any, outputs: Any) -> dict[str, Tensor]:
        self.asked.append(dict(inputs))
        if any((tensor == 7).any() for tensor in inputs.values()):
            raise InferError("seven is too much", bad_input=True)
        return {"Y": np.zeros(1, np.float32)}

    def unload(self) -> None:
        self.unloaded = True


TWO = (TensorSpec("X", "FP32", (-1, -1, 4)), TensorSpec("T", "BYTES", (-1,)))


@pytest.mark.parametrize(
    ("told", "shapes"),
    [
        (None, []),
        (0, []),
        (2, [(1, 1, 4), (1, 1, 4)]),
        ([{"batch_size": 8}, {"count": 2}], [(8, 1, 4), (1, 1, 4), (1, 1, 4)]),
        ([{"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 2, 4], "data": "random"}]}], [(1, 2, 4)]),
        ([{"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 1, 4], "data": [1, 2, 3, 4]}]}], [(1, 1, 4)]),
    ],
)
def test_warm_up_runs_what_was_asked_for(told: Any, shapes: list[tuple[int, ...]]) -> None:
    model = Recorder(*TWO)
    warm_up(model, samples_in("key", told))
    assert [asked["X"].shape for asked in model.asked] == shapes
    assert all(asked["X"].dtype == np.float32 and asked["T"].tolist()[0] == b"" for asked in model.asked)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 1, 4], "data": 7}]}, "seven is too much"),
        ({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 1, 5]}]}, "inputs[0] 'X': shape is [1, 1, 5]"),
        ({"inputs": [{"name": "Z", "datatype": "FP32", "shape": [1]}]}, "'Z': not an input of the model"),
    ],
)
def test_a_failing_warm_up_fails_the_load(sample: dict[str, Any], reason: str) -> None:
    with pytest.raises(LoaderError) as caught:
        warm_up(Recorder(*TWO), samples_in("key", [sample]))
    assert str(caught.value).startswith("warm-up: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("yes", "is neither a number of runs nor a list of objects"),
        (-1, "count is not a number from 0 to 1000"),
        ([{"count": 999}, {"count": 2}], "more than 1000 runs"),
        ([{"batch": 3}], "unknown 'batch', expected count, batch_size or inputs"),
        ([{"inputs": [{"name": "X"}]}], "an input without a name or of unknown datatype None"),
        ([{"inputs": [{"name": "X", "datatype": "FP32", "shape": [-1]}]}], "shape is not a list of numbers from 0"),
        ([{"inputs": [{"name": "X", "datatype": "FP32", "shape": [1 << 40]}]}], "larger than 67108864 bytes"),
        ([{"inputs": [{"name": "X", "datatype": "INT8", "shape": [2], "data": [1]}]}], "data does not fit INT8 [2]"),
    ],
)
def test_a_bad_warm_up_is_refused_at_registration(told: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="key: warmup") as caught:
        samples_in("key", told)
    assert reason in str(caught.value)


def test_warm_up_as_triton_has_it(directory: Path, loaded: Any) -> None:
    # Triton, docs/user_guide/model_configuration.md, "Model Warmup": dims lack the batch dimension
    sample = (
        "model_warmup [ { name: 'w' batch_size: 2 inputs: { key: 'x' value: { data_type: TYPE_FP32 dims: %d %s } } } ]"
    )
    (directory / "config.pbtxt").write_text(CONFIG + sample % (8, "zero_data: true"))
    (told,) = loaded(directory).settings.warmup
    assert told["inputs"][0]["shape"] == [2, 8]
    (directory / "config.pbtxt").write_text(CONFIG + sample % (9, "random_data: true"))
    with pytest.raises(LoaderError, match=r"^warm-up: inputs\[0\] 'x': shape is \[2, 9\], expected \[-1, 8\]$"):
        loaded(directory)
    (directory / "config.pbtxt").write_text(CONFIG + sample % (8, "input_data_file: 'raw'"))
    with pytest.raises(LoaderError, match="model_warmup of 'x': expected zero_data or random_data"):
        loaded(directory)
