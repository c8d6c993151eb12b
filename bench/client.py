"""The demo's traffic: an unmodified V2 client (tritonclient.grpc) that checks every answer.

`python -m bench.client PLAN` is a job: it tells what happened every REPORT_S, and at the end what was wrong. It knows
the pods' addresses and the answers the tenants left behind, nothing of the mesh.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bench.jobs import tell
from bench.tenants import Tenant

REPORT_S: Final = 0.25
TIMEOUT_S: Final = 30.0
TOLERANCE: Final = 1e-4
"""Largest difference of a probability: FP32 against the FP64 that scikit-learn computes in."""
BACKOFF_S: Final = 0.05
"""After an error; there are no second tries."""
MAX_BATCH: Final = 4
KEPT: Final = 20
"""Disagreements told in words; all are counted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the client is asked to do."""

    addresses: list[str]
    tenants: list[Tenant]
    seconds: float
    workers: int
    skew: float
    """Exponent of the Zipf distribution of the models' popularity."""
    seed: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        said = json.loads(path.read_text())
        return cls(**{**said, "tenants": [Tenant(**tenant) for tenant in said["tenants"]]})


@dataclass(slots=True)
class Report:
    """What happened since the last report."""

    warm_ms: list[float] = field(default_factory=list)
    """Latency of each request to a model that had been asked for before; it may have been evicted meanwhile."""
    first_ms: list[float] = field(default_factory=list)
    """Latency of each model's first request, for which it cannot have been loaded."""
    wrong: int = 0
    errors: int = 0


class Answers:
    """A tenant's held-out rows and its framework's own predictions."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        with np.load(tenant.answers) as kept:
            self.rows: npt.NDArray[Any] = kept["rows"]
            self.labels: npt.NDArray[Any] = kept["labels"]
            self.probabilities: npt.NDArray[Any] = kept["probabilities"]

    def disagreement(self, result: triton.InferResult, rows: slice) -> str | None:
        """In words, how a server's answer differs from the model's own; None: it does not."""
        name = result.get_response().model_name
        if name != self.tenant.model_id:
            return f"answered by model {name!r}"
        labels = result.as_numpy(self.tenant.label_output)
        probabilities = result.as_numpy(self.tenant.probability_output)
        if labels is None or probabilities is None:
            return "an output is missing"
        if labels.dtype == object:  # BYTES
            labels = np.array([label.decode() for label in labels.ravel()]).reshape(labels.shape)
        own_labels, own = self.labels[rows], self.probabilities[rows]
        if labels.shape != own_labels.shape or not np.array_equal(labels, own_labels):
            return f"labels {labels.tolist()}, its own {own_labels.tolist()}"
        if probabilities.shape != own.shape:
            return f"probabilities of shape {list(probabilities.shape)}, its own {list(own.shape)}"
        off = np.abs(probabilities - own).max()
        return None if off <= TOLERANCE else f"a probability is off by {off:.2g}"  # also when it is NaN


class Traffic:
    """Workers in a closed loop, each with a connection to every pod."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._answers = [Answers(tenant) for tenant in plan.tenants]
        # Which tenants are popular has nothing to do with their numbers, hence with their kinds.
        ranks = np.random.default_rng(plan.seed).permutation(len(self._answers)) + 1
        weights = ranks.astype(float) ** -plan.skew
        self._popularity = weights / weights.sum()
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._report = Report()
        self._words: list[str] = []
        self._broken: list[BaseException] = []

    def run(self) -> None:
        """Send traffic for the plan's time, and tell."""
        end_s = time.monotonic() + self._plan.seconds
        workers = [threading.Thread(target=self._work, args=(n, end_s)) for n in range(self._plan.workers)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(REPORT_S)
            self._tell()
        for worker in workers:
            worker.join()
        self._tell()
        tell({"words": self._words})
        if self._broken:
            raise self._broken[0]

    def _tell(self) -> None:
        with self._lock:
            report, self._report = self._report, Report()
        tell(asdict(report))

    def _work(self, worker: int, end_s: float) -> None:
        rng = np.random.default_rng([self._plan.seed, worker])
        clients = [triton.InferenceServerClient(address) for address in self._plan.addresses]
        try:
            while time.monotonic() < end_s and not self._broken:
                answers = self._answers[rng.choice(len(self._answers), p=self._popularity)]
                self._ask(clients[rng.integers(len(clients))], answers, rng)
        except BaseException as error:  # a bug of ours: ends the run, in the main thread
            self._broken.append(error)
        finally:
            for client in clients:
                client.close()

    def _ask(self, client: triton.InferenceServerClient, answers: Answers, rng: np.random.Generator) -> None:
        tenant = answers.tenant
        start = int(rng.integers(len(answers.rows)))
        rows = slice(start, start + int(rng.integers(1, MAX_BATCH + 1)))
        given = triton.InferInput(tenant.input, answers.rows[rows].shape, tenant.datatype)
        given.set_data_from_numpy(answers.rows[rows])
        # scikit-learn answers probabilities only to those who ask.
        asked = [triton.InferRequestedOutput(name) for name in (tenant.label_output, tenant.probability_output)]
        with self._lock:
            is_first = tenant.model_id not in self._touched
            self._touched.add(tenant.model_id)
        failure = disagreement = None
        started_s = time.perf_counter()
        try:
            result = client.infer(tenant.model_id, [given], outputs=asked, client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            elapsed_s, failure = time.perf_counter() - started_s, str(error)
            time.sleep(BACKOFF_S)
        else:
            elapsed_s = time.perf_counter() - started_s
            disagreement = answers.disagreement(result, rows)
        with self._lock:
            report = self._report
            (report.first_ms if is_first else report.warm_ms).append(round(elapsed_s * 1e3, 3))
            report.errors += failure is not None
            report.wrong += disagreement is not None
            if len(self._words) < KEPT and (failure or disagreement):
                self._words.append(f"{tenant.model_id} ({tenant.kind}), row {start}: {failure or disagreement}")


def main() -> int:
    Traffic(Plan.read(Path(sys.argv[1]))).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
