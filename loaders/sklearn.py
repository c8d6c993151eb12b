"""scikit-learn estimators: `.skops`, and `.joblib` or `.pkl` where the operator allows pickles.

A `.skops` file holds data, not code: skops constructs only types on its own list plus `_INTERNALS`, all else is refused
by name. (Wrong numbers inside a `Tree` or `KDTree` can still crash the compiled code that reads them.) skops before
0.13 can be made to run code (CVE-2025-54412, -54413, -54886) and is refused. A pickle is code.

Requests: one 2-D input of any numeric datatype (taken as FP64) or BYTES (UTF-8 strings), under any name; an estimator
that was fitted on a data frame also takes one input for each column, under its name (MLServer's pandas codec, KServe's
named inputs). Answers: `predict`, and `predict_proba` for those who ask for it, as MLServer and KServe have it.

One thread per request: joblib runs sequentially whatever `n_jobs` the estimator was trained with, BLAS (process-wide)
and OpenMP (per calling thread) are limited to one. A model saved by another version of scikit-learn loads with its
warning logged, as with MLServer and KServe; if it does not load, the reason names the version here.
"""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import bytes_of
from loaders.memory.process import Change
from loaders.taking_turns import framework_load

try:
    import joblib
    import sklearn
    import skops.io
    import threadpoolctl  # type: ignore[import-untyped]
    from sklearn.base import is_regressor

    from loaders.sklearn_rows import Rows
except ImportError as missing:
    raise LoaderError(f"{missing.name} is not installed: pip install 'densemesh[sklearn]'") from missing

_INTERNALS: Final = [
    "sklearn._loss.loss.HalfTweedieLossIdentity",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.cluster._bisect_k_means._BisectingTree",
    "sklearn.cluster._kmeans._kmeans_single_lloyd",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
    *(
        f"sklearn.gaussian_process.kernels.{kernel}"
        for kernel in ("ConstantKernel", "DotProduct", "Exponentiation", "ExpSineSquared", "Matern", "Product")
    ),
    *(f"sklearn.gaussian_process.kernels.{kernel}" for kernel in ("RBF", "RationalQuadratic", "Sum", "WhiteKernel")),
    *(
        f"sklearn.metrics._dist_metrics.{metric}Distance64"
        for metric in ("Chebyshev", "Euclidean", "Manhattan", "Minkowski")
    ),
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
]
"""Parts of scikit-learn's own estimators that skops 0.16 does not trust by itself: found by saving every classifier,
regressor and clusterer of scikit-learn 1.9 fitted with its defaults."""

_PICKLE: Final = b"\x80"
_COMPRESSED: Final = 4
"""An uncompressed pickle's size over its compressed one, roughly; only estimates depend on it."""
_OBJECTS_BYTES: Final = 4096
"""Python objects of the smallest estimator beside what its pickle holds."""

_threads: Final = threading.local()


class SklearnLoader:
    """Reads `.skops`, `.joblib` and `.pkl`; loads one model at a time."""

    def __init__(self) -> None:
        """Check the installation.

        Raises:
            LoaderError: skops is older than 0.13.
        """
        if tuple(int(part) for part in version("skops").split(".")[:2]) < (0, 13):
            raise LoaderError(f"skops {version('skops')} can be made to run code: pip install 'skops>=0.13'")

    def estimate_bytes(self, artifact: Artifact) -> int:
        path = artifact.path
        parameters(artifact, "sklearn")
        with reading(path, "a skops archive"):
            if path.suffix == ".skops":
                with zipfile.ZipFile(path) as archive:
                    arrays = [each.file_size for each in archive.infolist() if each.filename != "schema.json"]
                return sum(arrays) + _OBJECTS_BYTES
            with path.open("rb") as file:
                plain = file.read(1) == _PICKLE
            return path.stat().st_size * (1 if plain else _COMPRESSED) + _OBJECTS_BYTES

    def load(self, artifact: Artifact) -> SklearnModel:
        path = artifact.path
        estimate = self.estimate_bytes(artifact)
        with Change(), framework_load(path):
            try:
                is_skops = path.suffix == ".skops"
                estimator = skops.io.load(path, trusted=_INTERNALS) if is_skops else joblib.load(path)
            except skops.io.exceptions.UntrustedTypesFoundException as error:
                raise LoaderError(f"{path.name} holds types that are not trusted: {error}") from error
            except Exception as error:
                here = f"scikit-learn {sklearn.__version__}"
                reason = f"{path.name} does not load with {here}: {type(error).__name__}: {error}"
                raise LoaderError(reason, retryable=isinstance(error, MemoryError)) from error
            rows = Rows(estimator)
            signature = agreed(_signature(estimator, rows), artifact)
            return SklearnModel(estimator, rows, signature, _size(estimator, estimate))


