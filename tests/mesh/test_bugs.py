"""What a bug of ours does to a pod. Authority: docs/ARCHITECTURE.md, Errors, and decision 0005."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh import inference
from mesh.config import Config
from mesh.pod import Pod
from mesh.registry.memory import MemoryRegistry, MemoryStore
from placement.lifecycle import IllegalMove
from tests.mesh.pods import Loads, Mesh, request_for, running


@pytest.fixture
async def one(loads: Loads) -> AsyncIterator[Mesh]:
    async with running("a", loads) as mesh:
        yield mesh


async def test_a_handler_that_breaks_fails_its_request_and_not_the_pod(
    one: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that ended a pod would be sent to the next one, and end that too."""
    await one.register("m")

    def broken(message: bytes) -> None:
        raise ZeroDivisionError("nobody thought of this")

    with monkeypatch.context() as patched:
        patched.setattr(inference, "decode", broken)
        code, says = await one.clients["a"].refusal("ModelInfer", request_for("m"))
    assert (code, says) == ("INTERNAL", "the server could not handle this request; its log says why")
    assert await one.infer("m") == "a"


async def test_an_engine_that_breaks_ends_the_pod() -> None:
    """Its books are not to be trusted any more."""
    pod = Pod(Config(host="127.0.0.1", grpc_port=0, metrics_port=0), MemoryRegistry(MemoryStore()))
    running_pod = asyncio.create_task(pod.run())
    await pod.serving.wait()

    def broken(event: object, now_ms: int) -> None:
        raise IllegalMove("from nowhere to nowhere")

    pod.engine.step = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(ExceptionGroup) as ended:
        await running_pod  # its next tick is the end
    assert ended.group_contains(IllegalMove)
