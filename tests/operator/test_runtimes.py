"""Selection of ServingRuntimes. Authority: KServe's `predictor_model.go` and `GetSupportingRuntimes`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh_operator.inferenceservice import Spec
from mesh_operator.runtimes import NoRuntime, Runtime, SupportedFormat, runtime_of, select

SPEC = Spec("fraud", "news", format="onnx", path="s3://a/b")


def runtime(name: str, format_name: str = "onnx", **fields: Any) -> Runtime:
    entry = {key: fields.pop(key) for key in ("version", "priority", "auto_select") if key in fields}
    formats = (SupportedFormat(format_name, **{"auto_select": True, **entry}),)
    return Runtime(name, **{"multi_model": True, "formats": formats, **fields})


@pytest.mark.parametrize(
    ("runtimes", "spec", "expected"),
    [
        ([runtime("a"), runtime("b", namespace="news")], {}, "b"),
        ([runtime("a", priority=9), runtime("b", namespace="news", priority=1)], {}, "b"),
        ([runtime("a"), runtime("b", namespace="sports")], {}, "a"),
        ([runtime("a", priority=1), runtime("b", priority=2)], {}, "b"),
        ([runtime("a"), runtime("b", priority=1)], {}, "b"),
        ([runtime("a", created="2026-01-01"), runtime("b", created="2026-02-01")], {}, "b"),
        ([runtime("b"), runtime("a")], {}, "a"),
        ([runtime("a", disabled=True), runtime("b", multi_model=False), runtime("c")], {}, "c"),
        ([runtime("a", auto_select=False), runtime("b")], {}, "b"),
        ([runtime("a", auto_select=False), runtime("b")], {"runtime": "a"}, "a"),
        ([runtime("a", version="1"), runtime("b", version="2")], {"version": "2"}, "b"),
        ([runtime("a", version="1")], {}, "a"),
        ([runtime("a", protocols=("v1",)), runtime("b", protocols=("v2",))], {"protocol": "v2"}, "b"),
        ([runtime("a", priority=1), runtime("a", namespace="news")], {"runtime": "a"}, "a"),
    ],
)
def test_selection(runtimes: list[Runtime], spec: dict[str, Any], expected: str) -> None:
    assert select(replace(SPEC, **spec), runtimes).name == expected
    assert select(replace(SPEC, **spec), runtimes[::-1]).name == expected


@pytest.mark.parametrize(
    ("runtimes", "spec", "reason", "message"),
    [
        ([], {}, "NoSupportingRuntime", "No runtime found to support specified framework/version: onnx"),
        ([runtime("a", version="1")], {"version": "2"}, "NoSupportingRuntime", "framework/version: onnx:2"),
        ([runtime("a")], {"version": "2"}, "NoSupportingRuntime", "framework/version: onnx:2"),
        ([], {"runtime": "a"}, "RuntimeNotRecognized", "Waiting for runtime to become available"),
        ([runtime("a", disabled=True)], {"runtime": "a"}, "RuntimeDisabled", "Specified runtime is disabled"),
        ([runtime("a", multi_model=False)], {"runtime": "a"}, "NoSupportingRuntime", "multiModel"),
        (
            [runtime("a", "sklearn")],
            {"runtime": "a"},
            "NoSupportingRuntime",
            "Specified runtime does not support specified framework/version",
        ),
        (
            [runtime("a", protocols=("v1",))],
            {"runtime": "a", "protocol": "v2"},
            "NoSupportingRuntime",
            "Specified runtime does not support specified protocol version",
        ),
    ],
)
def test_no_runtime(runtimes: list[Runtime], spec: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(NoRuntime, match=message) as raised:
        select(replace(SPEC, **spec), runtimes)
    assert raised.value.reason == reason


def test_manifests() -> None:
    manifest = {
        "metadata": {
            "name": "mesh",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"densemesh.io/in-process": "true"},
        },
        "spec": {
            "multiModel": True,
            "protocolVersions": ["grpc-v2"],
            "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": True, "priority": 2}],
        },
    }
    formats = (SupportedFormat("onnx", "1", True, 2),)
    assert runtime_of(manifest) == Runtime("mesh", "", "2026-01-01T00:00:00Z", False, True, True, ("grpc-v2",), formats)
