"""The other pods as this one deals with them: whom it sends what, who does not answer, and who is chosen next."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from random import Random

from placement.limits import Limits
from placement.records import CopyStatus, ModelId, ModelRecord, PodId, PodRecord
from placement.selection import Verdict, Wanted, choose_holder, choose_target, places_of, verdicts
from placement.view import IN_MEMORY, ClusterView


class Peers:
    """Of one pod."""

    def __init__(
        self, pod_id: PodId, limits: Limits, view: ClusterView, rng: Random, own_record: Callable[[], PodRecord]
    ) -> None:
        self._pod_id = pod_id
        self._limits = limits
        self._view = view
        self._rng = rng
        self._own_record = own_record
        self._in_flight: dict[PodId, int] = {}
        self._suspects: dict[PodId, tuple[int, int]] = {}
        """Pods that could not be reached: until when they are avoided, and in which life (`PodRecord.created`)."""
        self._assumed: dict[PodId, tuple[int, int]] = {}
        """Bytes sent to a pod to load since its record of that revision."""

    def forward_started(self, pod_id: PodId) -> None:
        self._in_flight[pod_id] = self._in_flight.get(pod_id, 0) + 1

    def forward_ended(self, pod_id: PodId, *, reached: bool, now_ms: int) -> None:
        """The peer has answered, or could not be reached and is avoided for a while."""
        left = self._in_flight[pod_id] - 1
        if left:
            self._in_flight[pod_id] = left
        else:
            del self._in_flight[pod_id]
        if not reached:
            pod = self._view.pods.get(pod_id)
            self._suspects[pod_id] = (now_ms + self._limits.suspect_ms, pod.created if pod else 0)
            self._assumed.pop(pod_id, None)  # nothing was sent after all, and the pod will not speak of it
        elif self._suspects:
            self._suspects.pop(pod_id, None)

    def tick(self, now_ms: int) -> None:
        """Forget what has passed."""
        self._suspects = {p: life for p, life in self._suspects.items() if self.is_suspect(p, now_ms)}
        self._assumed = {p: assumed for p, assumed in self._assumed.items() if self._assumed_bytes(p)}

    def is_suspect(self, pod_id: PodId, now_ms: int) -> bool:
        """Whether the pod could not be reached a moment ago and has not been started anew since."""
        until_ms, created = self._suspects.get(pod_id, (0, 0))
        pod = self._view.pods.get(pod_id)
        return until_ms > now_ms and (pod is None or pod.created == created)

    def pods(self) -> dict[PodId, PodRecord]:
        """All pods: this one as it is, the others as they last told."""
        return {**self._view.pods, self._pod_id: self._own_record()}

    def holder(self, model_id: ModelId, status: CopyStatus, exclude: Container[PodId], now_ms: int) -> PodId | None:
        """Another pod whose copy has this status, alive and not suspect; one that drains only if there is no other."""
        copies = self._view.copies(model_id)
        if not copies:
            return None
        pods, suspects = self._view.pods, self._suspects
        holders: list[PodId] = []
        for pod_id, copy in copies.items():  # in line: a comprehension is a call
            if (
                copy.status is status
                and pod_id != self._pod_id
                and pod_id in pods
                and pod_id not in exclude
                and not (suspects and self.is_suspect(pod_id, now_ms))
            ):
                holders.append(pod_id)
        if len(holders) > 1:
            holders = [pod_id for pod_id in holders if not pods[pod_id].draining] or holders
        return choose_holder(holders, self._in_flight, self._rng) if holders else None

    def wanted(self, model: ModelRecord) -> Wanted:
        """What choosing a pod for one more copy of the model has to know of it."""
        model_id, pods = model.model_id, self._view.pods
        copies = self._view.copies(model_id)
        held = {pod_id: copy.tier for pod_id, copy in copies.items() if copy.status is CopyStatus.HELD}
        near = (pods[pod_id] for pod_id, copy in copies.items() if copy.status in IN_MEMORY and pod_id in pods)
        return Wanted(
            model_id,
            self._view.size_bytes(model_id),
            self._view.measured(model_id) or 0,
            model.requires,
            held,
            places_of(near),
        )

    def target(self, wanted: Wanted, exclude: Iterable[PodId], now_ms: int) -> PodId | None:
        """The pod to load on; what is sent there counts until it speaks again (kube-scheduler's `assume`)."""
        pod_id = choose_target(
            wanted,
            self.pods().values(),
            assumed=self._assumed,
            exclude={*exclude, *(pod_id for pod_id in self._suspects if self.is_suspect(pod_id, now_ms))},
            now_ms=now_ms,
        )
        if pod_id is not None and pod_id != self._pod_id:
            revision = self._view.pods[pod_id].revision
            self._assumed[pod_id] = (revision, self._assumed_bytes(pod_id) + wanted.size_bytes)
        return pod_id

    def verdicts(self, wanted: Wanted, exclude: Mapping[PodId, str], now_ms: int) -> list[Verdict]:
        """What speaks for and against each pod, the one that `target` takes first."""
        pods = self.pods()
        suspects = {p: "could not be reached" for p in pods if self.is_suspect(p, now_ms)}
        return verdicts(
            wanted,
            list(pods.values()),
            assumed=self._assumed,
            exclude={**suspects, **exclude},
            now_ms=now_ms,
        )

    def _assumed_bytes(self, pod_id: PodId) -> int:
        revision, size_bytes = self._assumed.get(pod_id, (-1, 0))
        pod = self._view.pods.get(pod_id)
        return size_bytes if pod is not None and pod.revision == revision else 0
