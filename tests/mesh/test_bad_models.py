"""Models that cannot be served, registered with a pod process: what the client is told, and that the pod goes on.
Authority: docs/ARCHITECTURE.md, Errors: FAILED_PRECONDITION with the loader's own reason."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import joblib
import pytest

from mesh.errors import MAX_DETAILS
from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.models import classifier, write_repository, write_synthetic

Status = mm.ModelStatusInfo


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models among directories that hold none."""
    root = tmp_path_factory.mktemp("models")
    write_repository(root)
    (root / "empty").mkdir()
    (root / "no_model").mkdir()
    (root / "no_model" / "README.md").write_text("soon")
    (root / "bad_settings").mkdir()
    (root / "bad_settings" / "model.onnx").write_bytes(b"")
    (root / "bad_settings" / "model-settings.json").write_text("{")
    (root / "corrupt").mkdir()
    (root / "corrupt" / "model.onnx").write_bytes(b"\x08\x09 this is no model" * 99)
    return root


@pytest.fixture
async def client(pod: LocalPod) -> AsyncIterator[Client]:
    """After whatever a test did, the pod still serves."""
    async with Client(pod.address) as connected:
        yield connected
        request = v2.ModelInferRequest(model_name="identity_int8", raw_input_contents=[b"\1\2"])
        request.inputs.add(name="INPUT0", datatype="INT8", shape=[1, 2])
        assert (await connected.call("ModelInfer", request)).raw_output_contents == [b"\1\2"]


def infer(model_id: str) -> v2.ModelInferRequest:
    return v2.ModelInferRequest(model_name=model_id)


async def register(client: Client, model_id: str, kind: str, path: Path | str, key: str = "") -> None:
    info = mm.ModelInfo(type=kind, path=str(path), key=key)
    await client.call("registerModel", mm.RegisterModelRequest(modelId=model_id, modelInfo=info))


@pytest.mark.parametrize("model_id", ["empty", "no_model", "bad_settings"])
async def test_a_directory_without_a_model_is_left_out_and_reported(
    client: Client, pod: LocalPod, model_id: str
) -> None:
    assert (await client.refusal("ModelInfer", infer(model_id)))[0] == "NOT_FOUND"
    assert f"model {model_id} is left out: " in pod.log.read_text()


async def test_a_corrupt_model_is_told_by_its_loader(client: Client) -> None:
    status, message = await client.refusal("ModelInfer", infer("corrupt"))
    assert status == "FAILED_PRECONDITION"
    assert message.startswith("model 'corrupt' cannot be loaded: ")
    assert "model.onnx" in message
    again = await client.refusal("ModelInfer", infer("corrupt"))
    assert again[0] == status  # remembered, not tried at every request
    told = await client.call("getModelStatus", mm.GetStatusRequest(modelId="corrupt"))
    assert told.status == Status.LOADING_FAILED
    assert "model.onnx" in told.errors[0]
    assert not (await client.call("ModelReady", v2.ModelReadyRequest(name="corrupt"))).ready


async def test_a_model_larger_than_any_pod(client: Client, tmp_path: Path) -> None:
    await register(client, "giant", "synthetic", write_synthetic(tmp_path, size_bytes=1 << 40))
    status, message = await client.refusal("ModelInfer", infer("giant"))
    assert status == "FAILED_PRECONDITION"
    assert f"needs {1 << 40} bytes; this pod holds {256 << 20} bytes" in message


async def test_a_model_that_turns_out_larger_than_any_pod(client: Client, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path, size_bytes=1 << 40, estimate_bytes=1)
    await register(client, "surprise", "synthetic", path)
    status, message = await client.refusal("ModelInfer", infer("surprise"))
    assert status == "FAILED_PRECONDITION"
    assert f"needs {1 << 40} bytes" in message


async def test_a_pickle_is_refused_unless_allowed(client: Client, tmp_path: Path) -> None:
    joblib.dump(classifier(), tmp_path / "model.joblib")
    await register(client, "pickle", "sklearn", tmp_path)
    status, message = await client.refusal("ModelInfer", infer("pickle"))
    assert status == "FAILED_PRECONDITION"
    assert "model.joblib can run its author's code when loaded: refused without --allow-code joblib" in message


async def test_a_missing_file_may_yet_come(client: Client, tmp_path: Path, repository: Path) -> None:
    await register(client, "late", "onnx", tmp_path / "model.onnx")
    status, message = await client.refusal("ModelInfer", infer("late"))
    assert status == "UNAVAILABLE"
    assert f"{tmp_path}/model.onnx does not exist" in message
    shutil.copy(repository / "identity_int8" / "model.onnx", tmp_path)
    # RepositoryModelUnload forgets the failure: no need to wait for its end
    await client.call("RepositoryModelUnload", v2.RepositoryModelUnloadRequest(model_name="late"))
    await client.call("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="late"))
    assert (await client.call("ModelReady", v2.ModelReadyRequest(name="late"))).ready


async def test_a_loaders_long_reason_is_cut_so_that_it_arrives(client: Client) -> None:
    # gRPC clients refuse more than 8 KiB of trailers and report something else
    await register(client, "far", "onnx", "/" + "/".join(["grün" * 40] * 20))
    status, message = await client.refusal("ModelInfer", infer("far"))
    assert status in ("UNAVAILABLE", "FAILED_PRECONDITION")
    assert message.startswith("model 'far' cannot be loaded: ")
    assert len(message) < MAX_DETAILS


@pytest.mark.parametrize(
    ("kind", "path", "key", "says"),
    [
        ("", "/m", "", "modelInfo.type '': expected one of "),
        ("gguf", "/m", "", "modelInfo.type 'gguf': expected one of"),
        ("onnx", "/m" * 3000, "", "modelInfo.path: expected at most 4096 bytes"),
        ("onnx", "/m", "[1]", "modelInfo.key is not a JSON object"),
        ("onnx", "/m", "{", "modelInfo.key is not JSON"),
        ("onnx", "/m", '{"max_batch_size": -1}', "modelInfo.key: max_batch_size"),
        ("onnx", "/m", f'{{"x": "{"y" * (64 << 10)}"}}', "modelInfo.key has"),
    ],
)
async def test_what_cannot_be_a_registration_is_refused(
    client: Client, kind: str, path: str, key: str, says: str
) -> None:
    info = mm.ModelInfo(type=kind, path=path, key=key)
    request = mm.RegisterModelRequest(modelId="never", modelInfo=info)
    status, message = await client.refusal("registerModel", request)
    assert status == "INVALID_ARGUMENT"
    assert says in message
    told = await client.call("getModelStatus", mm.GetStatusRequest(modelId="never"))
    assert told.status == Status.NOT_FOUND


@pytest.mark.parametrize("model_id", ["", "a\nb", "x" * 513])
@pytest.mark.parametrize("name", ["registerModel", "unregisterModel", "getModelStatus", "ensureLoaded"])
async def test_what_cannot_be_an_id_is_refused(client: Client, name: str, model_id: str) -> None:
    request = {
        "registerModel": mm.RegisterModelRequest(modelId=model_id, modelInfo=mm.ModelInfo(type="onnx", path="/m")),
        "unregisterModel": mm.UnregisterModelRequest(modelId=model_id),
        "getModelStatus": mm.GetStatusRequest(modelId=model_id),
        "ensureLoaded": mm.EnsureLoadedRequest(modelId=model_id),
    }[name]
    status, message = await client.refusal(name, request)
    assert status == "INVALID_ARGUMENT"
    assert message.startswith("modelId: expected ")
