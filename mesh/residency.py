"""Having a model loaded somewhere in the mesh, or nowhere, without inferring: what management calls need of routing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from mesh.driver import Driver
from mesh.router import HOP, MODEL, Router
from mesh.rpc import HOLDER, Call, Client
from placement.cache import Copy
from placement.messages import CopyUnwanted, Hop
from placement.records import CopyRecord, CopyStatus, ModelId, PodId
from protos import management_pb2 as pb

ENSURE_LOADED: Final = "/mmesh.ModelMesh/ensureLoaded"


class Residency:
    """Loads and gives up models across pods."""

    def __init__(self, driver: Driver, router: Router, client: Client) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._router = router
        self._client = client

    async def ensure_loaded(self, model_id: ModelId, deadline: float, used_ms: int | None = None) -> PodId:
        """Return the pod that holds the model when it is loaded there.

        Raises:
            MeshError: see `Router.walk`.
        """
        request = pb.EnsureLoadedRequest(modelId=model_id, lastUsedTime=used_ms or 0, sync=True)
        call = Call(ENSURE_LOADED, (), deadline)
        async with asyncio.timeout_at(deadline):
            await self.ensure_for(call, request.SerializeToString(), model_id, Hop.CLIENT, used_ms)
        return call.reply_metadata[HOLDER]

    async def ensure_for(self, call: Call, message: bytes, model_id: ModelId, hop: Hop, used_ms: int | None) -> bytes:
        """The same for a call that came from a pod."""
        return await self._router.walk(call, message, model_id, hop, _loaded, used_ms)

    async def give_up(self, call: Call, message: bytes, model_id: ModelId) -> None:
        """Return when no pod holds a copy; the same call is sent to those that do.

        Raises:
            MeshError: a holder could not be told.
        """
        self._driver.step(CopyUnwanted(model_id))
        if not call.texts(HOP):
            metadata = ((HOP, Hop.HIT_ONLY.value), (MODEL, model_id.encode()))
            pods = [self._engine.view.pods.get(pod_id) for pod_id in self._engine.view.copies(model_id)]
            async with asyncio.TaskGroup() as tasks:
                for pod in pods:
                    if pod is not None and pod.pod_id != self._engine.pod_id:
                        told = self._client.call(pod.address, call.method, message, metadata, call.deadline)
                        tasks.create_task(told)
        while model_id in self._engine.cache.copies:
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
