"""Having a model loaded somewhere in the mesh, or nowhere, without inferring: what management calls need of routing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from mesh.driver import Driver
from mesh.errors import MeshError
from mesh.router import HOP, MODEL, PREFETCH, Router
from mesh.rpc import HOLDER, Call, Client
from placement.cache import Copy
from placement.messages import CopyUnwanted, Hop, LoadOn
from placement.records import CopyRecord, CopyStatus, ModelId, PodId
from protos import management_pb2 as pb

log = logging.getLogger(__name__)

_BACKGROUND_S: Final = 600.0
"""How long a load may take that nobody waits for (ModelMesh: 600 s)."""

_AHEAD: Final = ((PREFETCH, "1"),)

ENSURE_LOADED: Final = "/mmesh.ModelMesh/ensureLoaded"


class Residency:
    """Loads and gives up models across pods."""

    def __init__(self, driver: Driver, router: Router, client: Client, tasks: asyncio.TaskGroup) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._router = router
        self._client = client
        self._tasks = tasks
        self._under_way: set[ModelId] = set()

    async def ensure_loaded(
        self, model_id: ModelId, deadline: float, used_ms: int | None = None, *, is_prefetch: bool = False
    ) -> PodId:
        """Return the pod that holds the model when it is loaded there; `is_prefetch`: nobody is kept from anything
        meanwhile.

        Raises:
            MeshError: see `Router.walk`.
        """
        request = pb.EnsureLoadedRequest(modelId=model_id, lastUsedTime=used_ms or 0, sync=True)
        call = Call(ENSURE_LOADED, _AHEAD if is_prefetch else (), deadline)
        async with asyncio.timeout_at(deadline):
            await self.ensure_for(call, request.SerializeToString(), model_id, Hop.CLIENT, used_ms)
        return call.reply_metadata[HOLDER]

    def ensure_in_background(self, model_id: ModelId, used_ms: int | None = None) -> None:
        """Start `ensure_loaded` without waiting for it; its failure is remembered by the pod that failed."""
        if model_id not in self._under_way:
            self._under_way.add(model_id)
            self._tasks.create_task(self.ensure_quietly(model_id, used_ms))

    async def ensure_quietly(self, model_id: ModelId, used_ms: int | None = None) -> None:
        """`ensure_loaded` with a long deadline, whose failure is only logged."""
        try:
            deadline = asyncio.get_running_loop().time() + _BACKGROUND_S
            await self.ensure_loaded(model_id, deadline, used_ms, is_prefetch=True)
        except MeshError as error:
            log.warning("%s", error)
        except TimeoutError:
            log.warning("model %r is not loaded after %.0f s", model_id, _BACKGROUND_S)
        finally:
            self._under_way.discard(model_id)

    async def load_on(self, wanted: LoadOn) -> None:
        """Have a certain pod load a model; its failure is only logged."""
        pod = self._engine.view.pods.get(wanted.pod_id)
        deadline = asyncio.get_running_loop().time() + _BACKGROUND_S
        request = pb.EnsureLoadedRequest(
            modelId=wanted.model_id, lastUsedTime=wanted.used_ms, sync=True
        ).SerializeToString()
        metadata = ((HOP, Hop.LOAD_HERE.value), (MODEL, wanted.model_id.encode()), *_AHEAD)
        try:
            async with asyncio.timeout_at(deadline):
                if wanted.pod_id == self._engine.pod_id:
                    call, used_ms = Call(ENSURE_LOADED, _AHEAD, deadline), wanted.used_ms or None
                    await self.ensure_for(call, request, wanted.model_id, Hop.LOAD_HERE, used_ms)
                elif pod is not None:
                    await self._client.call(pod.address, ENSURE_LOADED, request, metadata, deadline)
        except MeshError as error:
            log.warning("model %r on pod %s: %s", wanted.model_id, wanted.pod_id, error)
        except TimeoutError:
            log.warning("model %r is not loaded on pod %s after %.0f s", wanted.model_id, wanted.pod_id, _BACKGROUND_S)

    async def ensure_for(self, call: Call, message: bytes, model_id: ModelId, hop: Hop, used_ms: int | None) -> bytes:
        """The same for a call that came from a pod."""
        return await self._router.walk(call, message, model_id, hop, _loaded, used_ms)

    async def give_up(self, call: Call, message: bytes, model_id: ModelId) -> None:
        """Return when every pod has given up its copy; the same call is sent to those that have one.

        Raises:
            MeshError: a holder could not be told.
        """
        copy = self._engine.cache.copies.get(model_id)
        self._driver.step(CopyUnwanted(model_id))
        if not call.texts(HOP):
            metadata = ((HOP, Hop.HIT_ONLY.value), (MODEL, model_id.encode()))
            view = self._engine.view
            pods = [view.pods[pod_id] for pod_id in view.copies(model_id) if pod_id in view.pods]
            calls = [
                self._client.call(pod.address, call.method, message, metadata, call.deadline)
                for pod in pods
                if pod.pod_id != self._engine.pod_id
            ]
            for failed in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(failed, BaseException):
                    raise failed
        while copy is not None and self._engine.cache.copies.get(model_id) is copy:
            await self._driver.changed(model_id)


async def _loaded(copy: Copy, call: Call, message: bytes) -> bytes:
    """The answer of a pod that holds the model."""
    status = pb.ModelStatusInfo(status=pb.ModelStatusInfo.LOADED)
    return status.SerializeToString()


def overall(copies: Collection[CopyRecord]) -> tuple[CopyStatus | None, list[str]]:
    """A model's status from its copies, and why loads failed: the best that any pod has; None: no pod has any."""
    by_status = {copy.status for copy in copies}
    errors = [f"pod {copy.pod_id}: {copy.error}" for copy in copies if copy.error]
    return next((status for status in _BEST_FIRST if status in by_status), None), errors


_BEST_FIRST: Final = (CopyStatus.LOADED, CopyStatus.LOADING, CopyStatus.FAILED)
