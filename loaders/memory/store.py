"""Weights in two tiers: a slab of host memory, and the arena of a device that is filled from it.

    fill      file -> host          load      file -> device, through two buffers of the slab
    promote   host -> device        demote    device -> host        drop      out of one of them

A method blocks the thread that calls it until the bytes are there; several may run at once, from any threads. One lock
guards the books and is held for microseconds; while bytes move only if it is within a tier, to join what is free
(`compaction`). What a transfer reads or writes is not given away before it has ended; a model in use (`using`) is not
dropped or moved. A copy that fails leaves the books as they were. A device that is lost is fenced: whatever needs it is
refused, its models can still be dropped, and the host tier lives on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from loaders.base import LoaderError
from loaders.memory.buffers import BUFFER_BYTES, Buffers, Source
from loaders.memory.compaction import make_hole
from loaders.memory.dedup import Catalogue, Known, ModelKey, Part
from loaders.memory.device import CopyFailed, Copying, Device, DeviceLost, DeviceMemory, Move, placed
from loaders.memory.slots import Slot, Slots
from loaders.memory.tier import Filling, NoRoom, Resident, Rows, Tier, Usage, moves_between, moves_of, rows_of
from loaders.memory.weights_index import Contents, CorruptWeights

COMPACTED_FROM: Final = 0.02
"""Share of a tier that must be free beyond what is needed: to find what to move takes milliseconds, in which nobody can
begin to use a model; below that it is cheaper to give up one more."""


class Store:
    """The tiers of one device."""

    def __init__(self, device: Device, buffer_bytes: int = BUFFER_BYTES) -> None:
        """The host tier has what two buffers leave of the device's slab.

        Raises:
            ValueError: the slab is smaller than they are.
        """
        host_bytes = device.slab_bytes - 2 * buffer_bytes
        if host_bytes < 0:
            raise ValueError(f"slab_bytes: expected at least {2 * buffer_bytes}, not {device.slab_bytes}")
        self.host = Tier("host", host_bytes)
        self.device = Tier("device", device.arena_bytes)
        self.lost = ""
        """Why the device is not used any more; empty: it is."""
        self.slots = Slots(device.views)
        self._port = device
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._catalogue = Catalogue(self._cut)
        self._buffers = Buffers(device, host_bytes, buffer_bytes)

    def fill(self, key: ModelKey, source: Source) -> None:
        """Read a model into the host tier.

        Raises:
            NoRoom, TooLarge, CorruptWeights, LoaderError: as `load`.
        """
        source.verify()
        with self._arriving(key, source.contents, self.host) as (resident, rows):
            for move in moves_of(resident.spans, rows):
                source.read_into(self._port.slab[move.target : move.target + move.size_bytes], move.source)

    def load(self, key: ModelKey, source: Source) -> None:
        """Read a model into the device, without room in the host tier.

        Raises:
            NoRoom: make room and try again. TooLarge: it will never fit.
            CorruptWeights: the file is to be dropped and made again.
            CopyFailed: try again. DeviceLost: the device is fenced.
            LoaderError: the file cannot be read.
        """
        source.verify()
        with self._arriving(key, source.contents, self.device) as (resident, rows):
            resident.slot = self.slots.at(source.contents.layout, resident.spans)
            self._buffers.up(source, moves_of(resident.spans, rows))

    def promote(self, key: ModelKey) -> None:
        """Copy a model from the host to the device; the host keeps it until it is dropped there.

        Raises:
            NoRoom, TooLarge, CopyFailed, DeviceLost: as `load`.
        """
        self._copy(key, self.host, self.device, self._port.up)

    def demote(self, key: ModelKey) -> None:
        """Copy a model from the device to the host; the device keeps it until it is dropped there.

        Raises:
            NoRoom, TooLarge, CopyFailed, DeviceLost: as `load`.
        """
        self._copy(key, self.device, self.host, self._port.down)

    def drop(self, key: ModelKey, tier: Tier) -> None:
        """Give up a model in a tier; what it shares with others stays.

        Raises:
            ValueError: it is not there, or in use.
        """
        with self._lock:
            resident = self._here(key, tier)
            if resident.pins:
                raise ValueError(f"{key!r} is in use in the {tier.name}'s memory {resident.pins} times")
            self._leave(key, tier)

    @contextmanager
    def using(self, key: ModelKey) -> Iterator[Slot]:
        """The slot of a model on the device, where it stays until the end of the block; what the device was told to
        compute with it must have ended by then. A `DeviceLost` raised in the block fences the device.

        Raises:
            ValueError: it is not there.
            DeviceLost: the device is fenced.
        """
        with self._lock:
            self._check()
            resident = self._here(key, self.device)
            resident.pins += 1
        try:
            if resident.slot is None:  # it was moved
                resident.slot = self.slots.at(resident.known.layout, resident.spans)
            yield resident.slot
        except DeviceLost as error:
            self.lost = self.lost or str(error)
            raise
        finally:
            with self._lock:
                resident.pins -= 1

    def check(self, key: ModelKey, tier: Tier) -> None:
        """Read a model's bytes where they lie and compare them with their digests.

        Raises:
            ValueError: it is not there.
            CorruptWeights: naming the tensor.
            CopyFailed, DeviceLost: they cannot be read.
        """
        with self._lock:
            resident = self._here(key, tier)
            resident.pins += 1
        try:
            contents = resident.known.contents
            for (place, offset), digest in zip(placed(contents.layout, resident.spans), contents.digests, strict=True):
                found = hashlib.sha256()
                if tier is self.host:
                    found.update(self._port.slab[offset : offset + place.size_bytes])
                else:
                    self._buffers.down(offset, place.size_bytes, found.update)
                if found.hexdigest() != digest:
                    raise CorruptWeights(f"tensor {place.name!r} of {key!r} in the {tier.name}'s memory has changed")
        finally:
            with self._lock:
                resident.pins -= 1

    def holds(self, key: ModelKey, tier: Tier) -> bool:
        """Whether all its bytes are there."""
        with self._lock:
            resident = tier.models.get(key)
            return resident is not None and resident.here

    def memory(self) -> DeviceMemory:
        """What the device itself says.

        Raises:
            DeviceLost: nothing.
        """
        return self._port.memory()

    def usage(self, tier: Tier) -> Usage:
        with self._lock:
            return tier.usage()

    def marginal_bytes(self, key: ModelKey, tier: Tier) -> int:
        """What dropping a model would free; see `Tier`."""
        with self._lock:
            return tier.marginal_bytes(key)

    def charged_bytes(self, key: ModelKey, tier: Tier) -> int:
        """A model's share of what is taken; see `Tier`."""
        with self._lock:
            return tier.charged_bytes(key)

    def _copy(self, key: ModelKey, source: Tier, target: Tier, start: Callable[[Sequence[Move]], Copying]) -> None:
        with self._lock:
            self._check()
            held = self._here(key, source)
            held.pins += 1
        try:
            with self._arriving(key, held.known.contents, target) as (resident, rows):
                moves = moves_between(held.spans, resident.spans, rows)
                copying = start(moves) if moves else None
                if target is self.device:
                    resident.slot = self.slots.at(held.known.layout, resident.spans)
                if copying is not None:
                    copying.wait()
        finally:
            with self._lock:
                held.pins -= 1

    @contextmanager
    def _arriving(self, key: ModelKey, contents: Contents, target: Tier) -> Iterator[tuple[Resident, Rows]]:
        """A model on its way into a tier: its place, and the rows of its run that the block must bring there."""
        filling = Filling()
        with self._lock:
            if target is self.device:
                self._check()
            if key in target.models:
                raise ValueError(f"{key!r} is in the {target.name}'s memory already")
            known = self._catalogue.add(key, contents)
            try:
                resident, missing = self._place(known, filling, target)
            except LoaderError:
                self._forget(known)
                raise
            parts = tuple(known.parts)
            others = {target.parts[part].filling for part in parts} - {filling, None}
            for part in parts:
                part.transfers += 1
        try:
            yield resident, rows_of(parts, missing)
            with self._lock:
                for part in missing:
                    target.parts[part].filling = None
                filling.ended = True
                self._arrived.notify_all()
                self._wait_for(others)
                resident.here = True
        except BaseException as error:
            with self._lock:
                if isinstance(error, DeviceLost):
                    self.lost = self.lost or str(error)
                self._leave(key, target)
                if not filling.ended:
                    filling.ended, filling.error = True, error
                    self._arrived.notify_all()
            raise
        finally:
            with self._lock:
                for part in parts:
                    part.transfers -= 1

    def _wait_for(self, others: Iterable[Filling | None]) -> None:
        """For what other transfers bring of a model."""
        for other in filter(None, others):
            self._arrived.wait_for(lambda other=other: other.ended)  # type: ignore[misc]
            if other.error is not None:
                raise CopyFailed(f"bytes that it shares with another model did not arrive: {other.error}")

    def _place(self, known: Known, filling: Filling, target: Tier) -> tuple[Resident, list[Part]]:
        try:
            return target.place(known, filling)
        except NoRoom as no_room:
            left_bytes = target.arena.free_bytes - no_room.needed_bytes
            if left_bytes >= target.arena.capacity_bytes * COMPACTED_FROM and not self.lost:
                for hole_bytes in (no_room.needed_bytes, no_room.largest_bytes):
                    if make_hole(target, hole_bytes, lambda moves: self._shift(target, moves)):
                        with suppress(NoRoom):
                            return target.place(known, filling)
            raise

    def _shift(self, tier: Tier, moves: Sequence[Move]) -> None:
        try:
            self._port.shift(moves, in_slab=tier is self.host).wait()
        except DeviceLost as error:
            self.lost = self.lost or str(error)
            raise

    def _here(self, key: ModelKey, tier: Tier) -> Resident:
        resident = tier.models.get(key)
        if resident is None or not resident.here:
            raise ValueError(f"{key!r} is not in the {tier.name}'s memory")
        return resident

    def _leave(self, key: ModelKey, tier: Tier) -> None:
        self._forget(tier.release(key))

    def _forget(self, known: Known) -> None:
        if not known.tiers:
            self._catalogue.remove(known.key)

    def _cut(self, part: Part, pieces: Sequence[Part]) -> None:
        for tier in (self.host, self.device):
            tier.cut(part, pieces)

    def _check(self) -> None:
        if self.lost:
            raise DeviceLost(self.lost)
