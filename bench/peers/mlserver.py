"""MLServer (Seldon), inference in its own process: `parallel_workers` 0, which is its fastest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from bench.peers.base import IDENTITY, MLP, VenvPeer

_MODEL: Final = Path(__file__).with_name("inside") / "mlserver_model.py"


class MLServer(VenvPeer):
    name = "mlserver"
    title = "MLServer"
    packages = ("mlserver==1.7.1", "uvloop==0.21.0", "onnxruntime")  # with a newer uvloop its workers die

    def command(self) -> list[str]:
        settings = {
            "host": "127.0.0.1",
            "grpc_port": self.port,
            "http_port": self._spare_port,
            "parallel_workers": 0,
            "debug": False,
            "metrics_endpoint": None,
            "grpc_max_message_length": 1 << 26,
        }
        models = self.scratch / "models"
        for name in (IDENTITY, MLP):
            (models / name).mkdir(parents=True)
            shutil.copy(_MODEL, models / name / f"model_{name}.py")  # their modules share one namespace
            model = {
                "name": name,
                "implementation": f"model_{name}.Model",
                "parameters": {"uri": str(self.repository / MLP / "model.onnx") if name == MLP else "./"},
            }
            (models / name / "model-settings.json").write_text(json.dumps(model))
        (models / "settings.json").write_text(json.dumps(settings))
        return [str(self.home / "bin" / "mlserver"), "start", str(models)]
