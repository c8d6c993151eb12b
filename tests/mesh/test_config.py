"""A pod's configuration. Authority: issue 2 ("wrong values answered in one sentence"); mesh.config's own words."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config import MAX_BYTES, Config, format_bytes, parse_bytes, reachable_host


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("1B", 1),
        ("2GiB", 2 << 30),
        ("512 mib", 512 << 20),
        ("1.5GB", 1_500_000_000),
        (" 3KB ", 3000),
        ("1TiB", 1 << 40),
        ("1024TiB", MAX_BYTES),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "0.1B", "1 GiBB", "1iB", "1025TiB", "1e9", "lots", "1 2", "٣"])
def test_what_is_no_size_says_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected a size .*, found "):
        parse_bytes(text)


@given(st.integers(1, MAX_BYTES))
def test_a_number_of_bytes_is_that_many_bytes(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == size_bytes


@given(st.text(max_size=20))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        assert 0 < parse_bytes(text) <= MAX_BYTES
    except ValueError as error:
        assert str(error).startswith("expected a size")  # noqa: PT017


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_the_defaults_are_right_and_explained() -> None:
    assert Config().validate() is None
    assert all(field.metadata["help"].endswith(".") for field in fields(Config))


@pytest.mark.parametrize(
    "good",
    [
        {"registry": "etcd://a:1,b:2/prefix"},
        {"grpc_port": 0, "metrics_port": 65_535},
        {"pod_id": "a"},
        {"pod_id": "A.b-c_1"},
        {"advertise": "10.0.0.1:8033"},
        {"advertise": "[::1]:1"},
        {"allow_code": " joblib , pt2"},
        {"log_level": "debug"},
        {"drain_timeout_s": 0.0},
        {"capacity": ""},
        {"runtime": "triton-2.x=port:8085", "runtime_data": "localhost:8001", "runtime_formats": "tensorflow,keras"},
        {"runtime": "m=unix:///tmp/mmesh/grpc.sock", "runtime_formats": " pytorch ", "labels": "gpu=h200"},
    ],
)
def test_right_values(good: dict[str, Any]) -> None:
    assert replace(Config(), **good).validate() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity": "0"},
        {"cache_size": "much"},
        {"storage_config": "/nowhere/at/all"},
        {"max_message": "2GiB"},
        {"max_message": "much"},
        {"grpc_port": -1},
        {"metrics_port": 65_536},
        {"load_slots": 0},
        {"run_threads": 0},
        {"request_timeout_s": 0.0},
        {"request_timeout_s": float("nan")},
        {"drain_timeout_s": -1.0},
        {"lease_ttl_s": 1.0},
        {"lease_ttl_s": float("inf")},
        {"registry": ""},
        {"registry": "etcd"},
        {"registry": "zookeeper://a"},
        {"policy": "fifo"},
        {"allow_code": "exe"},
        {"pod_id": "-a"},
        {"pod_id": "a/b"},
        {"pod_id": "a" * 64},
        {"advertise": "host"},
        {"advertise": "a b:1"},
        {"models": "/no/such/directory"},
        {"log_level": "LOUD"},
        {"runtime": "localhost:8085"},
        {"runtime": "a b=localhost:8085"},
        {"runtime_data": "localhost:8085"},
        {"runtime_formats": "tensorflow"},
    ],
)
def test_wrong_values_are_told_with_the_flag_and_what_was_expected(wrong: dict[str, Any]) -> None:
    said = replace(Config(), **wrong).validate()
    (name,) = wrong
    assert said is not None
    assert said.startswith(f"--{name.replace('_', '-')}: ")
    assert "expected" in said or "is not a directory" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"runtime": "t=8085"}, "--runtime: expected host:port, port:8085 or unix:/path, found '8085'"),
        ({"runtime": "t=unix:relative"}, "--runtime: expected host:port"),
        ({"runtime_data": "nowhere"}, "--runtime-data: expected host:port"),
        ({"runtime_formats": ""}, "--runtime-formats: expected names of formats"),
        ({"runtime_formats": "a b"}, "--runtime-formats: expected names of formats"),
        ({"labels": "runtime=mine"}, "--labels: label 'runtime' is given twice"),
    ],
)
def test_a_model_server_is_told_whole(more: dict[str, Any], says: str) -> None:
    how = {"runtime": "triton=localhost:8085", "runtime_formats": "tensorflow", **more}
    assert (Config(**how).validate() or "").startswith(says)


def test_a_password_is_not_repeated() -> None:
    said = Config(registry="etc://root:secret@host/p").validate()
    assert said is not None
    assert "secret" not in said


def test_models_may_lie_in_any_directory(tmp_path: Path) -> None:
    assert Config(models=str(tmp_path)).validate() is None


@pytest.mark.parametrize(
    ("host", "registry", "reached"),
    [
        ("10.1.2.3", "etcd://h:1/p", "10.1.2.3"),
        ("0.0.0.0", "memory://", "127.0.0.1"),
        ("0.0.0.0", "etcd://127.0.0.1:2379/p", "127.0.0.1"),
        ("::", "etcd://user:pass@127.0.0.1/p", "127.0.0.1"),
    ],
)
def test_where_others_reach_a_pod(host: str, registry: str, reached: str) -> None:
    assert reachable_host(host, registry) == reached
