"""Calls that go through this pod without a handler: where they go is known at once, and nothing of them is decoded.

This is the usual forward. What it cannot do at once (ask the registry, load, wait, try another pod) is left to the
handler, which takes it up where it stands (`Call.begun`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

from mesh.directory import Directory
from mesh.driver import now_ms
from mesh.errors import Code, InvalidRequest
from mesh.router import Router, passed_on
from mesh.rpc import Call, Client, Metadata, Onward
from placement.engine import Engine
from placement.records import PodId
from protos.inference_pb2 import ModelInferRequest

_NAME_FIELD: Final = ModelInferRequest.MODEL_NAME_FIELD_NUMBER
_PASSED: Final = "relay.passed"


class ModelRelay:
    """Implements `mesh.rpc.Relay` for ModelInfer."""

    def __init__(
        self,
        engine: Engine,
        router: Router,
        directory: Directory,
        client: Client,
        observe: Callable[[Code, float], None],
    ) -> None:
        """`observe` is told how each call ended that no handler saw, and after how many seconds."""
        self.client = client
        self._engine = engine
        self._router = router
        self._directory = directory
        self._observe = observe

    def onward(self, call: Call, message: bytes) -> Onward | None:
        try:
            if self._router.is_from_a_pod(call):
                return None  # what was forwarded is never forwarded again
            model_id = self._directory.known(call, message, _NAME_FIELD)
        except InvalidRequest:
            return None
        if model_id is None:
            return None
        engine = self._engine
        route = engine.route_elsewhere(model_id, now_ms())
        if route is None:
            return None
        call.begun = model_id, route, None
        pod_id, hop = route
        return pod_id, engine.view.pods[pod_id].address, self._router.told(model_id, hop)

    def passed(self, call: Call) -> Metadata:
        passed = call.memo.get(_PASSED)
        if passed is None:
            passed = call.memo[_PASSED] = passed_on(call.metadata)
        return cast(Metadata, passed)

    def started(self, pod_id: PodId) -> None:
        self._engine.forward_started(pod_id)

    def ended(self, pod_id: PodId, code: Code | None, elapsed_s: float, *, reached: bool) -> None:
        self._engine.forward_ended(pod_id, reached=reached, now_ms=0 if reached else now_ms())
        if code is not None:
            self._observe(code, elapsed_s)
