"""Directories as Triton has them, served by a real pod. Authority: Triton, "Model Repository"."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.fake_runtime import FakeRuntime
from tests.mesh.models import mlp, write_repository
from tests.mesh.pods import Loads, request_for, running

Status = mm.ModelStatusInfo


async def test_a_directory_with_versions_is_served_as_a_repository_would(tmp_path: Path) -> None:
    """The newest version that the policy allows, within config.pbtxt's max_batch_size."""
    write_repository(tmp_path / "models")
    home = tmp_path / "fraud"
    (home / "12").mkdir(parents=True)
    (home / "12" / "model.onnx").write_bytes(b"not this one")
    shutil.copytree(tmp_path / "models" / "mlp", home / "3" / "model.onnx")  # as models with external data lie
    (home / "config.pbtxt").write_text(
        'name: "fraud" backend: "onnxruntime" max_batch_size: 4 version_policy { specific { versions: [1, 3] } }'
    )
    async with running("a", Loads()) as mesh:
        info = mm.ModelInfo(type="onnx", path=str(home))
        request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
        assert (await mesh.clients["a"].call("registerModel", request)).status == Status.LOADED
        x = np.ones((5, 8), np.float32)
        infer = v2.ModelInferRequest(model_name="m", raw_input_contents=[x[:4].tobytes()])
        infer.inputs.add(name="x", datatype="FP32", shape=[4, 8])
        answer = await mesh.clients["a"].call("ModelInfer", infer)
        found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(4, 3)
        np.testing.assert_allclose(found, mlp(x[:4]), rtol=1e-5)
        infer.raw_input_contents[0] = x.tobytes()
        infer.inputs[0].shape[0] = 5
        assert (await mesh.clients["a"].refusal("ModelInfer", infer))[0] == "INVALID_ARGUMENT"


async def test_what_a_repository_has_for_the_server_is_loaded_by_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "plan" / "1").mkdir(parents=True)
    (tmp_path / "models" / "plan" / "1" / "model.plan").write_bytes(b"engine")
    (tmp_path / "models" / "plan" / "config.pbtxt").write_text('platform: "tensorrt_plan" max_batch_size: 4')
    with FakeRuntime(tmp_path) as runtime:
        how = {"runtime": f"fake={runtime.address}", "runtime_formats": "tensorrt", "models": str(tmp_path / "models")}
        async with running("a", Loads(), **how) as mesh:
            assert (await mesh.clients["a"].call("ModelInfer", request_for("plan"))).model_name == "plan"
            (told,) = [call.split(maxsplit=4) for call in runtime.calls if call.startswith("loadModel")]
            assert told[1:4] == ["plan", "tensorrt", str(tmp_path / "models" / "plan")]
