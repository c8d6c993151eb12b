"""One of several operators works: whoever holds a Lease (coordination.k8s.io/v1), as controllers in Go do it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from mesh_operator.kube import KubeClient, KubeError

log = logging.getLogger(__name__)

LEASE_S: Final = 15
"""A holder that has not renewed it for so long has lost it ..."""
RENEW_S: Final = 10.0
"""... and has stopped before: after so long without success."""
RETRY_S: Final = 2.0


class Leadership:
    """Tries to hold a Lease, and says when it does. Others' clocks do not count, but for how long a lease has been seen
    unchanged."""

    def __init__(self, kube: KubeClient, namespace: str, name: str, identity: str, *, lease_s: float = LEASE_S) -> None:
        self._kube = kube
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._path = f"{self._collection}/{name}"
        self._name = name
        self._identity = identity
        self._lease_s = lease_s
        self._scale = lease_s / LEASE_S
        self._seen: tuple[str, float] = ("", 0.0)
        """Version of the lease, and since when."""

    async def hold(self, gained: Callable[[], None], lost: Callable[[], None]) -> None:
        """Hold it whenever that is possible, until cancelled; then give it up."""
        loop, held_at = asyncio.get_running_loop(), -1.0
        try:
            while True:
                began = loop.time()
                try:
                    holds = await asyncio.wait_for(self._try(began), RENEW_S * self._scale)
                except (KubeError, TimeoutError) as error:
                    log.warning("lease %s: %s", self._name, error or "the API server does not answer")
                    holds = held_at >= 0 and loop.time() - held_at < RENEW_S * self._scale
                else:
                    if holds and held_at < 0:
                        log.info("this operator (%s) leads", self._identity)
                        gained()
                    held_at = began if holds else held_at
                if not holds and held_at >= 0:
                    log.warning("this operator (%s) leads no more", self._identity)
                    held_at = -1.0
                    lost()
                await asyncio.sleep(RETRY_S * self._scale)
        finally:
            if held_at >= 0:
                lost()
                await self._release()

    async def _try(self, now: float) -> bool:
        """Whether the lease is ours for the next while."""
        lease = await self._kube.get(self._path)
        if lease is None:
            return await self._write(None, {"leaseTransitions": 0})
        spec = lease.get("spec") or {}
        holder, version = spec.get("holderIdentity") or "", lease["metadata"]["resourceVersion"]
        if holder in ("", self._identity):
            return await self._write(lease, spec)
        if version != self._seen[0]:
            self._seen = (version, now)
        if now - self._seen[1] < float(spec.get("leaseDurationSeconds") or self._lease_s):
            return False
        return await self._write(lease, spec)

    async def _write(self, lease: dict[str, Any] | None, spec: dict[str, Any]) -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        told = {**spec, "renewTime": now, "leaseDurationSeconds": max(1, round(self._lease_s))}
        if spec.get("holderIdentity") != self._identity:
            transitions = int(spec.get("leaseTransitions") or 0) + (1 if spec.get("holderIdentity") else 0)
            told |= {"holderIdentity": self._identity, "acquireTime": now, "leaseTransitions": transitions}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}, "spec": told}
        try:
            if lease is None:
                await self._kube.create(self._collection, body)
            else:
                await self._kube.replace(self._path, {**body, "metadata": lease["metadata"]})
        except KubeError as error:
            if error.status == 409:  # another one was faster
                return False
            raise
        return True

    async def _release(self) -> None:
        """Let another one lead at once."""
        try:
            lease = await self._kube.get(self._path)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                await self._kube.replace(self._path, {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except KubeError as error:
            log.info("lease %s: %s", self._name, error)
