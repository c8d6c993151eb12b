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
from mesh.histogram import Histogram
from mesh.router import Router, passed_on
from mesh.rpc import Client, Head, Metadata, Onward
from mesh.wire import PartialPeek
from placement.engine import Engine
from placement.messages import Hop
from placement.records import ModelId, PodId
from protos.inference_pb2 import ModelInferRequest

_NAME_FIELD: Final = ModelInferRequest.MODEL_NAME_FIELD_NUMBER
_HIT_ONLY: Final = Hop.HIT_ONLY  # looked up once: on the enum that takes 0.2 us
_PASSED: Final = "relay.passed"


class ModelRelay:
    """Implements `mesh.rpc.Relay` for ModelInfer."""

    def __init__(
        self,
        engine: Engine,
        router: Router,
        directory: Directory,
        client: Client,
        cell: Callable[[Code], Histogram],
    ) -> None:
        """`cell`: where latencies of calls that end with a status go; only of those that no handler saw."""
        self._engine = engine
        self._view = engine.view
        self._router = router
        self._directory = directory
        self._client = client
        self._cell = cell
        self._ok = cell(Code.OK)

    def onward(self, head: Head, message: bytes) -> Onward | None:
        try:
            if self._router.is_from_a_pod(head):
                return None  # what was forwarded is never forwarded again
            model_id = self._directory.known(head, message, _NAME_FIELD)
        except InvalidRequest:
            return None
        return None if model_id is None else self._to_holder(model_id)

    def onward_begun(self, head: Head, piece: bytes) -> tuple[Onward, PartialPeek | None] | None:
        peek = None
        try:
            if self._router.is_from_a_pod(head):
                return None
            if self._directory.is_named(head):
                model_id = self._directory.known(head, b"", _NAME_FIELD)
            else:
                peek = PartialPeek(_NAME_FIELD)
                model_id = self._directory.known_name(peek.found or "") if peek.feed(piece) else None
        except InvalidRequest:
            return None
        onward = None if model_id is None else self._to_holder(model_id)
        return None if onward is None else (onward, peek)

    def _to_holder(self, model_id: ModelId) -> Onward | None:
        engine = self._engine
        pod_id = engine.holder_elsewhere(model_id, now_ms())
        if pod_id is None:
            return None
        with_what = self._client.ready(self._view.pods[pod_id].address)
        if with_what is None:
            return None
        engine.stats.forwards += 1
        engine.forward_started(pod_id)
        return model_id, pod_id, with_what, self._router.told(model_id, _HIT_ONLY)

    def passed(self, head: Head) -> Metadata:
        passed = head.memo.get(_PASSED)
        if passed is None:
            passed = head.memo[_PASSED] = passed_on(head.metadata)
        return cast(Metadata, passed)

    def ended(self, pod_id: PodId, code: Code | None, elapsed_s: float, *, reached: bool) -> None:
        self._engine.forward_ended(pod_id, reached=reached, now_ms=0 if reached else now_ms())
        if code is not None:
            (self._cell(code) if code else self._ok).observe(elapsed_s)
