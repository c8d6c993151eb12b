"""A registered model's way into memory: its settings, its files, its loader. Everything here blocks.

What is registered with a model goes over the schema that its key names (`schema_path`), that over files in its
directory (`mesh.declared`; only if the directory is what was registered), and those over what the model itself says,
which must not contradict them (`loaders.artifacts.agreed`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from loaders import canonical, loader_for
from loaders.artifacts import local_path, newest_version, reading, resolve
from loaders.base import Artifact, LoadedModel, Loader, LoaderError
from loaders.memory.process import private_bytes
from loaders.memory.store import Store
from loaders.memory.tiered import TieredLoader, TieredModel, load_tiered
from loaders.memory.weights_index import CorruptWeights
from loaders.prepare import Damaged
from loaders.prepare.preparation import Outcome, Preparation, Prepared
from loaders.storage.source import SHA256, Fetched, Held, Storage, holding
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
from mesh.resident import Files, Resident
from mesh.runtime.model import RemoteLoader
from mesh.runtime.runtime import Runtime
from mesh.settings import ModelSettings, from_key
from mesh.sizes import Sizes
from mesh.warmup import warm_up
from placement.records import ModelRecord

log = logging.getLogger(__name__)

_ROOT: Final = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://[^/]*")


class Models:
    """Sizes and loads registered models, in a prepared form where there is one."""

    def __init__(
        self,
        storage: Storage,
        allowed_code: frozenset[str],
        runtime: Runtime | None = None,
        preparation: Preparation | None = None,
        store: Store | None = None,
    ) -> None:
        """`runtime`: the model server beside the pod, if there is one; `store`: the device's memory, if it has any."""
        self.storage = storage
        self._store = store
        self._runtime = runtime
        self._allowed_code = allowed_code
        self._preparation = preparation
        self.sizes = Sizes()
        self.framework_bytes = 0
        """What importing frameworks took, and their first loads beside the model."""
        self._imported: set[str] = set()
        self._loaded_once: set[str] = set()

    @property
    def prepares(self) -> bool:
        """Whether better forms of models are made at all."""
        return self._preparation is not None

    @property
    def unprepared(self) -> str:
        """Why the model that `prepare` was called for last has no better form, if that is known."""
        return "" if self._preparation is None else self._preparation.said

    def stop(self) -> None:
        """End what waits for stores and for the model server, or is being prepared."""
        self.storage.stop()
        if self._runtime is not None:
            self._runtime.stop()
        if self._preparation is not None:
            self._preparation.stop()

    def close(self) -> None:
        """Nothing is sized, loaded or prepared any more."""
        self.storage.close()
        if self._preparation is not None:
            self._preparation.close()

    def estimate_bytes(self, model: ModelRecord) -> int:
        """Bytes it will take loaded. Frameworks tell that from a model's files, so they are fetched for it.

        Raises:
            LoaderError: with the store's or the framework's reason.
        """
        settings = settings_of(model)
        with holding(self._held(model, settings)) as path:
            artifact, _ = self._read(model, settings, path)
            if (prepared := self._prepared(model, artifact)) is not None:
                try:
                    with closing(prepared):
                        told_bytes = prepared.estimate_bytes()
                        return self.sizes.expect(model.model_id, prepared.form, artifact, told_bytes)
                except Damaged as error:
                    self._drop(model, artifact, error)
            if self._store is not None and isinstance(loader := self._loader(model), TieredLoader):
                return loader.weights_bytes(artifact)
            told_bytes = self._loader(model).estimate_bytes(artifact)
            if self._is_remote(model):
                return told_bytes
            return self.sizes.expect(model.model_id, format_of(model), artifact, told_bytes)

    def load(
        self, model: ModelRecord, fetched: Fetched | None = None, *, keep_in_host: bool = False, again: bool = True
    ) -> Resident:
        """The model in memory, warm if its settings ask for that. `fetched`: files that are here from before;
        `keep_in_host`: leave its weights in host memory too, if they can be apart from it; `again`: files in the cache
        that turn out damaged are fetched once more.

        Raises:
            LoaderError: see `estimate_bytes`; a file beside it does not declare what it should; it fails to warm up.
        """
        settings = settings_of(model)
        before, known = private_bytes(), self.framework_bytes
        files: Files = (held := self._held(model, settings, fetched))
        try:
            if settings.schema_path and not self._is_pulled(model):
                settings = settings.over(self._schema(model, settings))
            artifact, settings = self._read(model, settings, held.path)
            artifact = replace(artifact, is_fixed=held.is_fixed)
            found = self._load_prepared(model, artifact)
            if found is None:
                loaded, form = self._load(model, artifact, keep_in_host), ""
            else:
                files.close()  # which nothing reads any more
                loaded, files, form = *found, found[1].form
            try:
                warm_up(loaded, settings.warmup)
            except BaseException:
                loaded.unload()
                raise
            if isinstance(loaded, TieredModel):
                files.close()
            size_bytes = self.sizes.settle(model.model_id, form or format_of(model), loaded.size_bytes)
            if (what := form or format_of(model)) not in self._loaded_once:
                self._loaded_once.add(what)
                self.framework_bytes = max(known, known + private_bytes() - before - size_bytes)
            return Resident(loaded, settings, files, form, size_bytes, held.fetched)
        except CorruptWeights as error:
            files.close()
            if held.fetched is None or not again:
                raise
            log.warning("model %s is fetched again: %s", model.model_id, error)
            self.storage.release(held.fetched)
            return self.load(model, keep_in_host=keep_in_host, again=False)
        except BaseException:
            files.close()
            raise

    def _load(self, model: ModelRecord, artifact: Artifact, keep_in_host: bool) -> LoadedModel:
        loader = self._loader(model)
        if self._store is None or not isinstance(loader, TieredLoader):
            return loader.load(artifact)
        key = model.model_id, model.created
        return load_tiered(self._store, key, loader, artifact, keep_in_host=keep_in_host)

    def prepare(self, model: ModelRecord, is_wanted: Callable[[], bool]) -> Outcome | None:
        """Have a better form of a model made, however long it takes, if that is possible, and `is_wanted` when its turn
        comes; None: it was not tried."""
        if self._preparation is None or self._is_remote(model) or not is_wanted():
            return None
        try:
            settings = settings_of(model)
            with holding(self._held(model, settings)) as path:
                artifact, _ = self._read(model, settings, path)
                return self._preparation.prepare(format_of(model), artifact)
        except LoaderError as error:
            log.warning("model %s is not prepared: %s", model.model_id, error)
            return Outcome.FAILED

    def _prepared(self, model: ModelRecord, artifact: Artifact) -> Prepared | None:
        if self._preparation is None or self._is_remote(model):
            return None
        try:
            return self._preparation.find(format_of(model), artifact)
        except LoaderError as error:
            log.warning("model %s: no prepared form: %s", model.model_id, error)
            return None

    def _load_prepared(self, model: ModelRecord, artifact: Artifact) -> tuple[LoadedModel, Prepared] | None:
        prepared = self._prepared(model, artifact)
        if prepared is None:
            return None
        try:
            return prepared.load(), prepared
        except Damaged as error:
            prepared.close()
            self._drop(model, artifact, error)
            return None
        except BaseException:
            prepared.close()
            raise

    def _drop(self, model: ModelRecord, artifact: Artifact, error: Damaged) -> None:
        assert self._preparation is not None
        try:
            self._preparation.drop(format_of(model), artifact, str(error))
        except LoaderError as failure:
            log.warning("model %s: %s", model.model_id, failure)

    def _is_remote(self, model: ModelRecord) -> bool:
        runtime = self._runtime
        return runtime is not None and runtime.settings.serves(model.format, format_of(model))

    def _is_pulled(self, model: ModelRecord) -> bool:
        """Whether the model server fetches it."""
        return self._runtime is not None and self._runtime.settings.pulls and self._is_remote(model)

    def _loader(self, model: ModelRecord) -> Loader:
        if self._runtime is not None and self._is_remote(model):
            return RemoteLoader(self._runtime, model, named_format(model))
        format_name = format_of(model)
        if format_name in self._imported:
            return loader_for(format_name)
        before = private_bytes()
        loader = loader_for(format_name)
        self.framework_bytes += max(private_bytes() - before, 0)
        self._imported.add(format_name)
        return loader

    def _held(self, model: ModelRecord, settings: ModelSettings, fetched: Fetched | None = None) -> Held:
        """Its files in the version that the store has now, or if the store is away, as they were fetched before."""
        if self._is_pulled(model):
            return Held(model.path)
        try:
            return self.storage.hold(model.path, settings.storage_key, settings.storage_params)
        except LoaderError as error:
            held = self.storage.find(fetched) if fetched is not None and error.retryable else None
            if held is None:
                raise
            log.warning("model %s is loaded as it was fetched before: %s", model.model_id, error)
            return held

    def _read(self, model: ModelRecord, settings: ModelSettings, where: Path | str) -> tuple[Artifact, ModelSettings]:
        """The model's files, and its settings: those given over what files in its directory declare."""
        if self._is_remote(model):  # whose files say to the server what they say
            path = Path(where) if self._is_pulled(model) else local_path(str(where))
            return Artifact(path, settings.parameters, settings.inputs, settings.outputs), settings
        format_name = format_of(model)
        said, uri = Declared(), str(where)
        if uri not in ("", "synthetic") and (directory := local_path(uri)).is_dir():
            with _declaring(directory):
                said = declared_in([directory], directory)
                if said.where == SETTINGS_FILE and said.uri:
                    check_inside(directory / said.uri, directory)
                    uri = str(directory / said.uri)
                default = said.uri if said.where == CONFIG_FILE else ""
                path = resolve(
                    format_name,
                    uri,
                    allowed_code=self._allowed_code,
                    default_model_filename=default,
                    versions=said.versions,
                )
                home = directory if path == directory else newest_version(directory, said.versions)
                said = declared_in([home, directory], directory)
        else:
            path = resolve(format_name, uri, allowed_code=self._allowed_code)
        # What concerns the registration is not told by files that only a load sees.
        parameters = said.parameters_of(format_name)
        settings = settings.over(replace(said.settings, version="", placement={}, parameters=parameters))
        artifact = Artifact(
            path, settings.parameters, settings.inputs, settings.outputs, model.model_id, self._allowed_code
        )
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
        params = {name: value for name, value in settings.storage_params.items() if name != SHA256}  # the model's
        held = self.storage.hold(uri, settings.storage_key, params, MAX_CONFIG_BYTES)
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