class SklearnModel:
    """One fitted estimator."""

    waits: Final = 0

    def __init__(self, estimator: Any, rows: Rows, signature: Signature, size_bytes: int) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self.rows = rows
        self.estimator = estimator
        self._datatypes = {spec.name: spec.datatype for spec in signature.outputs}

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once per output asked for.

        Raises:
            InferError: scikit-learn's reason; `bad_input` for its ValueErrors (wrong width, NaN, not a number).
        """
        try:
            rows = self.rows.of(inputs)
            with _one_thread():
                return {name: self._answer(name, rows) for name in outputs}
        except InferError:
            raise
        except ValueError as error:
            raise InferError(str(error), bad_input=True) from error
        except Exception as error:
            raise InferError(f"{type(error).__name__}: {error}", bad_input=False) from error

    def unload(self) -> None:
        with Change():
            del self.estimator

    def _answer(self, name: str, rows: Any) -> Tensor:
        answer = np.asarray(getattr(self.estimator, name)(rows))
        match self._datatypes[name]:
            case "BYTES":
                return bytes_of(answer)
            case "INT64":
                return np.ascontiguousarray(answer, dtype=np.int64)
            case "BOOL":
                return np.ascontiguousarray(answer, dtype=np.bool_)
            case _:
                return np.ascontiguousarray(answer, dtype=np.float64)


def _signature(estimator: Any, rows: Rows) -> Signature:
    """`input-0` as wide as the training data, or the columns of a data frame; estimators of raw text have no width and
    take strings [-1]."""
    if not hasattr(estimator, "predict"):
        raise LoaderError(f"a {type(estimator).__name__} has no predict")
    classes = getattr(estimator, "classes_", None)
    outputs = [TensorSpec("predict", _datatype(estimator, classes), (-1, *_targets(estimator, rows)))]
    # Several targets answer a list of arrays of different widths, which is no tensor.
    if hasattr(estimator, "predict_proba") and isinstance(classes, np.ndarray):
        outputs.append(TensorSpec("predict_proba", "FP64", (-1, len(classes))))
    return Signature(rows.specs, tuple(outputs), platform="sklearn", lenient=True, default_outputs=("predict",))


def _datatype(estimator: Any, classes: Any) -> str:
    """Of `predict`: that of the classes, real numbers for regressors, else numbers of clusters or outlier marks."""
    if classes is None:
        return "FP64" if is_regressor(estimator) else "INT64"
    kinds = {np.asarray(each).dtype.kind for each in (classes if isinstance(classes, list) else [classes])}
    if kinds & set("USO"):
        return "BYTES"
    return "FP64" if "f" in kinds else "BOOL" if kinds == {"b"} else "INT64"


def _targets(estimator: Any, rows: Rows) -> tuple[int, ...]:
    """Shape of one row's prediction, which only a prediction tells; () if zeros are no possible row."""
    try:
        with _one_thread():
            zeros = rows.of({"": np.zeros((1, rows.width or 0))})
            return tuple(np.shape(estimator.predict(zeros))[1:])
    except Exception:  # text, categories never seen: models of one target, as good as always
        return ()


class _Count:
    """A file that keeps only the number of bytes written to it."""

    written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)


def _size(estimator: Any, estimate: int) -> int:
    """Bytes the estimator's state would pickle to, arrays counted and not copied.

    Within 18 % of the trimmed RSS that unloading returns, for seven estimators of 100 KB to 34 MB (forests, boosting,
    k-NN, SVC, MLP) in both formats.
    """
    count = _Count()
    arrays: list[int] = []
    try:
        pickle.Pickler(count, 5, buffer_callback=lambda buffer: arrays.append(buffer.raw().nbytes)).dump(estimator)
    except (pickle.PicklingError, TypeError, AttributeError):  # loaded from code that does not pickle any more
        return estimate
    return count.written + sum(arrays) + _OBJECTS_BYTES


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP's limit belongs to the calling thread, so every thread that runs models sets it once."""
    if not hasattr(_threads, "limit"):
        _threads.limit = threadpoolctl.threadpool_limits(limits=1)
    with joblib.parallel_config(backend="sequential"):
        yield
