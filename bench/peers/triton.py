"""Triton Inference Server with its Python backend: the binary that the wheel of PyTriton carries, started directly.

The wheel has no ONNX Runtime backend, so the network runs in the Python backend too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.peers.base import IDENTITY, MLP, Peer

_MODEL: Final = Path(__file__).with_name("inside") / "triton_model.py"
_CONFIG: Final = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [{{ name: "{input}" data_type: TYPE_FP32 dims: [-1, -1] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [-1, -1] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
parameters: {{ key: "onnx" value: {{ string_value: "{onnx}" }} }}
"""


class Triton(Peer):
    """2.51 is what PyTriton 0.7.0 carries."""

    name = "triton"

    def missing(self) -> str | None:
        pip = f"{self.home}/bin/pip install"
        how = f"python -m venv {self.home} && {pip} 'numpy<2' onnxruntime && {pip} --no-deps nvidia-pytriton==0.7.0"
        return None if self._server.exists() else how

    def version(self) -> str:
        return "Triton 2.51.0, Python backend"

    @property
    def _server(self) -> Path:
        found = sorted(self.home.glob("lib/python*/site-packages/pytriton/tritonserver"))
        return found[-1] if found else self.home / "absent"

    def command(self) -> list[str]:
        version = self._server.parents[2].name.removeprefix("python")
        backend, models = self.scratch / "backends" / "python", self.scratch / "models"
        backend.mkdir(parents=True)
        stub = self._server / "python_backend_stubs" / version / "triton_python_backend_stub"
        for part in (stub, *(self._server / "backends" / "python").glob("*.*")):
            (backend / part.name).symlink_to(part)
        for name, given, answer in ((IDENTITY, "INPUT0", "OUTPUT0"), (MLP, "input", "a2")):
            (models / name / "1").mkdir(parents=True)
            shutil.copy(_MODEL, models / name / "1" / "model.py")
            onnx = self.repository / MLP / "model.onnx" if name == MLP else ""
            config = _CONFIG.format(name=name, input=given, output=answer, onnx=onnx)
            (models / name / "config.pbtxt").write_text(config)
        return [
            str(self._server / "bin" / "tritonserver"),
            f"--model-repository={models}",
            f"--backend-directory={backend.parent}",
            *("--grpc-address=127.0.0.1", f"--grpc-port={self.port}"),
            *("--allow-http=false", "--allow-metrics=false", "--log-info=false"),
        ]

    def environment(self) -> Mapping[str, str]:
        libraries = os.pathsep.join((str(self._server / "external_libs"), os.environ.get("LD_LIBRARY_PATH", "")))
        path = os.pathsep.join((str(self.home / "bin"), os.environ["PATH"]))
        return {"LD_LIBRARY_PATH": libraries, "PATH": path, "VIRTUAL_ENV": str(self.home), "OMP_NUM_THREADS": "1"}
