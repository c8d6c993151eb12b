"""grpc.health.v1: SERVING while the pod takes requests. The empty service and the services we serve are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Final

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from mesh.errors import ModelNotFound, PodUnavailable
from mesh.inference import parse
from mesh.rpc import Call, Handlers

SERVICE: Final = "/grpc.health.v1.Health/"

_POLL_S: Final = 0.5


class Health:
    """Handlers of the health service."""

    def __init__(self, services: Collection[str], is_ready: Callable[[], bool]) -> None:
        self._services = {"", *services}
        self._is_ready = is_ready

    def handlers(self) -> Handlers:
        return Handlers({SERVICE + "Check": self._check}, {SERVICE + "Watch": self._watch})

    async def _check(self, call: Call, message: bytes) -> bytes:
        service = parse(HealthCheckRequest, message).service
        if service not in self._services:
            raise ModelNotFound(f"unknown service {service!r}")
        return _response(self._status(service))

    async def _watch(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The status now and whenever it changes, until the client goes away (health.proto, Watch) or the pod does."""
        told = None
        async for message in messages:
            service = parse(HealthCheckRequest, message).service
            while True:
                status = self._status(service)
                if status != told:
                    told = status
                    yield _response(status)
                if not self._is_ready():
                    raise PodUnavailable("the pod is going away")  # or this stream would hold up its end
                await asyncio.sleep(_POLL_S)

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._is_ready() else HealthCheckResponse.NOT_SERVING


def _response(status: HealthCheckResponse.ServingStatus) -> bytes:
    message: bytes = HealthCheckResponse(status=status).SerializeToString()
    return message
