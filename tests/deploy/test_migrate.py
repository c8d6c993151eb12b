"""`densemesh migrate modelmesh`. Authority: ModelMesh Serving's CRDs, configuration and examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mesh.__main__ import cli
from mesh_operator.inferenceservice import read

MANIFESTS = Path(__file__).parent / "modelmesh"


def migrated(*args: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["migrate", "modelmesh", *args], input=given, standalone_mode=False)


@pytest.fixture
def report(tmp_path: Path) -> str:
    """And in `tmp_path`, the new manifests."""
    result = migrated("--manifests", str(MANIFESTS), "--output", str(tmp_path))
    assert result.exception is None
    assert result.return_value == 1  # one model is refused, and one storage key
    return result.output


def services(folder: Path) -> dict[str, dict[str, Any]]:
    with (folder / "inferenceservices.yaml").open() as file:
        return {f"{m['metadata']['namespace']}/{m['metadata']['name']}": m for m in yaml.safe_load_all(file)}


def test_what_is_written_is_what_the_operator_serves(report: str, tmp_path: Path) -> None:
    written = services(tmp_path)
    assert set(written) == {
        "modelmesh-serving/example-sklearn-isvc",
        "modelmesh-serving/plan",
        "engines/legacy",
        "modelmesh-serving/pvc-predictor",
        "other/legacy",
    }
    for manifest in written.values():
        assert read(manifest).refusals == ()
        assert manifest["metadata"].keys() <= {"name", "namespace", "labels", "annotations"}
        assert "kubectl.kubernetes.io/last-applied-configuration" not in manifest["metadata"]["annotations"]
        assert manifest["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "ModelMesh"
        assert manifest["apiVersion"] == "serving.kserve.io/v1beta1"
        assert "status" not in manifest


def test_runtimes_that_the_mesh_replaces_are_left_out(report: str, tmp_path: Path) -> None:
    written = services(tmp_path)
    model = written["modelmesh-serving/example-sklearn-isvc"]["spec"]["predictor"]["model"]
    storage = {"key": "localMinIO", "path": "sklearn/mnist-svm.joblib"}
    assert model == {"modelFormat": {"name": "sklearn"}, "storage": storage}
    assert written["modelmesh-serving/plan"]["spec"]["predictor"]["model"]["runtime"] == "triton-2.x"
    assert "--runtime triton-2.x=port:8085 --runtime-data port:8001 --runtime-formats tensorrt" in report


def test_predictors_become_inference_services(report: str, tmp_path: Path) -> None:
    """Predictor v1alpha1: path, modelType, storage with a claim, and its deprecated `s3`."""
    written = services(tmp_path)
    claim = {"path": "net.onnx", "parameters": {"type": "pvc", "name": "my-models"}}
    model = written["modelmesh-serving/pvc-predictor"]["spec"]["predictor"]["model"]
    assert model == {"modelFormat": {"name": "onnx"}, "storage": claim}
    bucket = {"key": "localMinIO", "path": "xgb.ubj", "parameters": {"bucket": "trees"}}
    assert written["other/legacy"]["spec"]["predictor"]["model"]["storage"] == bucket
    assert "! spec.gpu: use the annotation densemesh.io/requires" in report


def test_clients_keep_the_names_they_say(report: str, tmp_path: Path) -> None:
    """ModelMesh: model_name is the InferenceService's name. Of two in one mesh, neither can have it."""
    names = {
        name: manifest["metadata"]["annotations"].get("densemesh.io/model-name")
        for name, manifest in services(tmp_path).items()
    }
    assert names["modelmesh-serving/plan"] == "plan"
    assert names["engines/legacy"] is None
    assert names["other/legacy"] is None
    assert "clients must say engines.legacy" in report
    aliases = list(yaml.safe_load_all((tmp_path / "services.yaml").read_text()))
    assert [(a["metadata"]["namespace"], a["metadata"]["name"]) for a in aliases] == [
        ("engines", "models"),
        ("modelmesh-serving", "models"),
        ("other", "models"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "X spec.explainer is not supported: remove it and call the explainer's own service",
        "! spec.predictor.scaleTarget: copies follow the measured load of the pods",
        "! metadata.annotations.serving.kserve.io/autoscalerClass: it has no effect",
        "  spec.predictor.onnx: becomes spec.predictor.model",
        "left alone: its deployment mode is Standard, not ModelMesh",
        "! azure.connection_string: use account_name with account_key or sas_key",
        "X broken: expected a JSON object",
        "  localMinIO: copy it to the Secret storage-config beside the mesh",
        "  podsPerRuntime: replicas of the StatefulSet; one set of pods serves all formats",
        "! restProxy: the mesh serves gRPC; REST is still to come",
        "! metrics.scheme: metrics are plain HTTP",
        "! unheardOf: it is unknown",
        "5 models carry over; 2 objects do not",
    ],
)
def test_each_field_is_told(report: str, line: str) -> None:
    assert line in report


