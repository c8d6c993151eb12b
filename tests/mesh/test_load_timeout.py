"""A loader that does not come back, in a pod (`--load-timeout-s`; ModelMesh: modelLoadingTimeoutMillis)."""

from __future__ import annotations

from placement.lifecycle import CopyState
from protos import management_pb2 as mm
from tests.mesh.pods import Loads, request_for, running, until


async def test_a_load_that_hangs_holds_nobody_up(loads: Loads) -> None:
    gate = loads.hold("m")
    async with running("a", loads, load_slots=1, load_timeout_s=0.05) as mesh:
        a, engine = mesh.clients["a"], mesh.pods["a"].engine
        await mesh.register("m")
        await mesh.register("n")
        status, message = await a.refusal("ModelInfer", request_for("m"))
        assert (status, "not loaded after 0.05 s" in message) == ("UNAVAILABLE", True)
        told = await a.call("getModelStatus", mm.GetStatusRequest(modelId="m"))
        assert told.status == mm.ModelStatusInfo.LOADING_FAILED
        taken = engine.cache.resident_bytes
        assert taken > 0, "the loader may have taken memory"
        assert await mesh.infer("n") == "a"
        gate.set()
        await until(lambda: engine.cache.copies["m"].state is CopyState.LOADED)
        assert await mesh.infer("m") == "a", "what comes late serves after all"
        assert engine.stats.loads_overdue == 1
