"""Models in an S3-compatible store, registered by `s3://` and by ModelMesh's storage keys, and inferred."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

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


async def register(mesh: Mesh, model_id: str, kind: str, path: str) -> mm.ModelStatusInfo:
    key = json.dumps({"storage_key": "minio", "storage_params": {"bucket": "b"}})
    info = mm.ModelInfo(type=kind, path=path, key=key)
    request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
    status = await mesh.clients["a"].call("registerModel", request)
    assert isinstance(status, mm.ModelStatusInfo)
    return status


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
