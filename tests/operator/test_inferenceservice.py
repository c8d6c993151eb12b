"""Every field of KServe's v1beta1 InferenceService: honoured, warned about or refused. Authority: KServe's API
reference and the texts of its webhook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh_operator.fields import ANNOTATIONS, FIELDS, Fate, page, told
from mesh_operator.inferenceservice import FRAMEWORKS, read
from tests.operator.manifests import isvc, model

OURS = "densemesh.io/"


def nested(path: str) -> dict[str, Any]:
    """A spec in which only this field is told."""
    value: Any = "x"
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: str(field.path))
def test_each_field_has_its_fate(field: Any) -> None:
    for fate in Fate:
        found = list(told(nested(field.path), fate))
        assert found == ([(f"spec.{field.path}", field.note)] if fate is field.fate else [])


def test_fields_that_nobody_knows_are_warned_about() -> None:
    assert list(told({"predictor": {"model": {"novelty": 1}}, "other": {"a": 1}}, Fate.WARNED)) == [
        ("spec.other", "it is unknown"),
        ("spec.predictor.model.novelty", FIELDS["predictor.model"].note),
    ]


def test_what_is_told_without_a_value_is_not_told() -> None:
    assert not read(isvc(model(resources={}, env=[], args=None))).warnings


@pytest.mark.parametrize(
    ("predictor", "expected"),
    [
        (model(), {"format": "sklearn", "path": "s3://models/fraud", "storage_key": "", "version": ""}),
        (model(modelFormat={"name": "onnx", "version": "1"}), {"format": "onnx", "version": "1"}),
        (
            model(storageUri=None, storage={"key": "k", "path": "a/b", "schemaPath": "s.json"}),
            {"path": "a/b", "storage_key": "k", "schema_path": "s.json"},
        ),
        (model(storageUri=None, storage={"path": "a"}), {"storage_key": "default"}),
        (model(storageUri=None, storage={"path": "a", "parameters": {"type": "s3"}}), {"storage_key": "default_s3"}),
        (
            model(storageUri=None, storage={"path": "a", "parameters": {"bucket": "b", "sha256": "0" * 64}}),
            {"storage_params": {"bucket": "b", "sha256": "0" * 64}},
        ),
        (model(protocolVersion="v2"), {"protocol": "v2"}),
        (model(runtime="triton"), {"runtime": "triton"}),
        (
            {**model(), "minReplicas": 1, "maxReplicas": 3},
            {"placement": {"tenant": "news", "min_copies": 1, "max_copies": 3}},
        ),
        ({**model(), "minReplicas": 0}, {"placement": {"tenant": "news", "idle_unload_s": 600}, "is_lazy": True}),
        ({**model(), "maxReplicas": 0}, {"placement": {"tenant": "news"}, "is_lazy": False}),
        (
            {**model(), "batcher": {"maxBatchSize": 32, "maxLatency": 50}},
            {"max_queue_delay_us": 50_000, "preferred_batch_size": 32},
        ),
        ({**model(), "canaryTrafficPercent": 10}, {"canary_percent": 10}),
        ({"pytorch": {"storageUri": "gs://b/m", "protocolVersion": "v2"}}, {"format": "pytorch", "path": "gs://b/m"}),
    ],
)
def test_what_is_honoured(predictor: dict[str, Any], expected: dict[str, Any]) -> None:
    reading = read(isvc(predictor))
    assert reading.refusals == ()
    assert {name: getattr(reading.spec, name) for name in expected} == expected


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_legacy_frameworks_are_rewritten(framework: str) -> None:
    legacy = read(isvc({framework: {"storageUri": "s3://b/m", "env": [{"name": "A"}]}}))
    assert legacy.spec == read(isvc(model(modelFormat={"name": framework}, storageUri="s3://b/m"))).spec
    assert legacy.warnings == (f"spec.predictor.model.env has no effect: {FIELDS['predictor.model.env'].note}",)


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({"serving.kserve.io/secretKey": "k"}, {"storage_key": "k"}),
        ({"serving.kserve.io/schemaPath": "s"}, {"schema_path": "s"}),
        ({"serving.kserve.io/servingRuntime": "r"}, {"runtime": "r"}),
        ({"serving.kserve.io/stop": "true"}, {"stopped": True}),
        ({f"{OURS}model-name": "f.1"}, {"model_name": "f.1"}),
        ({f"{OURS}reload": "2"}, {"reload": "2"}),
        ({f"{OURS}tenant": "news.ads"}, {"placement": {"tenant": "news.ads"}}),
        (
            {f"{OURS}pinned": "true", f"{OURS}priority": "high", f"{OURS}slo-ms": "50"},
            {"placement": {"tenant": "news", "pinned": True, "priority": "high", "slo_ms": 50}},
        ),
        (
            {f"{OURS}idle-unload-s": "60", f"{OURS}requires": "gpu=h200,zone=a"},
            {"placement": {"tenant": "news", "idle_unload_s": 60, "requires": {"gpu": "h200", "zone": "a"}}},
        ),
    ],
)
def test_annotations(annotations: dict[str, str], expected: dict[str, Any]) -> None:
    reading = read(isvc(annotations=annotations))
    assert reading.refusals == ()
    assert {name: getattr(reading.spec, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (isvc({}), "spec.predictor.model: expected the model that is to be served"),
        (isvc({**model(), "onnx": {"storageUri": "s3://a"}}), "Exactly one of [model, sklearn"),
        (isvc({"containers": [{"image": "x"}]}), "spec.predictor.containers is not supported: custom containers"),
        (isvc({**model(), "workerSpec": {"size": 2}}), "spec.predictor.workerSpec is not supported"),
        (isvc({**model(), "storageUris": [{"uri": "s3://a"}]}), "spec.predictor.storageUris is not supported"),
        (isvc(model(confidential={"enabled": True})), "spec.predictor.model.confidential is not supported"),
        (isvc(transformer={"containers": [{}]}), "spec.transformer is not supported: remove it"),
        (isvc(explainer={"art": {}}), "spec.explainer is not supported: remove it"),
        (isvc(canary=[{"trafficPercent": 5}]), "spec.canary is not supported: use predictor.canaryTrafficPercent"),
        (isvc(model(modelFormat=None)), "spec.predictor.model.modelFormat.name: expected the model's format"),
        (isvc(model(modelFormat=7)), "spec.predictor.model.modelFormat: expected an object"),
        (isvc(model(storageUri=None)), "spec.predictor.model.storageUri: expected where the model lies"),
        (isvc(model(storage={"path": "a"})), "storageUri and storage.path are exclusive"),
        (isvc(model(storageUri="oci://a/b")), "StorageUri [oci://a/b] is not supported"),
        (
            isvc(model(storageUri="s3://" + "a" * 5000)),
            "spec.predictor.model.storageUri: expected a text of at most 4096",
        ),
        (isvc({**model(), "minReplicas": 3, "maxReplicas": 2}), "'MinReplicas' cannot be greater than MaxReplicas"),
        (isvc({**model(), "minReplicas": -1}), "spec.predictor.minReplicas: expected a whole number from 0"),
        (isvc({**model(), "maxReplicas": True}), "spec.predictor.maxReplicas: expected a whole number from 0"),
        (isvc({**model(), "canaryTrafficPercent": 101}), "canaryTrafficPercent: expected a whole number from 0 to 100"),
        (
            isvc({**model(), "batcher": {"maxLatency": "5"}}),
            "spec.predictor.batcher.maxLatency: expected a whole number",
        ),
        (isvc(name="Fraud"), "a InferenceService name must consist of lower case"),
        (isvc(annotations={f"{OURS}pinned": "yes"}), f"annotation {OURS}pinned: expected true or false"),
        (isvc(annotations={f"{OURS}priority": "top"}), f"annotation {OURS}priority: expected high, normal or low"),
        (isvc(annotations={f"{OURS}slo-ms": "-1"}), f"annotation {OURS}slo-ms: expected a whole number from 0"),
        (isvc(annotations={f"{OURS}requires": "gpu"}), f"annotation {OURS}requires: expected labels"),
        (isvc(annotations={f"{OURS}tenant": "sports"}), f"annotation {OURS}tenant: expected the namespace 'news'"),
        (isvc(annotations={f"{OURS}model-name": "a b"}), f"annotation {OURS}model-name: expected up to 253"),
        ({"metadata": {"name": "a", "namespace": "b"}}, "expected the model that is to be served"),
        ({"metadata": {"name": "a", "namespace": "b"}, "spec": []}, "spec: expected an object"),
    ],
)
def test_what_is_refused_says_what_to_change(manifest: dict[str, Any], message: str) -> None:
    assert message in "; ".join(read(manifest).refusals)


def test_the_page_is_the_table() -> None:
    root = Path(__file__).resolve().parents[2]
    assert (root / "docs" / "inferenceservice-fields.md").read_text() == page()


def test_annotations_that_are_told_of_are_read() -> None:
    source = (Path(__file__).resolve().parents[2] / "operator/mesh_operator/inferenceservice.py").read_text()
    for name in ANNOTATIONS.keys() - {"serving.kserve.io/deploymentMode"}:
        assert name.partition("/")[2] in source
