"""A pyfunc of MLflow as a model of `loaders.isolated.worker`, which reads this file by its path: its Python needs
numpy, pandas and mlflow, and nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Model:
    """What `mlflow.pyfunc.load_model` makes of a directory."""

    def load(self, path: str, parameters: dict[str, Any]) -> None:
        """`parameters`: for those who take them (`model_config`)."""
        import mlflow.pyfunc

        self._model = mlflow.pyfunc.load_model(path, model_config=parameters or None)
        self._takes = self._model.metadata.get_input_schema()
        gives = self._model.metadata.get_output_schema()
        self._gives = gives.input_names() if gives is not None and gives.has_input_names() else ["predict"]

    def predict(self, inputs: dict[str, Any]) -> Mapping[str, Any]:
        from mlflow.exceptions import MlflowException

        try:
            answer = self._model.predict(self._given(inputs))
        except MlflowException as error:
            if error.error_code in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE"):  # it does not fit the signature
                raise ValueError(error.message) from None
            raise
        return self._named(answer)

    def _given(self, inputs: dict[str, Any]) -> Any:
        """As the signature has it: a DataFrame of named columns, named tensors, or one tensor; without a signature one
        tensor as it is, or several as columns."""
        import pandas

        schema = self._takes
        if schema is None and len(inputs) == 1:
            (value,) = inputs.values()
            return _text(value)
        if schema is None or not schema.is_tensor_spec():
            names = schema.input_names() if schema is not None and schema.has_input_names() else list(inputs)
            if len(inputs) == 1 and len(names) > 1:
                (rows,) = inputs.values()
                if rows.ndim != 2 or rows.shape[1] != len(names):
                    raise ValueError(f"expected {len(names)} columns by name, or [n, {len(names)}], got {rows.shape}")
                inputs = dict(zip(names, rows.T, strict=True))
            elif len(inputs) == len(names) == 1:
                inputs = dict(zip(names, inputs.values(), strict=True))
            types = dict(zip(names, schema.numpy_types(), strict=True)) if schema is not None else {}
            return pandas.DataFrame({name: _column(value, types.get(name)) for name, value in inputs.items()})
        if schema.has_input_names():
            types = dict(zip(schema.input_names(), schema.numpy_types(), strict=True))
            return {name: _as(value, types.get(name)) for name, value in inputs.items()}
        if len(inputs) != 1:
            raise ValueError(f"expected one tensor, got {len(inputs)}")
        (value,) = inputs.values()
        return _as(value, schema.numpy_types()[0])

    def _named(self, answer: Any) -> Mapping[str, Any]:
        import pandas

        if isinstance(answer, pandas.DataFrame):
            return {str(name): column.to_numpy() for name, column in answer.items()}
        if isinstance(answer, Mapping):
            return answer
        array = np.atleast_1d(np.asarray(answer))
        if len(self._gives) == 1:
            return {self._gives[0]: array}
        if array.ndim == 2 and array.shape[1] == len(self._gives):
            return dict(zip(self._gives, array.T, strict=True))
        return {"predict": array}


def _column(value: Any, dtype: Any) -> Any:
    if value.ndim > 1 and value.shape[1:] == (1,):
        value = value.reshape(-1)
    return list(value) if value.ndim > 1 else _as(value, dtype)


def _as(value: Any, dtype: Any) -> Any:
    """In the type that the signature wants, which MLflow does not convert to by itself."""
    value = _text(value)
    return value.astype(dtype) if dtype is not None and np.dtype(dtype).kind in "biufM" else value


def _text(value: Any) -> Any:
    if value.dtype != object:
        return value
    try:
        texts = [item.decode() for item in value.ravel()]
    except UnicodeDecodeError:  # "binary" is a type of MLflow's too
        return value
    return np.array(texts, object).reshape(value.shape)
