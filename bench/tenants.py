"""Small tenant models on real data, each with its framework's own predictions to compare a server's answers with.

Every tenant has its own bootstrap sample, model family and size, all drawn from the seed and its number, so that runs
repeat. `python -m bench.tenants` is the training job: it writes its share of the tenants and tells one JSON line each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench.jobs import Job, tell

Rows = npt.NDArray[np.float32]

DATASETS: Final = ("digits", "wine", "breast_cancer")
SERVED_AS_SKLEARN: Final = 5
"""One tenant in five is served by scikit-learn itself, the others through ONNX."""
SERVED_AS_TORCH: Final = 4
"""With torch, one tenant in four is a PyTorch model."""
MAX_ROWS: Final = 32
"""Held-out rows kept per tenant."""
UNDECIDED: Final = 1e-3
"""Rows on which the model's own two best probabilities are closer than this are left out: rounding may turn the label,
and then it is nobody's mistake."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A trained model, how to ask it, and where its own answers lie."""

    model_id: str
    format: str
    path: str
    kind: str
    """For people: `mlp on digits`."""
    input: str
    datatype: str
    label_output: str
    probability_output: str
    estimated_bytes: int
    """What the pods will expect it to hold in memory."""
    answers: str
    """.npz with `rows`, `labels` and `probabilities`."""


async def train(
    directory: Path, models: int, *, seed: int, torch: bool, on_tenant: Callable[[Tenant], object]
) -> list[Tenant]:
    """Train in as many processes as there are cores; `on_tenant` sees each as it is done.

    Raises:
        JobError
    """
    share_of = max(1, min(os.cpu_count() or 1, models))
    arguments = [str(directory), f"--models={models}", f"--seed={seed}", *(["--torch"] if torch else [])]
    tenants: list[Tenant] = []

    async def collect(job: Job) -> None:
        async for line in job.lines():
            tenants.append(Tenant(**line))
            on_tenant(tenants[-1])

    try:
        async with AsyncExitStack() as jobs, asyncio.TaskGroup() as tasks:
            for share in range(share_of):
                job = Job("bench.tenants", *arguments, f"--share={share}", f"--of={share_of}")
                tasks.create_task(collect(await jobs.enter_async_context(job)))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others only tell that they were stopped
    return sorted(tenants, key=lambda tenant: tenant.model_id)


# The training job


