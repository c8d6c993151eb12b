"""What do models take, and what was expected? A job of `bench.formats --sizes`: `python -m bench.sizes KIND FILE...`.

One process for each kind. A model's true bytes are what the process's resident set shrinks by when copies of it are
unloaded and malloc is trimmed, over their number: so many copies that they take `_WORTH_BYTES` together, since pages
and arenas are no part of one small model. Each copy has run three times. One copy of the first model, loaded and
dropped before, has taken what the framework itself takes.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import warnings
from pathlib import Path
from typing import Final

from bench.jobs import tell
from bench.zoo import ZOO, Kind
from loaders import loader_for
from loaders.base import Artifact, LoadedModel
from loaders.memory.process import keep_message_buffers, resident_bytes

_WORTH_BYTES: Final = 32 << 20
_MOST_COPIES: Final = 300
_SECONDS: Final = 4.0
"""For the loads of one model."""


def main() -> int:
    warnings.simplefilter("ignore")
    kind, paths = ZOO[sys.argv[1]], [Path(path) for path in sys.argv[2:]]
    keep_message_buffers()  # as a pod does
    _loaded(kind, paths[0]).unload()
    for size, path in enumerate(paths):
        tell({"size": size, "file": path.name, **_measured(kind, path)})
    return 0


def _measured(kind: Kind, path: Path) -> dict[str, float]:
    expected_bytes = loader_for(kind.format).estimate_bytes(Artifact(path))
    started_s = time.perf_counter()
    models = [_loaded(kind, path)]
    most = min(_MOST_COPIES, max(2, int(_SECONDS / (time.perf_counter() - started_s))))
    while len(models) < most and len(models) * expected_bytes < _WORTH_BYTES:
        models.append(_loaded(kind, path))
    loaded_bytes = _settled_bytes()
    told_bytes = sum(model.size_bytes for model in models) / len(models)
    copies = len(models)
    while models:
        models.pop().unload()
    true_bytes = (loaded_bytes - _settled_bytes()) / copies
    return {"expected": expected_bytes, "told": told_bytes, "true": true_bytes, "copies": copies}


def _loaded(kind: Kind, path: Path) -> LoadedModel:
    model = loader_for(kind.format).load(Artifact(path))
    rows = {model.signature.inputs[0].name: kind.rows(1)}
    for _ in range(3):
        model.infer(rows, [model.signature.outputs[0].name])
    return model


def _settled_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


if __name__ == "__main__":
    sys.exit(main())
