"""Models that MLflow saved: directories with `MLmodel`.

Where a flavour's own file is data that a loader here reads, that is what is served, and no code is run: `onnx`,
`xgboost` (`.ubj`, `.json`), `lightgbm` (a Booster's text file), `sklearn` in skops' format, which is MLflow's default.
Anything else is a pyfunc: cloudpickle, so its author's code, allowed by `--allow-code mlflow` and run in a process of
its own (`loaders.isolated`). Its Python must have mlflow; parameter `python` names another than the pod's. Parameters
that are not those of `loaders.python` are pyfunc's `model_config`.

The signature in `MLmodel` tells inputs and outputs. As with MLServer, named columns are one input each, [n, 1] or [n],
and become a DataFrame; one input [n, columns] in their place does as well. Numbers may come in any datatype. An answer
without a name is `predict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders import loader_for
from loaders.artifacts import reading
from loaders.base import Artifact, InferError, LoadedModel, LoaderError, Signature, Tensor, TensorSpec
from loaders.datatypes import datatype_of
from loaders.isolated import mlflow_model
from loaders.isolated.model import OURS, files_bytes, load, settings_of

try:
    import yaml
except ImportError as missing:
    raise LoaderError("yaml is not installed: pip install 'densemesh[mlflow]'") from missing

_COLUMNS: Final = {
    "boolean": "BOOL",
    "integer": "INT32",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
    "binary": "BYTES",
    "datetime": "BYTES",
}
"""MLflow's types of columns."""
_NATIVE: Final = {
    "onnx": ("data", (".onnx",)),
    "xgboost": ("data", (".ubj", ".json")),
    "lightgbm": ("data", (".lgb", ".txt")),
    "sklearn": ("pickled_model", (".skops",)),
}
"""By flavour: what names its file, and what that ends with if it is data."""
_PROCESS_BYTES: Final = 180 << 20
"""A process with mlflow and pandas."""
_QUIET: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_TRACKING_URI": "file:///nonexistent",  # by default a data base in the working directory
}
_MOST_BYTES: Final = 16 << 20
"""Of `MLmodel`."""


class MlflowLoader:
    """Reads directories with `MLmodel`."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        described = _described(artifact.path)
        if (native := _native(described, artifact)) is not None:
            return loader_for(native[0]).estimate_bytes(native[1])
        _check_allowed(described, artifact)
        settings_of(artifact)
        return _PROCESS_BYTES + files_bytes(artifact.path)

    def load(self, artifact: Artifact) -> LoadedModel:
        described = _described(artifact.path)
        inputs, outputs = (_specs(described, field) for field in ("inputs", "outputs"))
        if (native := _native(described, artifact)) is not None:
            try:
                model = loader_for(native[0]).load(native[1])
                takes_one = native[0] != "onnx" and len(model.signature.inputs) == 1
                return ColumnsModel(model, inputs) if takes_one and len(inputs) > 1 else model
            except LoaderError as error:
                if error.retryable or "mlflow" not in artifact.allowed_code:
                    raise
        _check_allowed(described, artifact)
        settings = settings_of(artifact)
        settings = replace(settings, module=mlflow_model.__file__, outputs=(), env={**_QUIET, **settings.env})
        own = Signature(inputs, outputs, platform="mlflow", lenient=True)
        return load(settings, artifact, own, self.estimate_bytes(artifact))


class ColumnsModel:
    """A model of one input [n, columns] that takes the columns one by one as well."""

    def __init__(self, model: LoadedModel, columns: Sequence[TensorSpec]) -> None:
        self.signature = replace(model.signature, inputs=tuple(columns), lenient=True)
        self.size_bytes = model.size_bytes
        self.waits = model.waits
        self._model = model
        self._name = model.signature.inputs[0].name

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: columns of different lengths, or the model's own reason.
        """
        if len(inputs) == 1:
            return self._model.infer({self._name: next(iter(inputs.values()))}, outputs)
        try:
            columns = [inputs[spec.name].reshape(-1).astype(np.float64) for spec in self.signature.inputs]
            rows = np.column_stack(columns)
        except ValueError as error:
            raise InferError(str(error), bad_input=True) from None
        return self._model.infer({self._name: rows}, outputs)

    def unload(self) -> None:
        self._model.unload()


def inner(artifact: Artifact) -> tuple[str, Artifact] | None:
    """The format and the file that are served of a model, where that is the same as if the file had been registered.

    Raises:
        LoaderError: `MLmodel` is not what MLflow writes.
    """
    described = _described(artifact.path)
    native = _native(described, artifact)
    takes_columns = native is not None and native[0] != "onnx" and len(_specs(described, "inputs")) > 1
    return None if takes_columns else native


def _described(path: Path) -> dict[str, Any]:
    """`MLmodel`."""
    with reading(path), (path / "MLmodel").open("rb") as file:
        text = file.read(_MOST_BYTES)
    try:
        described = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise LoaderError(f"MLmodel is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(described, dict) or not isinstance(described.get("flavors"), dict):
        raise LoaderError("MLmodel has no flavors: expected the file that MLflow writes")
    return described


def _native(described: Mapping[str, Any], artifact: Artifact) -> tuple[str, Artifact] | None:
    """The format and the file of a flavour that is data, if there is one."""
    path, flavors = artifact.path, described["flavors"]
    for flavor, (field, extensions) in _NATIVE.items():
        told = flavors.get(flavor)
        name = told.get(field) if isinstance(told, dict) else None
        if not isinstance(name, str) or not name.endswith(extensions) or not (path / name).is_file():
            continue
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise LoaderError(f"MLmodel: {name!r} of flavor {flavor} leads out of {path.name}")
        if flavor in ("xgboost", "lightgbm") and any(spec.datatype == "BYTES" for spec in _specs(described, "inputs")):
            continue  # categories by their names, which only a DataFrame has
        own = {name: value for name, value in artifact.parameters.items() if name not in OURS}
        return flavor, replace(artifact, path=path / name, parameters=own)
    return None


def _check_allowed(described: Mapping[str, Any], artifact: Artifact) -> None:
    pyfunc = described["flavors"].get("python_function")
    if not isinstance(pyfunc, dict):
        raise LoaderError(f"MLmodel has no flavor that is served: python_function, {', '.join(_NATIVE)}")
    if "mlflow" not in artifact.allowed_code:
        what = f"{artifact.path.name} is a pyfunc ({pyfunc.get('loader_module')}), which runs its author's code"
        raise LoaderError(f"{what}: refused without --allow-code mlflow")


def _specs(described: Mapping[str, Any], field: str) -> tuple[TensorSpec, ...]:
    """A signature's `inputs` or `outputs`: JSON in YAML, a list of columns or tensors; empty: it does not tell."""
    signature = described.get("signature")
    told = signature.get(field) if isinstance(signature, dict) else None
    if not told:
        return ()
    single = "input-0" if field == "inputs" else "predict"
    try:
        return tuple(_spec(each, each.get("name") or single) for each in json.loads(told))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LoaderError(f"MLmodel: signature.{field} is not understood: {type(error).__name__}: {error}") from None


def _spec(told: Mapping[str, Any], name: str) -> TensorSpec:
    if told["type"] != "tensor":  # arrays and objects are columns of JSON, so to say
        return TensorSpec(name, _COLUMNS.get(told["type"], "BYTES"), (-1, 1))
    tensor = told["tensor-spec"]
    dtype = np.dtype(tensor["dtype"])
    return TensorSpec(name, datatype_of(dtype), tuple(int(size) for size in tensor["shape"]))
