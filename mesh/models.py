"""A registered model's way into memory: its settings, its files, its loader. Everything here blocks.

What is registered with a model goes over the schema that its key names (`schema_path`), that over files in its
directory (`mesh.declared`; only if the directory is what was registered), and those over what the model itself says,
which must not contradict them (`loaders.artifacts.agreed`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from loaders import canonical, loader_for
from loaders.artifacts import local_path, reading, resolve
from loaders.base import Artifact, Loader, LoaderError
from loaders.storage.source import Held, Storage, holding
from mesh.declared import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SETTINGS_FILE,
    Declared,
    check_inside,
    declared_in,
    read_text,
    signature_in,
)
from mesh.resident import Resident
from mesh.runtime.model import RemoteLoader
from mesh.runtime.runtime import Runtime
from mesh.settings import ModelSettings, from_key
from mesh.warmup import warm_up
from placement.records import ModelRecord

_ROOT: Final = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://[^/]*")


class Models:
    """Sizes and loads registered models."""

    def __init__(self, storage: Storage, allowed_code: frozenset[str], runtime: Runtime | None = None) -> None:
        """`runtime`: the model server beside the pod, if there is one."""
        self._storage = storage
        self._runtime = runtime
        self._allowed_code = allowed_code

    def stop(self) -> None:
        """End what waits for stores, and for the model server."""
        self._storage.stop()
        if self._runtime is not None:
            self._runtime.stop()

    def close(self) -> None:
        """Nothing is sized or loaded any more."""
        self._storage.close()

    def estimate_bytes(self, model: ModelRecord) -> int:
        """Bytes it will take loaded. Frameworks tell that from a model's files, so they are fetched for it.

        Raises:
            LoaderError: with the store's or the framework's reason.
        """
        settings = settings_of(model)
        with holding(self._held(model, settings)) as path:
            artifact, _ = self._read(model, settings, path)
            return self._loader(model).estimate_bytes(artifact)

    def load(self, model: ModelRecord) -> Resident:
        """The model in memory, warm if its settings ask for that.

        Raises:
            LoaderError: see `estimate_bytes`; a file beside it does not declare what it should; it fails to warm up.
        """
        settings = settings_of(model)
        held = self._held(model, settings)
        try:
            if settings.schema_path and not self._is_pulled(model):
                settings = settings.over(self._schema(model, settings))
            artifact, settings = self._read(model, settings, held.path)
            loaded = self._loader(model).load(artifact)
            try:
                warm_up(loaded, settings.warmup)
            except BaseException:
                loaded.unload()
                raise
            return Resident(loaded, settings, held)
        except BaseException:
            held.close()
            raise

    def _is_remote(self, model: ModelRecord) -> bool:
        runtime = self._runtime
        return runtime is not None and runtime.settings.serves(model.format, format_of(model))

    def _is_pulled(self, model: ModelRecord) -> bool:
        """Whether the model server fetches it."""
        return self._runtime is not None and self._runtime.settings.pulls and self._is_remote(model)

    def _loader(self, model: ModelRecord) -> Loader:
        if self._runtime is not None and self._is_remote(model):
            return RemoteLoader(self._runtime, model, named_format(model))
        return loader_for(format_of(model))

    def _held(self, model: ModelRecord, settings: ModelSettings) -> Held:
        if self._is_pulled(model):
            return Held(model.path)
        return self._storage.hold(model.path, settings.storage_key, settings.storage_params)

    def _read(self, model: ModelRecord, settings: ModelSettings, where: Path | str) -> tuple[Artifact, ModelSettings]:
        """The model's files, and its settings: those given over what files in its directory declare."""
        if self._is_remote(model):  # whose files say to the server what they say
            return Artifact(Path(where), settings.parameters, settings.inputs, settings.outputs), settings
        format_name = format_of(model)
        said, uri = Declared(), str(where)
        if uri not in ("", "synthetic") and (directory := local_path(uri)).is_dir():
            with _declaring(directory):
                said = declared_in([directory], directory)
                if said.where == SETTINGS_FILE and said.uri:
                    check_inside(directory / said.uri, directory)
                    uri = str(directory / said.uri)
                default = said.uri if said.where == CONFIG_FILE else ""
                path = resolve(format_name, uri, allowed_code=self._allowed_code, default_model_filename=default)
                said = declared_in([path.parent, directory], directory)
        else:
            path = resolve(format_name, uri, allowed_code=self._allowed_code)
        # What concerns the registration is not told by files that only a load sees.
        settings = settings.over(replace(said.settings, version="", placement={}))
        artifact = Artifact(path, settings.parameters, settings.inputs, settings.outputs, model.model_id)
        return artifact, settings

    def _schema(self, model: ModelRecord, settings: ModelSettings) -> ModelSettings:
        """ModelMesh's `schema_path`: a URI, a path from the root of what holds the model (bucket, claim, host), or, for
        a model in the pod's file system, from its directory.
        """
        uri = settings.schema_path
        if (root := _ROOT.match(model.path)) and not _ROOT.match(uri):
            uri = f"{root[0]}/{uri.lstrip('/')}"
        elif not settings.storage_key and not _ROOT.match(uri):
            path = local_path(model.path)
            uri = str((path if path.is_dir() else path.parent) / uri)
        held = self._storage.hold(uri, settings.storage_key, settings.storage_params, MAX_CONFIG_BYTES)
        with holding(held) as found, _declaring(path := local_path(str(found))):
            return signature_in(f"schema_path {settings.schema_path[:256]!r}", read_text(path))


@contextmanager
def _declaring(path: Path) -> Iterator[None]:
    """What is wrong with a file that declares something, as the load's failure."""
    try:
        with reading(path):
            yield
    except ValueError as error:
        raise LoaderError(str(error)) from None


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
    """Our name of the format that a model was registered with.

    Raises:
        LoaderError: see `settings_of`.
    """
    return canonical(named_format(model))


def named_format(model: ModelRecord) -> str:
    """The format in ModelInfo.type: `onnx`, or as ModelMesh's controller writes it, `mt:onnx[:version][|pv:protocol]`;
    with `rt:<runtime>`, which names a server and no format, the key's `model_type`.

    Raises:
        LoaderError: see `settings_of`.
    """
    if model.format.startswith("rt:"):
        return settings_of(model).model_type
    return model.format.removeprefix("mt:").split("|")[0].split(":")[0]
