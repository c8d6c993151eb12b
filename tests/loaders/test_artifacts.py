"""`loaders.artifacts`: paths, code by permission only, parameters, declared signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders import LOADERS
from loaders.artifacts import agreed, parameters, resolve
from loaders.base import Artifact, LoaderError, Signature, TensorSpec

NO_CODE: frozenset[str] = frozenset()


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_file_by_path_or_uri(tmp_path: Path, form: str) -> None:
    path = put(tmp_path, "a.onnx") / "a.onnx"
    assert resolve("onnx", form.format(path), allowed_code=NO_CODE) == path


def test_a_file_uri_is_percent_decoded(tmp_path: Path) -> None:  # RFC 3986, section 2.1
    put(tmp_path, "a b.onnx")
    assert resolve("onnx", f"file://{tmp_path}/a%20b.onnx", allowed_code=NO_CODE).name == "a b.onnx"


@pytest.mark.parametrize(
    ("names", "default", "expected"),
    [
        (("model.onnx", "other.onnx"), "", "model.onnx"),
        (("other.onnx", "weights.bin", "._other.onnx"), "", "other.onnx"),
        (("a.onnx", "b.onnx"), "b.onnx", "b.onnx"),
    ],
)
def test_the_model_of_a_directory(tmp_path: Path, names: tuple[str, ...], default: str, expected: str) -> None:
    put(tmp_path, *names)
    found = resolve("onnx", str(tmp_path), allowed_code=NO_CODE, default_model_filename=default)
    assert found == tmp_path / expected


@pytest.mark.parametrize(
    ("versions", "expected"), [((), "10/model.onnx"), ((1, 2, 3), "2/model.onnx"), ((7,), "model.onnx")]
)
def test_the_model_of_a_directory_with_versions(tmp_path: Path, versions: tuple[int, ...], expected: str) -> None:
    """Triton, "Model Repository": numbers that do not begin with 0; the newest that the version policy allows."""
    for name in ("1", "2", "10", "011", "latest"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "model.onnx")
    put(tmp_path, "model.onnx")
    assert resolve("onnx", str(tmp_path), allowed_code=NO_CODE, versions=versions) == tmp_path / expected


def test_a_directory_prefers_the_format_that_runs_no_code(tmp_path: Path) -> None:
    put(tmp_path, "model.joblib", "model.skops")
    assert resolve("sklearn", str(tmp_path), allowed_code=frozenset({"joblib"})).name == "model.skops"


@pytest.mark.parametrize("uri", ["", "synthetic"])
def test_synthetic_models_need_no_file(uri: str) -> None:
    assert resolve("synthetic", uri, allowed_code=NO_CODE) == Path("synthetic")


@pytest.mark.parametrize(
    ("format_name", "uri", "says"),
    [
        ("onnx", "s3://bucket/m.onnx", "storage scheme 's3' is not supported: expected a path or file://"),
        ("onnx", "m.onnx", "'m.onnx' is not absolute"),
        ("onnx", "", "'' is not absolute"),
        ("onnx", "file://host/m.onnx", "names the host 'host'"),
        ("onnx", "{}/wrong.pb", "wrong.pb is no onnx model: expected .onnx"),
        ("onnx", "{}/empty", "holds no .onnx file"),
        ("onnx", "{}/two", r"holds several models \(a.onnx, b.onnx\)"),
        ("onnx", "{}/absent.onnx", "does not exist"),
        ("caffe", "{}/m.caffe", "unknown model format 'caffe': expected one of "),
    ],
)
def test_refusals_say_why(tmp_path: Path, format_name: str, uri: str, says: str) -> None:
    for name in ("empty", "two"):
        (tmp_path / name).mkdir()
    put(tmp_path / "two", "a.onnx", "b.onnx")
    put(tmp_path, "wrong.pb")
    with pytest.raises(LoaderError, match=says) as refusal:
        resolve(format_name, uri.format(tmp_path), allowed_code=NO_CODE)
    assert refusal.value.retryable == ("holds no" in says or "does not exist" in says)


def test_the_default_model_filename_stays_in_the_directory(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="without folders"):
        resolve("onnx", str(tmp_path), allowed_code=NO_CODE, default_model_filename="../other/model.onnx")


@pytest.mark.parametrize(
    ("format_name", "name"), [(format_name, name) for format_name, entry in LOADERS.items() for name in entry.runs_code]
)
def test_code_needs_permission(tmp_path: Path, format_name: str, name: str) -> None:
    entry = LOADERS[format_name]
    put(tmp_path, f"model{name}" if name in entry.extensions else name)
    code = entry.runs_code[name]
    with pytest.raises(LoaderError, match=f"refused without --allow-code {code}$"):
        resolve(format_name, str(tmp_path), allowed_code=frozenset({"other"}))
    assert entry.name_in(resolve(format_name, str(tmp_path), allowed_code=frozenset({code}))) == name


def test_parameters_of_modelmesh_are_ignored_and_unknown_ones_refused() -> None:
    # ModelMesh controller, "key" of mmesh.ModelInfo
    modelmesh = {"storage_key": "s", "storage_params": {}, "model_type": {}, "schema_path": "", "disk_size_bytes": 1}
    assert parameters(Artifact(Path("/m"), {**modelmesh, "version": "1", "device": "cpu"}), "onnx", "device") == {
        "device": "cpu"
    }
    with pytest.raises(LoaderError, match="unknown parameter 'devise': onnx models take device, providers"):
        parameters(Artifact(Path("/m"), {"devise": "cpu"}), "onnx", "device", "providers")


OWN = Signature(
    inputs=(TensorSpec("a", "FP32", (-1, 4)), TensorSpec("b", "INT64", ())),
    outputs=(TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "BYTES", (-1,))),
    platform="test",
)


def test_a_declaration_narrows_the_own_signature() -> None:
    b, a = TensorSpec("b", "INT64", (2,)), TensorSpec("a", "FP32", (8, -1))
    declared = Artifact(Path("/m"), inputs=(b, a), outputs=(TensorSpec("y", "FP32", (-1, 3)),))
    agreement = agreed(OWN, declared)
    assert agreement.inputs == (TensorSpec("a", "FP32", (8, 4)), b)  # rank 0 is unknown rank to ONNX Runtime
    assert agreement.outputs == (TensorSpec("y", "FP32", (-1, 3)),)
    assert agreed(OWN, Artifact(Path("/m"))) == OWN


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (TensorSpec("a", "FP64", (-1, 4)), r"declared input a FP64 \[-1, 4\] contradicts the model's a FP32 \[-1, 4\]"),
        (TensorSpec("a", "FP32", (-1, 5)), "contradicts"),
        (TensorSpec("a", "FP32", (4,)), "contradicts"),
        (TensorSpec("c", "FP32", (-1, 4)), "none of the model's: a FP32"),
        (TensorSpec("a", "FP32", (-1, 4)), r"declared inputs a FP32 \[-1, 4\], the model has .*b INT64"),
    ],
)
def test_contradictions_tell_both_sides(spec: TensorSpec, says: str) -> None:
    with pytest.raises(LoaderError, match=says):
        agreed(OWN, Artifact(Path("/m"), inputs=(spec,)))
