"""Models in an S3-compatible store, registered by `s3://` and by ModelMesh's storage keys, and inferred."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.loaders.object_server import ObjectServer, serving
from tests.mesh.models import mlp, write_repository
from tests.mesh.pods import Loads, Mesh, request_for, running, until

Status = mm.ModelStatusInfo


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    write_repository(tmp_path / "models")
    with serving() as server:
        server.objects["models/mlp/model.onnx"] = (tmp_path / "models" / "mlp" / "model.onnx").read_bytes()
        server.objects["synthetic/model.synthetic.json"] = b'{"size_bytes": 5000}'
        yield server


def settings(tmp_path: Path, server: ObjectServer) -> dict[str, str]:
    key = {"type": "s3", "access_key_id": "a", "secret_access_key": "hidden", "endpoint_url": server.url}
    (tmp_path / "storage.json").write_text(json.dumps({"minio": key}))
    return {"storage_config": str(tmp_path / "storage.json"), "cache_dir": str(tmp_path / "cache")}


KEY = json.dumps({"storage_key": "minio", "storage_params": {"bucket": "b"}})


async def register(mesh: Mesh, model_id: str, kind: str, path: str, sha256: str = "") -> mm.ModelStatusInfo:
    params = {"bucket": "b"} | ({"sha256": sha256} if sha256 else {})
    key = json.dumps({"storage_key": "minio", "storage_params": params})
    info = mm.ModelInfo(type=kind, path=path, key=key)
    request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
    status = await mesh.clients["a"].call("registerModel", request)
    assert isinstance(status, mm.ModelStatusInfo)
    return status


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize("path", ["s3://b/models/mlp", "s3://b/models/mlp/model.onnx", "models/mlp"])
async def test_a_model_is_fetched_and_serves(tmp_path: Path, server: ObjectServer, path: str) -> None:
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        assert (await register(mesh, "m", "onnx", path)).status == Status.LOADED
        x = np.ones((2, 8), np.float32)
        request = v2.ModelInferRequest(model_name="m", raw_input_contents=[x.tobytes()])
        signature = await mesh.clients["a"].call("ModelMetadata", v2.ModelMetadataRequest(name="m"))
        request.inputs.add(name=signature.inputs[0].name, datatype="FP32", shape=x.shape)
        answer = await mesh.clients["a"].call("ModelInfer", request)
        found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
        np.testing.assert_allclose(found, mlp(x), rtol=1e-5)
        assert server.gets("models/mlp/model.onnx") == 1


async def test_a_failed_fetch_is_told_and_others_serve(tmp_path: Path, server: ObjectServer) -> None:
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        assert (await register(mesh, "good", "synthetic", "synthetic")).status == Status.LOADED
        server.denied = True
        status = await register(mesh, "bad", "onnx", "models/mlp")
        assert status.status == Status.LOADING_FAILED
        assert "access is denied (AccessDenied: Access Denied.)" in status.errors[0]
        assert "hidden" not in status.errors[0]
        assert await mesh.infer("good") == "a"


@pytest.mark.parametrize(
    ("path", "sha256", "says"),
    [
        ("bad/bomb.zip", "", "bomb.zip unpacks to more than"),
        ("bad/up.zip", "", "'../up' is refused"),
        ("bad/cut.zip", "", "cut.zip cannot be unpacked"),
        ("models/mlp/model.onnx", "0" * 64, "storage_params say 0000"),
        ("bad/absent", "", "there is no such object"),
        ("bad/huge.synthetic.json", "", "bytes; this pod holds 100000 bytes"),
    ],
)
async def test_each_bad_input_has_one_clear_status(
    tmp_path: Path, server: ObjectServer, path: str, sha256: str, says: str
) -> None:
    """Issue 5: nothing is half-loaded or left on disk, other models are unaffected."""
    server.objects["bad/bomb.zip"] = zipped("m", bytes(80 << 20))
    server.objects["bad/up.zip"] = zipped("../up", b"")
    server.objects["bad/cut.zip"] = zipped("m", b"data")[:-30]
    server.objects["bad/huge.synthetic.json"] = bytes(100_001)
    async with running("a", Loads(), capacity="100000", **settings(tmp_path, server)) as mesh:
        assert (await register(mesh, "good", "synthetic", "synthetic")).status == Status.LOADED
        before = sorted((tmp_path / "cache").iterdir())
        status = await register(mesh, "bad", "synthetic", path, sha256=sha256)
        assert status.status == Status.LOADING_FAILED
        assert says in status.errors[0]
        assert sorted((tmp_path / "cache").iterdir()) == before
        assert await mesh.infer("good") == "a"


async def test_a_store_that_stalls_costs_a_request_its_deadline(tmp_path: Path, server: ObjectServer) -> None:
    async with running("a", Loads(), **settings(tmp_path, server)) as mesh:
        assert (await register(mesh, "good", "synthetic", "synthetic")).status == Status.LOADED
        server.objects["slow/model.synthetic.json"] = b'{"size_bytes": 5000}'
        server.faults["stall"] = 1
        info = mm.ModelInfo(type="synthetic", path="slow", key=KEY)
        await mesh.clients["a"].call("registerModel", mm.RegisterModelRequest(modelId="slow", modelInfo=info))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.infer("slow", timeout_s=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await mesh.infer("good") == "a"
        server.released.set()
        assert await mesh.infer("slow") == "a"


async def test_files_stay_while_the_model_is_loaded_and_the_cache_is_kept(tmp_path: Path, server: ObjectServer) -> None:
    server.objects["other/model.synthetic.json"] = b'{"size_bytes": 6000}'
    limited = settings(tmp_path, server) | {"cache_size": "30B"}
    async with running("a", Loads(), **limited) as mesh:
        assert (await register(mesh, "m", "synthetic", "synthetic")).status == Status.LOADED
        status = await register(mesh, "other", "synthetic", "other")
        assert status.status == Status.LOADING_FAILED
        assert "models in use have 20 of the model cache's 30" in status.errors[0]
        await mesh.unregister("m")
        assert (await register(mesh, "third", "synthetic", "other")).status == Status.LOADED
    async with running("a", Loads(), **limited) as mesh:
        assert (await register(mesh, "third", "synthetic", "other")).status == Status.LOADED
        assert (await mesh.clients["a"].call("ModelInfer", request_for("third"))).model_name == "third"
    assert server.gets("other/model.synthetic.json") == 1


async def test_fetches_start_by_class_and_prefetches_last(tmp_path: Path, server: ObjectServer) -> None:
    """The order of `placement.link`, which loads have too."""
    models = {"first": "normal", "ahead": "high", "low": "low", "normal": "normal", "high": "high"}
    for name in models:
        server.objects[f"{name}/model.synthetic.json"] = b'{"size_bytes": 5000}'
    async with running("a", Loads(), load_slots=1, **settings(tmp_path, server)) as mesh:
        copies, waiting = mesh.pods["a"].engine.cache.copies, list[asyncio.Task[str]]()
        server.faults["stall"] = 1
        for name, priority in models.items():
            key = {"storage_key": "minio", "storage_params": {"bucket": "b"}, "placement": {"priority": priority}}
            info = mm.ModelInfo(type="synthetic", path=name, key=json.dumps(key))
            await mesh.clients["a"].call("registerModel", mm.RegisterModelRequest(modelId=name, modelInfo=info))
            ahead = (("densemesh-prefetch", "1"),) if name == "ahead" else ()
            waiting.append(asyncio.create_task(mesh.infer(name, metadata=ahead)))
            await until(lambda: len(copies) == len(waiting))
        await until(lambda: server.gets("first/model.synthetic.json") == 1)
        server.released.set()
        await asyncio.gather(*waiting)
    asked = [path.split("/")[2] for _, path, _ in server.seen if path.endswith(".json")]
    assert list(dict.fromkeys(asked)) == ["first", "high", "normal", "low", "ahead"]
