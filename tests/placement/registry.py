"""A registry whose pods follow it each at its own pace: what `mesh.publisher` writes and `mesh.mirror` reads."""

from __future__ import annotations

from placement.messages import CopyUnwanted
from placement.records import CopyRecord, ModelId, PodId, Record, copy_key, key_of
from tests.placement.pods import Pod


class Registry:
    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._log: list[tuple[str, Record | None]] = []
        self._seen: dict[PodId, int] = {}
        self._copies: dict[PodId, dict[ModelId, CopyRecord]] = {}

    @property
    def next_revision(self) -> int:
        return len(self._log) + 1

    def write(self, key: str, record: Record | None) -> None:
        """Put, or delete."""
        if self.records.get(key) is not record:
            self._log.append((key, record))
            if record is None:
                del self.records[key]
            else:
                self.records[key] = record

    def write_pod(self, pod: Pod) -> None:
        record = pod.engine.pod_record()
        if self.records.get(key_of(record)) != record:
            self.write(key_of(record), record)

    def write_copies(self, pod: Pod) -> None:
        """What the pod's Publish and Unpublish have asked for."""
        pod_id = pod.engine.pod_id
        written = self._copies.get(pod_id, {})
        for model_id in sorted(written.keys() | pod.published.keys()):
            record = pod.published.get(model_id)
            if written.get(model_id) is not record:
                self.write(copy_key(pod_id, model_id), record)
        self._copies[pod_id] = dict(pod.published)

    def deliver(self, pod: Pod, count: int | None = None) -> None:
        """The pod's watch brings the next changes, or all."""
        start = self._seen.get(pod.engine.pod_id, 0)
        end = len(self._log) if count is None else min(len(self._log), start + count)
        self._seen[pod.engine.pod_id] = end
        for number in range(start, end):
            key, record = self._log[number]
            self._apply(pod, key, record, number + 1)

    def snapshot(self, pod: Pod) -> None:
        """The watch was compacted: everything is read anew."""
        for model_id in pod.view.replace(self.records.values()):
            pod.step(CopyUnwanted(model_id))
        self._seen[pod.engine.pod_id] = len(self._log)

    def fetch(self, pod: Pod, key: str) -> bool:
        """The pod reads one record ahead of its watch."""
        record = self.records.get(key)
        if record is not None:
            self._apply(pod, key, record, len(self._log))
        return record is not None

    def _apply(self, pod: Pod, key: str, record: Record | None, revision: int) -> None:
        changed = pod.view.remove(key, revision) if record is None else pod.view.apply(record)
        if changed is not None:
            pod.step(CopyUnwanted(changed))
