"""A model of an architecture: its weights mapped from their file, its runs on the session it shares or on its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loaders.artifacts import agreed
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor
from loaders.fleet.architectures import PREPACKED_FILE, WEIGHTS_FILE, Architecture, Facts, architectures, read_facts
from loaders.fleet.feeding import Fed, open_architecture, open_session
from loaders.fleet.promotion import WORTHWHILE, Worth, build_s, promotions
from loaders.memory.process import Change
from loaders.memory.weights import CorruptWeights, WeightsFile
from loaders.onnx_session import InvalidArgument, reason_of
from loaders.prepare import Damaged

_Run = Callable[[Sequence[str], Mapping[str, Tensor]], list[Tensor]]

_MODEL_BYTES: Final = 6_500
_TENSOR_BYTES: Final = 850
"""What a model and each of its weights take beside their bytes: the file's first page, arrays, a binding."""


class SharedLoader:
    """Loads what `split` wrote; an artifact's path is the folder, which must stay until the model is unloaded."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        with _opened(artifact.path) as file:
            facts = None if file.architecture in architectures else read_facts(artifact.path)
            return _bytes(file, facts)

    def load(self, artifact: Artifact) -> SharedModel:
        folder = artifact.path
        with _opened(folder) as file:
            file.verify()
            file.populate()
            weights, digest = file.views(), file.architecture
            architecture, is_first = architectures.take(digest, lambda: open_architecture(digest, folder, weights))
            try:
                declares = artifact.inputs or artifact.outputs
                signature = agreed(architecture.signature, artifact) if declares else architecture.signature
                size_bytes = _bytes(file, architecture.facts if is_first else None)
                return SharedModel(architecture, signature, size_bytes, folder, weights)
            except BaseException:
                architectures.drop(architecture)
                raise


@contextmanager
def _opened(folder: Path) -> Iterator[WeightsFile]:
    try:
        with WeightsFile(folder / WEIGHTS_FILE) as file:
            yield file
    except CorruptWeights as error:
        raise Damaged(str(error), retryable=True) from error


class SharedModel:
    """Runs on its architecture's session; on one of its own, with prepacked weights, while it is promoted."""

    waits = 0

    def __init__(
        self,
        architecture: Architecture,
        signature: Signature,
        size_bytes: int,
        folder: Path,
        weights: Mapping[str, Tensor],
    ) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self.session_bytes = architecture.facts.session_bytes
        self.worth = Worth()
        self._architecture = architecture
        self._folder = folder
        self._lock = threading.Lock()
        self._run: _Run | None = Fed(architecture.session, weights).run
        self._is_promoted = False
        saving = architecture.facts.saving
        self._spared = saving if saving >= WORTHWHILE and self.session_bytes <= size_bytes else 0.0
        """Seconds that prepacking would spare of a run's, or spares for each of a run's."""
        self._build_s = build_s(size_bytes)

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: ONNX Runtime's reason; `bad_input` for shapes, datatypes and values that it calls invalid.
        """
        run, started = self._run, time.perf_counter()
        assert run is not None
        try:
            results = run(outputs, inputs)
        except Exception as error:
            raise InferError(reason_of(error), bad_input=isinstance(error, InvalidArgument)) from error
        if self._spared:
            now_s = time.perf_counter()
            worth_s = self.worth.add((now_s - started) * self._spared, now_s)
            if worth_s > self._build_s and not self._is_promoted:
                promotions.consider(self)
        return dict(zip(outputs, results, strict=True))

    def unload(self) -> None:
        with Change():
            with self._lock:
                self._run = None
            promotions.forget(self)
            architectures.drop(self._architecture)

    def promote(self) -> bool:
        """Build a session with prepacked weights and run on it; False: the model was unloaded meanwhile.

        Raises:
            LoaderError: it cannot be built.
        """
        with Change():
            try:
                session = open_session(self._folder / PREPACKED_FILE)
            except Exception as error:
                if self._run is None:  # and its files may be gone
                    return False
                raise LoaderError(f"{PREPACKED_FILE}: {reason_of(error)}") from error
            saving = self._architecture.facts.saving
            return self._switch(session.run, promoted=True, spared=saving / (1 - saving))

    def demote(self) -> None:
        """Run on the architecture's session again.

        Raises:
            LoaderError: the weights cannot be mapped any more.
        """
        with Change():
            with WeightsFile(self._folder / WEIGHTS_FILE) as file:
                run = Fed(self._architecture.session, file.views()).run
            self._switch(run, promoted=False, spared=self._architecture.facts.saving)

    def _switch(self, run: _Run, *, promoted: bool, spared: float) -> bool:
        with self._lock:
            if self._run is None:
                return False
            self._run, self._is_promoted, self._spared = run, promoted, spared
            return True


def _bytes(file: WeightsFile, facts: Facts | None) -> int:
    """`facts`: of an architecture that this model is the first of, and pays for; others have it for nothing."""
    layout = file.layout
    own = layout.size_bytes + _MODEL_BYTES + _TENSOR_BYTES * len(layout.places)
    return own + (facts.session_bytes if facts else 0)
