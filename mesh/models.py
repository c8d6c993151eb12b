"""A registered model's way into memory: its settings, its files, its loader. Everything here blocks."""

from __future__ import annotations

from pathlib import Path

from loaders import canonical, loader_for
from loaders.artifacts import resolve
from loaders.base import Artifact, LoaderError
from loaders.storage.source import Held, Storage, holding
from mesh.resident import Resident
from mesh.settings import ModelSettings, from_key
from placement.records import ModelRecord


class Models:
    """Sizes and loads registered models."""

    def __init__(self, storage: Storage, allowed_code: frozenset[str]) -> None:
        self._storage = storage
        self._allowed_code = allowed_code

    def stop(self) -> None:
        """End what waits for stores."""
        self._storage.stop()

    def estimate_bytes(self, model: ModelRecord) -> int:
        """Bytes it will take loaded. Frameworks tell that from a model's files, so they are fetched for it.

        Raises:
            LoaderError: with the store's or the framework's reason.
        """
        settings = settings_of(model)
        with holding(self._held(model, settings)) as path:
            return loader_for(format_of(model)).estimate_bytes(self._artifact(model, path, settings))

    def load(self, model: ModelRecord) -> Resident:
        """The model in memory.

        Raises:
            LoaderError: see `estimate_bytes`.
        """
        settings = settings_of(model)
        held = self._held(model, settings)
        try:
            loaded = loader_for(format_of(model)).load(self._artifact(model, held.path, settings))
            return Resident(loaded, settings, held)
        except BaseException:
            held.close()
            raise

    def _held(self, model: ModelRecord, settings: ModelSettings) -> Held:
        return self._storage.hold(model.path, settings.storage_key, settings.storage_params)

    def _artifact(self, model: ModelRecord, path: Path | str, settings: ModelSettings) -> Artifact:
        return Artifact(
            path=resolve(format_of(model), str(path), allowed_code=self._allowed_code),
            parameters=settings.parameters,
            inputs=settings.inputs,
            outputs=settings.outputs,
            model_id=model.model_id,
        )


def is_fetched(model: ModelRecord) -> bool:
    """Whether its files come from a store, which may take long."""
    return "://" in model.path or "storage_key" in model.key


def settings_of(model: ModelRecord) -> ModelSettings:
    """What was registered with the model.

    Raises:
        LoaderError: the key is not what registration lets through: it was written by hand.
    """
    try:
        return from_key(model.key)
    except ValueError as error:
        raise LoaderError(str(error)) from None


def format_of(model: ModelRecord) -> str:
    """The format in ModelInfo.type: `onnx`, or as ModelMesh's controller writes it, `mt:onnx[:version][|pv:protocol]`;
    with `rt:<runtime>`, which names a server and no format, the key's `model_type`.

    Raises:
        LoaderError: see `settings_of`.
    """
    if model.format.startswith("rt:"):
        return canonical(settings_of(model).model_type)
    return canonical(model.format.removeprefix("mt:").split("|")[0].split(":")[0])
