"""Model repositories as Triton and MLServer users have them, and settings through the registry's key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.artifacts import resolve
from loaders.base import TensorSpec
from loaders.datatypes import DTYPES
from mesh.declared import MAX_CONFIG_BYTES
from mesh.repository import RepositoryModel, scan
from mesh.settings import MAX_KEY_CHARS, ModelSettings, from_key, to_key

# Triton, docs/user_guide/model_configuration.md, with what its examples carry beside the signature.
CONFIG = r"""
# a comment with a list [ { and a "quote
name: "m"
backend: "onnxruntime"
max_batch_size: 8
input [
  { name: "INPUT0" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, -1, 224 ] },
  { name: "text [{" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output { name: "OUTPUT0" data_type: TYPE_BF16 dims: 1000 label_filename: 'labels "[.txt' }
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] }, { count: 1 kind: KIND_CPU } ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
optimization { execution_accelerators {
  gpu_execution_accelerator : [ { name : "tensorrt" parameters { key: "precision_mode" value: "FP16" } } ]
} }
sequence_batching {
  direct { }
  control_input [ { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] } ]
}
parameters [ { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/env.tar.gz" } } ]
parameters: { key: "other" value: { string_value: "\"x\" [" } }
model_warmup # and its list
[ { name: "w" inputs: { key: "INPUT0" value: { data_type: TYPE_FP32 dims: 3 zero_data: true } } } ]
version_policy: { latest { num_versions: 2 } }
"""
# MLServer, docs/reference/model-settings.md
SETTINGS: dict[str, Any] = {
    "name": "income",
    "implementation": "mlserver_sklearn.SKLearnModel",
    "platform": "sklearn",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "parameters": {"content_type": "np"}}],
    "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1]}],
    "parameters": {"uri": "./model.bin", "version": "v0.1.0", "content_type": "pd", "extra": {"a": [1, {"b": None}]}},
    "max_batch_size": 16,
}


def lay(root: Path, files: dict[str, str | dict[str, Any]]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


def only(root: Path) -> RepositoryModel:
    (model,), problems = scan(root)
    assert problems == []
    return model


def test_the_highest_version_is_served_and_strangers_are_ignored(tmp_path: Path) -> None:
    # Triton, docs/user_guide/model_repository.md: version directories; a name that begins with 0 is no version
    files = ("m/2/model.onnx", "m/10/model.onnx", "m/011/model.onnx", "m/x/model.pt", "n/model.synthetic.json")
    lay(tmp_path, dict.fromkeys((*files, "o/iris.joblib", "o/.iris.pkl", "README.md", ".git/config"), ""))
    models, problems = scan(tmp_path)
    assert problems == []
    assert [(m.model_id, m.format, m.version, str(m.path.relative_to(tmp_path))) for m in models] == [
        ("m", "onnx", "10", "m/10/model.onnx"),
        ("n", "synthetic", "", "n/model.synthetic.json"),
        ("o", "sklearn", "", "o/iris.joblib"),
    ]
    assert [to_key(model) for model in models] == ['{"version":"10"}', "", ""]


def test_a_realistic_triton_configuration(tmp_path: Path) -> None:
    lay(tmp_path, {"m/config.pbtxt": CONFIG, "m/1/model.onnx": "", "m/1/other.onnx": ""})
    model = only(tmp_path)
    assert model.inputs == (TensorSpec("INPUT0", "FP32", (-1, 3, -1, 224)), TensorSpec("text [{", "BYTES", (-1, 1)))
    assert model.outputs == (TensorSpec("OUTPUT0", "BF16", (-1, 1000)),)
    assert (model.version, model.max_batch_size, model.path.name) == ("1", 8, "model.onnx")


def test_triton_file_name_version_policy_and_shapes_without_batching(tmp_path: Path) -> None:
    config = """default_model_filename: "net.onnx" version_policy: { specific: { versions: [1, 2] } }
        input [ { name: "x" data_type: TYPE_INT64 dims: [ ] } ] max_batch_size: 0"""
    lay(tmp_path, {"m/config.pbtxt": config, **dict.fromkeys([f"m/{n}/net.onnx" for n in (1, 2, 3)], "")})
    model = only(tmp_path)
    assert (model.version, model.path) == ("2", tmp_path / "m/2/net.onnx")
    assert model.inputs == (TensorSpec("x", "INT64", ()),)


@pytest.mark.parametrize(
    ("says", "files", "format_name", "path"),
    [
        ('platform: "onnxruntime_onnx"', ["1/model.onnx", "1/model.pt"], "onnx", "1/model.onnx"),
        ('backend: "pytorch"', ["1/model.onnx", "1/model.pt"], "torch", "1/model.pt"),
        (
            'backend: "onnxruntime"',
            ["2/model.onnx/model.onnx", "2/model.onnx/w.bin"],
            "onnx",
            "2/model.onnx/model.onnx",
        ),
        ('default_model_filename: "net.onnx"', ["1/net.onnx/model.onnx"], "onnx", "1/net.onnx/model.onnx"),
        ("", ["7/model.onnx/model.onnx", "3/model.onnx"], "onnx", "7/model.onnx/model.onnx"),
    ],
)
def test_tritons_names_say_which_file_is_the_model(
    tmp_path: Path, says: str, files: list[str], format_name: str, path: str
) -> None:
    lay(tmp_path, {"m/config.pbtxt": says, **dict.fromkeys([f"m/{name}" for name in files], "")})
    model = only(tmp_path)
    assert (model.format, model.path, model.version) == (format_name, tmp_path / "m" / path, path[0])
    default = "net.onnx" if "net" in path else ""
    code = frozenset(["pt"])
    assert resolve(format_name, str(tmp_path / "m"), allowed_code=code, default_model_filename=default) == model.path


@pytest.mark.parametrize(
    ("says", "file", "needs"),
    [
        ('platform: "tensorrt_plan"', "model.plan", "tensorrt"),
        ("", "model.plan", "tensorrt"),
        ('backend: "dali"', "model.dali", "dali"),
        ('platform: "ensemble"', "", "ensemble"),
        ('backend: "python"', "model.py", "python"),
        ("", "model.py", "python"),
        ("", "model.graphdef", "tensorflow"),
    ],
)
def test_what_only_a_model_server_can_run(tmp_path: Path, says: str, file: str, needs: str) -> None:
    script = "import triton_python_backend_utils as pb_utils"
    lay(tmp_path, {"m/config.pbtxt": says, f"m/1/{file or 'empty'}": script})
    models, ((_, reason),) = scan(tmp_path)
    assert models == []
    assert reason.endswith(f"models need a model server: --runtime-formats {needs}")
    (model,), problems = scan(tmp_path, served=[needs])
    assert (model.format, model.path, problems) == (needs, tmp_path / "m", [])


def test_dynamic_batching(tmp_path: Path) -> None:
    # Triton, docs/user_guide/batcher.md; MLServer, docs/user-guide/adaptive-batching.md
    config = "max_batch_size: 8 dynamic_batching { preferred_batch_size: [8, 4] max_queue_delay_microseconds: 100 }"
    lay(tmp_path / "triton", {"m/config.pbtxt": config, "m/1/model.onnx": ""})
    model = only(tmp_path / "triton")
    assert (model.max_batch_size, model.max_queue_delay_us, model.preferred_batch_sizes) == (8, 100, (4, 8))
    assert not model.one_by_one
    lay(tmp_path / "none", {"m/config.pbtxt": "max_batch_size: 0", "m/1/model.onnx": ""})
    assert only(tmp_path / "none").one_by_one  # the model has no batch dimension
    lay(tmp_path / "mlserver", settings(max_batch_size=16, max_batch_time=0.5))
    assert only(tmp_path / "mlserver").max_queue_delay_us == 500_000


@pytest.mark.parametrize("where", ["m", "m/3"])
def test_mlserver_settings(tmp_path: Path, where: str) -> None:
    lay(tmp_path, {f"{where}/model-settings.json": SETTINGS, f"{where}/model.bin": "", "m/3/model.onnx": ""})
    model = only(tmp_path)
    assert (model.model_id, model.format, model.path) == ("income", "sklearn", tmp_path / where / "model.bin")
    assert (model.version, model.max_batch_size) == ("v0.1.0", 16)
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert model.parameters == {"a": [1, {"b": None}]}


def settings(**changes: Any) -> dict[str, str | dict[str, Any]]:
    return {"m/model-settings.json": {**SETTINGS, **changes}, "m/model.bin": ""}


def config(text: str) -> dict[str, str | dict[str, Any]]:
    return {"m/config.pbtxt": text, "m/1/model.onnx": ""}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"m/.keep/x": ""}, "no model file in 'm': expected model with one of .onnx, "),
        ({"m/1/weights.bin": ""}, "no model file in '1'"),
        ({"m/model.onnx": "", "m/model.pt": ""}, "several model files: model.onnx, model.pt"),
        ({"m/a.onnx": "", "m/b.onnx": ""}, "several model files: a.onnx, b.onnx"),
        ({"m/v1/model.onnx": "", "m/latest/model.onnx": ""}, "'latest', 'v1': a version directory's name is a number"),
        (
            {"m/config.pbtxt": "", "m/model-settings.json": {}, "m/model.onnx": ""},
            "it has both model-settings.json and",
        ),
        ({"m/model-settings.json": "{", "m/model.onnx": ""}, "model-settings.json is not JSON: "),
        ({"m/model-settings.json": "[]", "m/model.onnx": ""}, "model-settings.json is not a JSON object"),
        ({"m/model-settings.json": "[" * 99_999, "m/model.onnx": ""}, "model-settings.json is not JSON: maximum recur"),
        ({"m/model-settings.json": " " * (MAX_CONFIG_BYTES + 1)}, "model-settings.json has more than 1048576 bytes"),
        (settings(implementation="mlserver_catboost.CatboostModel"), "unknown implementation 'mlserver_catboost.Catb"),
        (settings(implementation=None), "'./model.bin' is no model: expected one of .onnx"),
        (settings(name="x" * 254), "its id is longer than 253 characters or has unprintable ones"),
        (settings(name="a\nb"), "its id is longer than 253 characters or has unprintable ones"),
        (settings(max_batch_size=-1), "model-settings.json: max_batch_size is not a number from 0"),
        (settings(inputs=[{"name": "x", "datatype": "FP31", "shape": []}]), "inputs[0] 'x': unknown datatype 'FP31'"),
        (settings(outputs=[{"name": "x", "datatype": "FP32"}]), "outputs[0] 'x': shape is not a list of numbers from"),
        (settings(parameters={"uri": "../n/model.bin"}), "'model.bin' leads out of 'm'"),
        (settings(parameters={"uri": "/etc/passwd"}), "'passwd' leads out of 'm'"),
        (settings(parameters={"uri": "absent.pkl"}), "'absent.pkl' is not a file"),
        (settings(parameters={"uri": "x" * 999}), "cannot be read: File name too long"),
        (settings(parameters={"extra": {"a": 1e999}, "uri": "model.bin"}), "Out of range float values"),
        (config("input ["), "config.pbtxt: 1:"),
        (config("a {" * 5_000 + "}" * 5_000), "maximum recursion depth"),
        (config('name: "n"'), "config.pbtxt: name is 'n', expected the directory's"),
        (config("input { name: 'x' data_type: TYPE_FP31 }"), "no value named TYPE_FP31"),
        (config("input { name: 'x' dims: 1 }"), "inputs[0] 'x': unknown datatype 'INVALID'"),
        (config("input { name: 'x' data_type: TYPE_FP32 dims: -2 }"), "shape is not a list of numbers from -1"),
        (config("output { name: 'x' data_type: TYPE_FP32 reshape { } }"), "'x' has reshape: declare the shape that"),
        (config('platform: "pytorch_libtorch"'), "no model file in '1': expected model with one of .pt2, .pt"),
        (config("version_policy { specific { versions: 7 } }"), "none of the versions [7] of version_policy is there"),
        (config("default_model_filename: '../../x'"), "'x' leads out of 'm'"),
    ],
)
def test_a_bad_model_is_reported_and_the_others_are_found(
    tmp_path: Path, files: dict[str, str | dict[str, Any]], reason: str
) -> None:
    lay(tmp_path, {**files, "z/model.onnx": ""})
    models, ((name, found),) = scan(tmp_path)
    assert [model.model_id for model in models] == ["z"]
    assert name == "m"
    assert reason in found
    assert len(found) <= 500


def test_links_may_not_lead_out_and_may_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    lay(tmp_path, {"outside/model.onnx": "secret", "root/ok/data/net.onnx": "", "root/empty/x": ""})
    for name in ("file", "config", "version"):
        (root / name).mkdir()
    (root / "empty/x").unlink()
    (root / "directory").symlink_to(tmp_path / "outside")
    (root / "file/model.onnx").symlink_to(tmp_path / "outside/model.onnx")
    (root / "config/config.pbtxt").symlink_to(tmp_path / "outside/model.onnx")
    (root / "version/1").symlink_to(tmp_path / "outside")
    (root / "ok/model.onnx").symlink_to("data/net.onnx")
    (root / "loop").symlink_to("loop")
    (model,), problems = scan(root)
    assert model.path == root / "ok/model.onnx"
    assert {name: reason.partition(":")[0] for name, reason in problems} == {
        "config": "'config.pbtxt' leads out of 'config'",
        "directory": "'directory' leads out of 'root'",
        "empty": "no model file in 'empty'",
        "file": "'model.onnx' leads out of 'file'",
        "version": "'model.onnx' leads out of 'version'",
    }


def test_two_directories_cannot_have_one_id(tmp_path: Path) -> None:
    lay(tmp_path, {"a/model.onnx": "", "b/model.onnx": "", "b/model-settings.json": {"name": "a"}})
    (model,), ((name, reason),) = scan(tmp_path)
    assert (model.path.parent.name, name) == ("a", "b")
    assert reason == f"its id 'a' is already that of {model.path}"


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_root_that_is_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^the model repository .*{name} cannot be read: N"):
        scan(tmp_path / name)


def test_a_relative_root_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"m/model.onnx": ""})
    monkeypatch.chdir(tmp_path)
    assert only(Path()).path == Path(os.path.realpath(tmp_path)) / "m/model.onnx"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(min_size=1),
        st.sampled_from(list(DTYPES)),
        st.lists(st.integers(-1, 2**63 - 1), max_size=32).map(tuple),
    ),
    max_size=3,
    unique_by=lambda spec: spec.name,
).map(tuple)


@given(
    st.builds(
        ModelSettings,
        parameters=st.dictionaries(st.text(), json_values, max_size=3),
        inputs=specs,
        outputs=specs,
        version=st.text(),
        max_batch_size=st.integers(0, 2**31 - 1),
        max_queue_delay_us=st.integers(0, 10_000_000),
        preferred_batch_sizes=st.sets(st.integers(1, 64)).map(lambda sizes: tuple(sorted(sizes))),
        one_by_one=st.booleans(),
        storage_key=st.text(),
        storage_params=st.dictionaries(st.text(), st.text(), max_size=2),
        schema_path=st.text(),
        model_type=st.text(),
    )
)
def test_settings_survive_the_key(given_settings: ModelSettings) -> None:
    assert from_key(to_key(given_settings)) == given_settings


@given(st.text(), st.dictionaries(st.sampled_from(["parameters", "inputs", "outputs", "version", "x"]), json_values))
def test_no_key_raises_anything_but_a_sentence(text: str, shown: dict[str, Any]) -> None:
    for key in (text, json.dumps(shown)):
        try:
            from_key(key)
        except ValueError as error:
            assert str(error).startswith("key")  # noqa: PT017


def test_modelmeshs_own_key_is_understood() -> None:
    # kserve/modelmesh-serving, controllers/predictor_controller.go; modelmesh-runtime-adapter, puller.go
    assert from_key("") == ModelSettings()
    key = """{"storage_key": "s3", "storage_params": {"bucket": "b"}, "schema_path": "s.json", "disk_size_bytes": 7,
        "model_type": {"name": "onnx", "version": "1"}}"""
    settings = from_key(key)
    assert (settings.storage_key, settings.storage_params, settings.schema_path) == ("s3", {"bucket": "b"}, "s.json")
    assert settings.model_type == from_key('{"model_type": "onnx"}').model_type == "onnx"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("[]", "key is not a JSON object"),
        ("no", "key is not JSON: Expecting value"),
        ("[" * 9_999, "key is not JSON: maximum recursion"),
        ("1" * 9_999, "key is not JSON: Exceeds the limit"),
        (" " * (MAX_KEY_CHARS + 1), "key has 65537 characters, at most 65536 are allowed"),
        ('{"inputs": {}}', "key: inputs is not a list"),
        ('{"inputs": [1]}', "key: inputs[0] is not a JSON object"),
        ('{"inputs": [{"name": "x", "datatype": [], "shape": []}]}', "key: inputs[0]: datatype is not a string"),
        ('{"inputs": [{"name": "x", "datatype": "FP32", "shape": [true]}]}', "shape is not a list of numbers from -1"),
        ('{"inputs": [{"datatype": "FP32", "shape": []}]}', "key: inputs[0]: name is missing or occurs twice"),
        ('{"max_batch_size": "8"}', "key: max_batch_size is not a number from 0"),
        ('{"max_queue_delay_us": 10000001}', "key: max_queue_delay_us is 10000001, expected at most 10000000"),
        ('{"preferred_batch_sizes": 4}', "key: preferred_batch_sizes is not a list"),
        ('{"preferred_batch_sizes": [-4]}', "key: preferred_batch_sizes is not a number from 0"),
        ('{"one_by_one": 1}', "key: one_by_one is neither true nor false"),
        ('{"version": 1}', "key: version is not a string"),
        ('{"parameters": 1}', "key: parameters is not a JSON object"),
    ],
)
def test_a_bad_key_is_refused(key: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        from_key(key)
    assert sentence in str(caught.value)


def test_settings_that_no_key_can_hold() -> None:
    with pytest.raises(ValueError, match="at most 65536 are allowed"):
        to_key(ModelSettings(version="x" * MAX_KEY_CHARS))
