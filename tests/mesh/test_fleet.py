"""Pods whose tenants' ONNX models share an architecture (`loaders.fleet`), end to end: registered as `onnx`, served as
they are at first, on one session once they are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from bench.networks import mlp
from loaders.fleet.architectures import architectures
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.pods import Loads, Mesh, running, until
from tests.mesh.test_metrics import scrape

X = np.random.default_rng(1).standard_normal((2, 64), np.float32)


async def ask(mesh: Mesh, model_id: str) -> bytes:
    request = v2.ModelInferRequest(model_name=model_id, raw_input_contents=[X.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=X.shape)
    answer = await mesh.clients["a"].call("ModelInfer", request)
    return bytes(answer.raw_output_contents[0])


async def test_fine_tunes_come_to_share_a_session(tmp_path: Path, loads: Loads) -> None:
    tenants = [f"tenant-{n}" for n in range(3)]
    settings = {"prepare": True, "cache_dir": str(tmp_path / "cache"), "load_slots": 1}
    expected = {}
    async with running("a", loads, **settings) as mesh:
        copies = mesh.pods["a"].engine.cache.copies
        for seed, tenant in enumerate(tenants):
            path = tmp_path / f"{tenant}.onnx"
            mlp(path, seed, (64, 256, 10))
            expected[tenant] = ort.InferenceSession(str(path)).run(["output"], {"input": X})[0]
            info = mm.ModelInfo(type="onnx", path=str(path))
            await mesh.clients["a"].call(
                "registerModel", mm.RegisterModelRequest(modelId=tenant, modelInfo=info, loadNow=True, sync=True)
            )
            np.testing.assert_allclose(np.frombuffer(await ask(mesh, tenant), np.float32), expected[tenant].ravel())

        def are_shared() -> bool:
            in_use = sum(architecture.models for architecture in architectures.in_use())
            return in_use == 3 and all(mesh.holders(tenant) for tenant in tenants)

        await until(are_shared)
        for tenant in tenants:
            answer = np.frombuffer(await ask(mesh, tenant), np.float32)
            np.testing.assert_allclose(answer, expected[tenant].ravel(), 1e-4, 1e-5)
        sizes = sorted(copies[tenant].size_bytes for tenant in tenants)
        assert sizes[0] == sizes[1] < sizes[2]  # the first pays for the session
        seen = await scrape(mesh, "a")
        assert seen["densemesh_onnx_architectures", ""] == 1
        assert [value for (name, _), value in seen.items() if name == "densemesh_onnx_architecture_models"] == [3]
        assert seen["densemesh_onnx_session_bytes", "architectures"] == sizes[2] - sizes[0]