def test_settings(report: str, tmp_path: Path) -> None:
    assert (tmp_path / "settings.env").read_text().splitlines() == [
        "DENSEMESH_MAX_MESSAGE=33554432",
        "DENSEMESH_METRICS_PORT=2113",
    ]


def test_secrets_are_neither_told_nor_written(report: str, tmp_path: Path) -> None:
    everything = report + "".join(path.read_text() for path in tmp_path.iterdir())
    for secret in ("hunter2", "AKIA", "aHVudGVyMg", "eyJ0eXBl"):
        assert secret not in everything


def test_standard_input_with_nothing_amiss() -> None:
    isvc = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "m", "namespace": "a", "annotations": {"serving.kserve.io/deploymentMode": "ModelMesh"}},
        "spec": {"predictor": {"model": {"modelFormat": {"name": "onnx"}, "storageUri": "s3://b/m.onnx"}}},
    }
    result = migrated("--manifests", "-", given=json.dumps({"kind": "List", "items": [isvc, None, 7]}))
    assert result.exception is None
    assert result.return_value == 0
    assert "1 models carry over; 0 objects do not" in result.output


def test_a_list_of_itself() -> None:
    given = "&list {kind: List, items: [*list, &items [*items]]}"
    assert "0 models" in migrated("--manifests", "-", given=given).output


@pytest.mark.parametrize(
    ("given", "said"),
    [("a: [", "standard input, line 2: expected YAML"), ("\t", "standard input, line 1: expected YAML")],
)
def test_what_is_not_yaml(given: str, said: str) -> None:
    assert said in str(migrated("--manifests", "-", given=given).exception)


def test_a_folder_without_manifests(tmp_path: Path) -> None:
    assert "expected .yaml, .yml or .json files" in str(migrated("--manifests", str(tmp_path)).exception)
    assert "No such file" in str(migrated("--manifests", str(tmp_path / "none")).exception)


@pytest.mark.parametrize("value", [None, 1, "text", [], {}])
@pytest.mark.parametrize("kind", ["InferenceService", "Predictor", "ServingRuntime", "Secret", "ConfigMap"])
@pytest.mark.parametrize("at", ["metadata", "spec", "data"])
def test_manifests_of_any_shape_are_read(kind: str, at: str, value: Any) -> None:
    """Nothing that parses as YAML ends it with a traceback."""
    version = {"InferenceService": "serving.kserve.io/v1beta1", "Secret": "v1", "ConfigMap": "v1"}
    names = {"Secret": "storage-config", "ConfigMap": "model-serving-config"}
    manifest = {
        "apiVersion": version.get(kind, "serving.kserve.io/v1alpha1"),
        "kind": kind,
        "metadata": {"name": names.get(kind, "m"), "annotations": {"serving.kserve.io/deploymentMode": "ModelMesh"}},
        "status": {"deploymentMode": "ModelMesh"},
        at: value,
    }
    assert migrated("--manifests", "-", given=json.dumps(manifest)).exception is None
