"""Models that are Python: a directory with `model.py`, run in a process of its own (`loaders.isolated`).

`model.py` has a class `Model`, or one class with `predict`, or the functions themselves:

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]    # optional, as is `outputs`
        def load(self, path, parameters): ...     # optional; takes none, one or both
        def predict(self, inputs): ...            # {name: ndarray} -> {name: ndarray}, or one ndarray
        def unload(self): ...                     # optional

`load`, `predict` and `unload` may be coroutines. A ValueError in `predict` is the request's fault, any other exception
the model's. The directory is the working directory and on the path. BYTES are object arrays of `bytes`; text may be
answered. A model that declares no `inputs` is handed whatever comes; what it answers is brought to its `outputs`. A
`kserve.Model` is called as KServe's server would with a V2 request.

The process keeps the pod safe from a model's faults (crash, leak, endless loop), not from malice: it runs as the pod's
user. Parameters of ours: `implementation` (`model.Name`), `python` (an interpreter with numpy, for a model's own
packages), `threads`, `memory_bytes`, `timeout_ms` of a request, `load_timeout_ms`, `env`; all others are the model's.
"""

from __future__ import annotations

from typing import Final

from loaders.base import Artifact, Signature
from loaders.isolated.model import IsolatedModel, files_bytes, load, settings_of

_PROCESS_BYTES: Final = 3 << 20
"""Of a process, without what it shares with the one that it was forked from."""
_UNTOLD: Final = Signature((), (), platform="python", lenient=True)


class PythonLoader:
    """Starts a process for each model."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        settings_of(artifact)
        return _PROCESS_BYTES + files_bytes(artifact.path)

    def load(self, artifact: Artifact) -> IsolatedModel:
        return load(settings_of(artifact), artifact, _UNTOLD, self.estimate_bytes(artifact))
