"""A model in memory, and what is known of it there."""

from __future__ import annotations

from typing import Protocol

from loaders.base import LoadedModel
from loaders.storage.source import Fetched
from mesh.company import Company
from mesh.limited import Limited
from mesh.plans import Plans
from mesh.rowwise import Kind, has_batch_dimension
from mesh.runtime.model import RemoteModel
from mesh.settings import ModelSettings
from mesh.workers import Workers


class Files(Protocol):
    """A model's files, which stay until `close`."""

    def close(self) -> None: ...


class Resident:
    """A loaded model, what was registered with it, and what its requests have taught."""

    __slots__ = (
        *("alone", "company", "fetched", "files", "form", "forward", "model", "plans"),
        *("settings", "size_bytes", "together", "tried", "workers"),
    )

    def __init__(
        self,
        model: LoadedModel,
        settings: ModelSettings,
        files: Files | None = None,
        form: str = "",
        size_bytes: int = 0,
        fetched: Fetched | None = None,
    ) -> None:
        self.model = model
        self.size_bytes = size_bytes or model.size_bytes
        self.form = form
        """Which prepared form it is (`loaders.prepare`); empty: it is as its owner wrote it."""
        self.fetched = fetched
        """Where on disk the files are that it was loaded from; None: they are its owner's."""
        self.files = files
        """They must stay while it is loaded: frameworks map them."""
        self.settings = settings
        self.plans = Plans()
        self.together = not settings.one_by_one and has_batch_dimension(model.signature)
        """Whether requests may be run together; False for good once one try has shown that they must not."""
        self.tried: dict[Kind, bool] = {}
        """Whether requests of a kind were found to be answered row by row; False: that is being tried."""
        self.forward = model.forward if isinstance(model, RemoteModel) else None
        """Has a server answer requests as they come; None: the model is run (`mesh.batcher`)."""
        self.company: Company | None = None
        """Of models that it may be run with in one call."""
        self.alone: tuple[int, float] | None = None
        """Bytes of inputs, and the processor time of a run on them; only of models with a family, which never wait."""
        self.workers: Workers | Limited | None = None
        """Threads of its own, if it waits for another process: one that hangs takes none of the others'. Or its share
        of everybody's, if it may run only so often at once."""

    def unload(self) -> None:
        """Give the memory back, and let go of the files. Blocks."""
        if self.workers is not None:
            self.workers.close()
        self.model.unload()
        if self.files is not None:
            self.files.close()
