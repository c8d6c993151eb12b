"""Keeps what this pod says of itself in the registry: wanted keys on one side, what was written on the other.

Level-based: only the newest value of a key is written, failures are tried again, and when the lease is lost a new one
is taken and everything is written anew. Nothing that serves requests waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mesh.registry.base import Registry, RegistryError, Session

log = logging.getLogger(__name__)

_BATCH = 64
_RETRY_S = 0.5


class Publisher:
    """Writes keys under one lease."""

    def __init__(self, registry: Registry, lease_ttl_s: float, on_lost: Callable[[], None] = lambda: None) -> None:
        self._registry = registry
        self._lease_ttl_s = lease_ttl_s
        self._on_lost = on_lost
        self._wanted: dict[str, bytes] = {}
        self._dirty: dict[str, None] = {}
        """Keys whose registry value may not be the wanted one, oldest first."""
        self._wake = asyncio.Event()
        self._clean = asyncio.Event()
        self._clean.set()
        self.connected = False
        """A lease is held."""

    def put(self, key: str, value: bytes) -> None:
        """From now on the key should hold this value."""
        if self._wanted.get(key) != value:
            self._wanted[key] = value
            self._touch(key)

    def delete(self, key: str) -> None:
        """From now on the key should not exist."""
        if self._wanted.pop(key, None) is not None:
            self._touch(key)

    async def flushed(self) -> None:
        """Return when everything wanted is written."""
        await self._clean.wait()

    async def run(self) -> None:
        """Write until cancelled, then give the lease back, which removes the keys."""
        while True:
            try:
                session = await self._registry.open_session(self._lease_ttl_s)
            except RegistryError as error:
                log.warning("no lease: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._dirty = dict.fromkeys(self._wanted)
            self.connected = True
            self._wake.set()
            lost = asyncio.create_task(session.lost())
            writing = asyncio.create_task(self._write(session))
            try:
                await asyncio.wait({lost, writing}, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    writing.result()
                log.warning("the registry lease was lost; registering anew")
            finally:
                self.connected = False
                for task in (lost, writing):
                    task.cancel()
                await asyncio.gather(lost, writing, return_exceptions=True)
                await session.close()
            self._on_lost()

    async def _write(self, session: Session) -> None:
        while True:
            self._wake.clear()
            while self._dirty:
                keys = list(self._dirty)[:_BATCH]
                for key in keys:
                    del self._dirty[key]
                results = await asyncio.gather(*(self._write_one(session, key) for key in keys))
                if not all(results):
                    await asyncio.sleep(_RETRY_S)
            self._clean.set()
            await self._wake.wait()

    async def _write_one(self, session: Session, key: str) -> bool:
        value = self._wanted.get(key)
        try:
            await (session.delete(key) if value is None else session.put(key, value))
        except RegistryError as error:
            log.warning("cannot write %s: %s", key, error)
            self._dirty.setdefault(key)
            return False
        return True

    def _touch(self, key: str) -> None:
        self._dirty.setdefault(key)
        self._clean.clear()
        self._wake.set()
