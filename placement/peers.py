"""The other pods as this one deals with them: whom it sends what, who does not answer, and who is chosen next."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from random import Random

from placement.cache import Copy
from placement.lifecycle import IN_FLIGHT, CopyState
from placement.limits import Limits
from placement.messages import LoadOn
from placement.records import CopyStatus, ModelId, ModelRecord, PodId, PodRecord, TenantId
from placement.selection import Verdict, Wanted, choose_holder, choose_target, places_of, verdicts
from placement.view import IN_MEMORY, ClusterView


class Peers:
    """Of one pod."""

    def __init__(
        self,
        pod_id: PodId,
        limits: Limits,
        view: ClusterView,
        rng: Random,
        own_record: Callable[[], PodRecord],
        own: Mapping[ModelId, Copy],
    ) -> None:
        """`own` are the copies here."""
        self._pod_id = pod_id
        self._limits = limits
        self._view = view
        self._rng = rng
        self._own_record = own_record
        self._own = own
        self._in_flight: dict[PodId, int] = {}
        self._suspects: dict[PodId, tuple[int, int]] = {}
        """Pods that could not be reached: until when they are avoided, and in which life (`PodRecord.created`)."""
        self._assumed: dict[PodId, tuple[int, int]] = {}
        """Bytes sent to a pod to load since its record of that revision."""
        self._asked: dict[ModelId, dict[PodId, int]] = {}
        """Pods that were asked for a copy, and until when that counts, shown or not."""
        self.draining = False
        """This pod."""

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
        for model_id, asked in list(self._asked.items()):
            left = {pod_id: until_ms for pod_id, until_ms in asked.items() if until_ms > now_ms}
            if left:
                self._asked[model_id] = left
            else:
                del self._asked[model_id]

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

    def holders(self, model_id: ModelId) -> list[PodId]:
        """Pods whose copy of a model serves and will go on: loaded, alive, not draining."""
        pods = self._view.pods
        holders = [
            pod_id
            for pod_id, copy in self._view.copies(model_id).items()
            if copy.status is CopyStatus.LOADED
            and pod_id != self._pod_id
            and pod_id in pods
            and not pods[pod_id].draining
            and pod_id not in self._suspects
        ]
        own = self._own.get(model_id)
        if own is not None and own.state is CopyState.LOADED and not self.draining:
            holders.append(self._pod_id)
        return holders

    def to_come(self, model_id: ModelId, now_ms: int) -> set[PodId]:
        """Pods that load the model, or were asked to a moment ago."""
        pods, copies = self._view.pods, self._view.copies(model_id)
        failed = {pod_id for pod_id, copy in copies.items() if copy.status is CopyStatus.FAILED}
        asked = {pod_id for pod_id, until_ms in self._asked.get(model_id, {}).items() if until_ms > now_ms}
        loading = {pod_id for pod_id, copy in copies.items() if copy.status is CopyStatus.LOADING}
        own = self._own.get(model_id)
        if own is not None and own.state not in IN_FLIGHT:
            loading.discard(self._pod_id)
        elif own is not None:
            loading.add(self._pod_id)
        return {pod_id for pod_id in (asked | loading) - failed if pod_id in pods and not pods[pod_id].draining}

    def is_asked(self, model_id: ModelId) -> bool:
        """Whether some pod was asked for it a moment ago, or was until the last tick."""
        return model_id in self._asked

    def ask(
        self, model: ModelRecord, now_ms: int, *, cold_ms: int, reserve: float = 0.0, used_ms: int = 0
    ) -> LoadOn | None:
        """Another copy of the model, on the best of those pods that have more room than a share `reserve` of their
        capacity would be left of, or whose coldest copy was not used for `cold_ms`. None: there is no such pod."""
        if model.stopped:
            return None
        model_id, copies = model.model_id, self._view.copies(model.model_id)
        asked = self._asked.setdefault(model_id, {})
        have = {pod_id for pod_id, copy in copies.items() if copy.status is not CopyStatus.HELD} | asked.keys()
        if model_id in self._own:
            have.add(self._pod_id)
        failed = [pod_id for pod_id, copy in copies.items() if copy.status is CopyStatus.FAILED]
        wanted = self.wanted(model, also=asked)
        room_bytes = max(1, wanted.size_bytes)
        pod_id = None
        if len(failed) < self._limits.load_tries:
            asked_bytes = self._asked_bytes()
            pods = [
                pod
                for pod in self.pods().values()
                if pod.capacity_bytes - pod.used_bytes - asked_bytes.get(pod.pod_id, 0) - room_bytes
                >= reserve * pod.capacity_bytes
                or (
                    pod.oldest_used_ms
                    and now_ms - pod.oldest_used_ms >= cold_ms
                    and pod.capacity_bytes - pod.kept_bytes >= room_bytes
                )
            ]
            pod_id = self._target(wanted, pods, have, now_ms)
        if pod_id is None:
            if not asked:
                del self._asked[model_id]
            return None
        asked[pod_id] = now_ms + self._limits.ask_patience_ms
        return LoadOn(model_id, pod_id, used_ms)

    def wanted(self, model: ModelRecord, also: Iterable[PodId] = ()) -> Wanted:
        """What choosing a pod for one more copy of the model has to know of it; `also` are pods that will have one."""
        model_id, pods = model.model_id, self._view.pods
        copies = self._view.copies(model_id)
        held = {pod_id: copy.tier for pod_id, copy in copies.items() if copy.status is CopyStatus.HELD}
        having = {*also, *(pod_id for pod_id, copy in copies.items() if copy.status in IN_MEMORY)}
        near = (pods[pod_id] for pod_id in having if pod_id in pods)
        size_bytes = self._view.size_bytes(model_id)
        return Wanted(
            model_id,
            size_bytes,
            self._view.measured(model_id) or 0,
            model.requires,
            held,
            places_of(near),
            self._givers(model.tenant, size_bytes),
        )

    def _givers(self, tenant: TenantId, size_bytes: int) -> frozenset[PodId] | None:
        granted = self._view.tenants.get(tenant)
        if granted is None or not granted.max_bytes:
            return None
        pods = self._view.tenant_pods(tenant)
        above_bytes = sum(pods.values()) + size_bytes - granted.max_bytes
        return frozenset(p for p, held_bytes in pods.items() if held_bytes >= above_bytes) if above_bytes > 0 else None

    def target(self, wanted: Wanted, exclude: Iterable[PodId], now_ms: int) -> PodId | None:
        """The pod to load on; what is sent there counts until it speaks again (kube-scheduler's `assume`)."""
        return self._target(wanted, self.pods().values(), exclude, now_ms)

    def _target(self, wanted: Wanted, pods: Iterable[PodRecord], exclude: Iterable[PodId], now_ms: int) -> PodId | None:
        pod_id = choose_target(
            wanted,
            pods,
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

    def _asked_bytes(self) -> dict[PodId, int]:
        """What pods were asked for and do not show yet."""
        found: dict[PodId, int] = {}
        for model_id, asked in self._asked.items():
            copies = self._view.copies(model_id)
            for pod_id in asked:
                if pod_id not in copies and (pod_id != self._pod_id or model_id not in self._own):
                    found[pod_id] = found.get(pod_id, 0) + max(1, self._view.size_bytes(model_id))
        return found

    def _assumed_bytes(self, pod_id: PodId) -> int:
        revision, size_bytes = self._assumed.get(pod_id, (-1, 0))
        pod = self._view.pods.get(pod_id)
        return size_bytes if pod is not None and pod.revision == revision else 0
