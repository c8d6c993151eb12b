"""`densemesh.Mesh/Explain`: why a model is where it is, as one pod sees it."""

from __future__ import annotations

from collections.abc import Callable

from mesh.directory import Directory, check_id
from mesh.driver import now_ms
from mesh.inference import parse
from mesh.placement_settings import NAMES
from mesh.rpc import Call
from placement.engine import Engine
from placement.explain import explain
from placement.records import ModelId
from placement.selection import Verdict
from protos import management_pb2 as pb


class Explanations:
    """Handler of the call."""

    def __init__(self, engine: Engine, directory: Directory, served_as: Callable[[ModelId], str]) -> None:
        """`served_as`: the form of a copy here, in words."""
        self._engine = engine
        self._served_as = served_as
        self._directory = directory

    async def explain(self, call: Call, message: bytes) -> bytes:
        """Answer for a model; for a vmodel, for its active one.

        Raises:
            InvalidRequest, ModelNotFound, RegistryError
        """
        asked = check_id("model_id", parse(pb.ExplainRequest, message).model_id)
        engine, view = self._engine, self._engine.view
        model_id = await self._directory.named(asked)
        model = view.models[model_id]
        found = explain(model, engine.peers, engine.copies_of(model_id), engine.limits.load_tries, now_ms())
        return pb.Explanation(
            model_id=model_id,
            pod_id=engine.pod_id,
            placement=pb.Placement(**{name: getattr(model, name) for name in NAMES}),
            size_bytes=view.measured(model_id) or 0,
            reasons=[*found.reasons, *filter(None, [self._served_as(model_id)])],
            pods=[_verdict(verdict) for verdict in found.verdicts],
        ).SerializeToString()


def _verdict(verdict: Verdict) -> pb.PodVerdict:
    return pb.PodVerdict(
        pod_id=verdict.pod_id,
        can_load=verdict.ok,
        reasons=verdict.reasons,
        parts_ms=verdict.parts_ms,
        total_ms=verdict.total_ms,
    )
