"""scikit-learn models through pods that prepare them: first as they are, then as graphs, with the same answers; and
where they were prepared before, without scikit-learn."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas
import skops.io
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mesh.local_cluster import LocalPod, ready
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client
from tests.mesh.pods import Loads, running
from tests.mesh.test_metrics import scrape

DIGITS, LABELS = load_digits(return_X_y=True)
PEOPLE = pandas.DataFrame({"age": [20.0, 30, 40, 50, 60, 70], "city": ["Bern", "Genf"] * 3})
PLANS = ["basic", "basic", "basic", "gold", "gold", "gold"]


def digits_request() -> v2.ModelInferRequest:
    rows = DIGITS[:100].astype("<f8")
    request = v2.ModelInferRequest(model_name="digits", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="predict", datatype="FP64", shape=rows.shape)
    request.outputs.add(name="predict")
    return request


def people_request() -> v2.ModelInferRequest:
    """As MLServer's pandas codec sends a data frame."""
    request = v2.ModelInferRequest(model_name="people")
    age = request.inputs.add(name="age", datatype="FP64", shape=[6, 1])
    age.contents.fp64_contents.extend(PEOPLE["age"])
    city = request.inputs.add(name="city", datatype="BYTES", shape=[6, 1])
    city.contents.bytes_contents.extend(each.encode() for each in PEOPLE["city"])
    for each in (age, city):
        each.parameters["content_type"].string_param = "pd"
    return request


async def answers(client: Client) -> list[Any]:
    digits = await client.call("ModelInfer", digits_request())
    people = await client.call("ModelInfer", people_request())
    metadata = await client.call("ModelMetadata", v2.ModelMetadataRequest(name="people"))
    found = np.frombuffer(digits.raw_output_contents[0], "<i8").tolist()
    return [found, list(people.outputs[0].contents.bytes_contents), metadata.inputs]


def mapped(pod: LocalPod) -> str:
    """The files that a process has mapped: libraries among them."""
    return Path(f"/proc/{pod.pid}/maps").read_text()


class Payload:
    """Makes a directory when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


async def test_files_that_run_code_are_opened_by_nobody_without_permission(tmp_path: Path, loads: Loads) -> None:
    joblib.dump(Payload(tmp_path / "ran"), tmp_path / "model.joblib")
    async with running("a", loads, prepare=True, cache_dir=str(tmp_path / "cache")) as mesh:
        info = mm.ModelInfo(type="sklearn", path=str(tmp_path / "model.joblib"))
        request = mm.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True)
        status = await mesh.clients["a"].call("registerModel", request)
        assert "refused without --allow-code joblib" in status.errors[0]
        assert not [name for name, _ in await scrape(mesh, "a") if name.startswith("densemesh_preparation")]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache").exists()


def test_a_pod_serves_what_was_prepared_without_scikit_learn(tmp_path: Path) -> None:
    forest = RandomForestClassifier(20, random_state=0).fit(DIGITS[:600], LABELS[:600])
    encoder = ColumnTransformer([("numbers", StandardScaler(), ["age"]), ("strings", OneHotEncoder(), ["city"])])
    pipeline = make_pipeline(encoder, LogisticRegression()).fit(PEOPLE, PLANS)
    for name, estimator in (("digits", forest), ("people", pipeline)):
        (tmp_path / "models" / name).mkdir(parents=True)
        skops.io.dump(estimator, tmp_path / "models" / name / "model.skops")
    settings = {"models": str(tmp_path / "models"), "cache_dir": str(tmp_path / "cache"), "prepare": "true"}
    first, second = (LocalPod(f"pod-{n}", "memory://", tmp_path / f"log-{n}", settings) for n in (1, 2))

    async def until_prepared(client: Client, before: list[Any]) -> None:
        while first.log.read_text().count("LOADING -> LOADED (converted)") < 2:
            assert await answers(client) == before
            await asyncio.sleep(0.05)

    async def ask(pod: LocalPod) -> list[Any]:
        await ready([pod])
        async with Client(pod.address) as client:
            found = await answers(client)
            if pod is first:
                await asyncio.wait_for(until_prepared(client, found), 60)
            return await answers(client)

    try:
        for pod in (first, second):
            pod.start()
            found = asyncio.run(ask(pod))
            assert found[0] == forest.predict(DIGITS[:100]).tolist(), pod.last_words()
            assert found[1] == [plan.encode() for plan in pipeline.predict(PEOPLE)]
            assert [(spec.name, spec.datatype, list(spec.shape)) for spec in found[2]] == [
                ("age", "FP64", [-1, 1]),
                ("city", "BYTES", [-1, 1]),
            ]
            assert ("/sklearn/" in mapped(pod)) == (pod is first)
            assert "/onnxruntime/" in mapped(pod)
            pod.terminate()
            assert pod.wait() == 0, pod.last_words()
    finally:
        for pod in (first, second):
            pod.kill()
