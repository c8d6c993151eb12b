"""Brings the registry's records into this pod's view, in order, and tells who waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing

from mesh.registry.base import Change, Compacted, Deleted, Entry, Registry, RegistryError
from placement.records import BadRecord, ModelId, Record, decode
from placement.view import ClusterView

log = logging.getLogger(__name__)

_RETRY_S = 0.5


class Mirror:
    """The only writer of a `ClusterView`."""

    def __init__(
        self,
        registry: Registry,
        view: ClusterView,
        *,
        on_models_changed: Callable[[Iterable[ModelId]], None],
        on_pod_gone: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._view = view
        self._on_models_changed = on_models_changed
        self._on_pod_gone = on_pod_gone
        self._waiting: set[tuple[Callable[[], bool], asyncio.Future[None]]] = set()
        self.revision = 0
        """Everything up to here is in the view."""
        self.quarantined: dict[str, str] = {}
        """Keys whose value this version cannot read, and why; they are not in the view."""

    async def load(self) -> None:
        """Make the view equal to the registry now.

        Raises:
            RegistryError
        """
        snapshot = await self._registry.snapshot()
        self.quarantined.clear()
        records = [record for entry in snapshot.entries if (record := self._read(entry)) is not None]
        addresses = {pod.address for pod in self._view.pods.values()}
        self._on_models_changed(self._view.replace(records))
        for address in addresses - {pod.address for pod in self._view.pods.values()}:
            self._on_pod_gone(address)
        self._caught_up(snapshot.revision)

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        while True:
            try:
                async with aclosing(self._registry.watch(self.revision)) as changes:
                    async for batch in changes:
                        self._apply(batch)
            except Compacted:
                log.warning("the registry's history was compacted; reading everything anew")
            except RegistryError as error:
                log.warning("cannot watch the registry: %s", error)
                await asyncio.sleep(_RETRY_S)
            try:
                await self.load()
            except RegistryError as error:
                log.warning("cannot read the registry: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Return when the predicate holds; it is tried after every batch of changes."""
        if predicate():
            return
        waiter = (predicate, asyncio.get_running_loop().create_future())
        self._waiting.add(waiter)
        try:
            await waiter[1]
        finally:
            self._waiting.discard(waiter)

    async def caught_up(self, revision: int) -> None:
        """Return when the view holds everything up to a revision (that of an own write)."""
        await self.until(lambda: self.revision >= revision)

    async def fetch(self, key: str) -> Record | None:
        """The model or vmodel at a key as the registry has it now, past the watch's lag; it is taken into the view.

        Raises:
            RegistryError
        """
        entry = await self._registry.get(key)
        record = self._read(entry) if entry is not None else None
        if entry is not None and entry.revision <= self.revision:
            # The watch has brought it meanwhile, and perhaps its end: applied now, it would stay for ever.
            return self._known(key)
        if record is not None:
            changed = self._view.apply(record)
            if changed is not None:
                self._on_models_changed([changed])
        return record

    def _known(self, key: str) -> Record | None:
        """The model or vmodel that the view has at a key."""
        kind, _, name = key.partition("/")
        return self._view.models.get(name) if kind == "models" else self._view.vmodels.get(name)

    def _apply(self, batch: Iterable[Change]) -> None:
        revision = self.revision
        for change in batch:
            revision = max(revision, change.revision)
            if isinstance(change, Deleted):
                self.quarantined.pop(change.key, None)
                kind, _, name = change.key.partition("/")
                if kind == "pods" and name in self._view.pods:
                    self._on_pod_gone(self._view.pods[name].address)
                changed = self._view.remove(change.key, change.revision)
            else:
                record = self._read(change)
                changed = self._view.apply(record) if record is not None else self._view.remove(change.key)
            if changed is not None:
                self._on_models_changed([changed])
        self._caught_up(revision)

    def _read(self, entry: Entry) -> Record | None:
        try:
            record = decode(entry.key, entry.value, revision=entry.revision, created=entry.created)
        except BadRecord as error:
            log.error("registry record ignored: %s", error)
            self.quarantined[entry.key] = str(error)
            return None
        self.quarantined.pop(entry.key, None)
        return record

    def _caught_up(self, revision: int) -> None:
        self.revision = revision
        for predicate, future in list(self._waiting):
            if not future.done() and predicate():
                future.set_result(None)