@cache
def _dataset(name: str) -> tuple[Rows, npt.NDArray[Any]]:
    """Rows as FP32, which is what clients send, and classes; breast cancer's are words, the others' numbers."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    classes = data.target_names[data.target] if name == "breast_cancer" else data.target
    return data.data.astype(np.float32), classes


def make_tenant(directory: Path, number: int, *, seed: int, torch: bool) -> Tenant:
    """Train, write and describe one tenant."""
    rng = np.random.default_rng([seed, number])
    dataset = DATASETS[number % len(DATASETS)]
    rows, classes = _dataset(dataset)
    order = rng.permutation(len(rows))
    held_out, rest = order[: len(rows) // 4], order[len(rows) // 4 :]
    sample = rng.choice(rest, len(rest))
    while len(set(classes[sample])) < len(set(classes)):
        sample = rng.choice(rest, len(rest))
    stem = directory / f"tenant-{number:03d}"
    make = _make_torch if _is_torch(number, torch) else _make_sklearn
    made = make(stem, number, rng, rows[sample], classes[sample], rows[held_out])
    best = np.sort(made.probabilities, axis=1)
    decided = np.flatnonzero(best[:, -1] - best[:, -2] > UNDECIDED)[:MAX_ROWS]
    answers = stem.with_suffix(".npz")
    np.savez(
        answers,
        rows=rows[held_out][decided].astype(np.float64 if made.datatype == "FP64" else np.float32),
        labels=np.asarray(made.labels)[decided],
        probabilities=made.probabilities[decided],
    )
    return Tenant(
        model_id=stem.name,
        format=made.format,
        path=str(made.path),
        kind=f"{made.family} on {dataset}",
        input=made.input,
        datatype=made.datatype,
        label_output=made.outputs[0],
        probability_output=made.outputs[1],
        estimated_bytes=_estimate(made.format, made.path),
        answers=str(answers),
    )


@dataclass(frozen=True, slots=True)
class _Made:
    format: str
    path: Path
    family: str
    input: str
    datatype: str
    outputs: tuple[str, str]
    labels: npt.NDArray[Any]
    probabilities: npt.NDArray[Any]


def _is_torch(number: int, torch: bool) -> bool:
    return torch and number % SERVED_AS_TORCH == SERVED_AS_TORCH - 1


def _make_sklearn(
    stem: Path, number: int, rng: np.random.Generator, rows: Rows, classes: npt.NDArray[Any], held_out: Rows
) -> _Made:
    """A scikit-learn classifier, written as ONNX or as itself."""
    from sklearn.exceptions import ConvergenceWarning

    family, estimator = _estimator(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few steps are enough for a tenant to be its own
        estimator.fit(rows, classes)
    if number % SERVED_AS_SKLEARN == SERVED_AS_SKLEARN - 1:
        import skops.io

        path, datatype, outputs = stem.with_suffix(".skops"), "FP64", ("predict", "predict_proba")
        skops.io.dump(estimator, path)
        served_as, name = "sklearn", "input-0"
    else:
        from skl2onnx import to_onnx

        path, datatype, outputs = stem.with_suffix(".onnx"), "FP32", ("label", "probabilities")
        path.write_bytes(to_onnx(estimator, rows[:1], options={"zipmap": False}).SerializeToString())
        served_as, name = "onnx", "X"
    given = held_out.astype(np.float64) if datatype == "FP64" else held_out
    labels, probabilities = estimator.predict(given), estimator.predict_proba(given)
    return _Made(served_as, path, family, name, datatype, outputs, labels, probabilities)


def _estimator(rng: np.random.Generator) -> tuple[str, Any]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    state = int(rng.integers(1 << 31))
    match rng.choice(["mlp", "mlp", "logistic", "tree", "forest"]):
        case "mlp":
            hidden = tuple(int(width) for width in rng.choice([16, 32, 64, 128, 256], rng.integers(1, 3)))
            model = MLPClassifier(hidden, max_iter=12, batch_size=64, random_state=state)
            return "mlp", make_pipeline(StandardScaler(), model)
        case "logistic":
            model = LogisticRegression(C=float(rng.uniform(0.1, 2)), max_iter=30)
            return "logistic", make_pipeline(StandardScaler(), model)
        case "tree":
            return "tree", DecisionTreeClassifier(max_depth=int(rng.integers(3, 9)), random_state=state)
        case _:
            trees, depth = int(rng.integers(4, 17)), int(rng.integers(3, 7))
            return "forest", RandomForestClassifier(trees, max_depth=depth, random_state=state)


def _make_torch(
    stem: Path, number: int, rng: np.random.Generator, rows: Rows, classes: npt.NDArray[Any], held_out: Rows
) -> _Made:
    from bench.tenants_torch import train_and_export

    names, targets = np.unique(classes, return_inverse=True)
    width, state = int(rng.choice([16, 32, 64, 128, 256])), int(rng.integers(1 << 31))
    path = stem.with_suffix(".pt2")
    labels, probabilities = train_and_export(path, width, state, rows, targets, len(names), held_out)
    return _Made("torch", path, "torch mlp", "rows", "FP32", ("label", "probabilities"), labels, probabilities)


def _estimate(format_name: str, path: Path) -> int:
    from loaders import loader_for
    from loaders.base import Artifact

    return loader_for(format_name).estimate_bytes(Artifact(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    for name in ("models", "seed", "share", "of"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--torch", action="store_true")
    asked = parser.parse_args()
    # By kind first, so that every share gets as many slow ones.
    numbers = sorted(range(asked.models), key=lambda number: (_is_torch(number, asked.torch), number % 5))
    for number in numbers[asked.share :: asked.of]:
        tell(asdict(make_tenant(asked.directory, number, seed=asked.seed, torch=asked.torch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
