"""KServe's Python model server."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.peers.base import IDENTITY, MLP, VenvPeer

_SERVER: Final = Path(__file__).with_name("inside") / "kserve_server.py"


class KServe(VenvPeer):
    name = "kserve"
    title = "KServe"
    packages = ("kserve==0.21.0", "onnxruntime")

    def command(self) -> list[str]:
        network = str(self.repository / MLP / "model.onnx")
        return [str(self.python), str(_SERVER), str(self.port), str(self._spare_port), IDENTITY, MLP, network]
