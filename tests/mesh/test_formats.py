"""Models that their frameworks trained and wrote, behind a pod process and asked by an unmodified tritonclient: answers
are those of the framework itself. Authority: what MLServer's runtimes answer, and the frameworks' `predict`.

A format is one function here, which trains on data that scikit-learn ships, writes `<folder>/model.<ext>` and gives
the rows to send and the answers to expect by output name, and one line in `FORMATS`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from tritonclient.utils import np_to_triton_dtype

from mesh.local_cluster import LocalPod
from protos import inference_pb2 as v2
from protos import management_pb2 as mm
from tests.mesh.client import Client

Array = npt.NDArray[Any]
Answers = dict[str, Array]


def xgboost_classifier(folder: Path) -> tuple[Array, Answers]:
    import xgboost

    rows, labels = load_digits(return_X_y=True)
    rows[::7, 20] = np.nan
    model = xgboost.XGBClassifier(n_estimators=5, max_depth=4).fit(rows, labels)
    model.save_model(folder / "model.ubj")
    rows = rows[:40].astype(np.float32)
    return rows, {"predict": model.predict(rows), "predict_proba": model.predict_proba(rows)}


def xgboost_regressor(folder: Path) -> tuple[Array, Answers]:
    import xgboost

    rows, labels = load_diabetes(return_X_y=True)
    model = xgboost.train({"max_depth": 3}, xgboost.DMatrix(rows, labels), 9)
    model.save_model(folder / "model.json")
    return rows[:40], {"predict": model.predict(xgboost.DMatrix(rows[:40]))}


def lightgbm_classifier(folder: Path) -> tuple[Array, Answers]:
    import lightgbm

    rows, labels = load_breast_cancer(return_X_y=True)
    rows[::7, 3] = np.nan
    model = lightgbm.LGBMClassifier(n_estimators=9, verbose=-1).fit(rows, labels)
    model.booster_.save_model(folder / "model.bst")
    return rows[:40], {"predict": np.asarray(model.booster_.predict(rows[:40]))}


def mlflow_classifier(folder: Path) -> tuple[Array, Answers]:
    import skops.io
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rows, labels = load_breast_cancer(return_X_y=True)
    model = LinearDiscriminantAnalysis().fit(rows, labels)
    skops.io.dump(model, folder / "model.skops")
    flavor = "{pickled_model: model.skops, serialization_format: skops}"  # as mlflow.sklearn.save_model has it
    (folder / "MLmodel").write_text(f"flavors:\n  sklearn: {flavor}\n  python_function: {{}}\n")
    return rows[:40], {"predict": model.predict(rows[:40]), "predict_proba": model.predict_proba(rows[:40])}


def openvino_classifier(folder: Path) -> tuple[Array, Answers]:
    import sys

    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino import opset13
    from sklearn.linear_model import LogisticRegression

    rows, labels = load_breast_cancer(return_X_y=True)
    model = LogisticRegression(max_iter=5, tol=1).fit(rows / 100, labels)
    given = opset13.parameter([-1, 30], np.float32, name="x")
    weights = opset13.constant((model.coef_.T / 100).astype(np.float32))
    scores = opset13.add(
        opset13.matmul(given, weights, False, False), opset13.constant(model.intercept_.astype(np.float32))
    )
    answer = opset13.sigmoid(scores)
    answer.output(0).set_names({"probability"})
    openvino.save_model(openvino.Model([answer], [given], "m"), folder / "model.xml", compress_to_fp16=False)
    return rows[:40].astype(np.float32), {"probability": model.predict_proba(rows[:40] / 100)[:, 1:]}


def safetensors_network(folder: Path) -> tuple[Array, Answers]:
    import torch
    from safetensors.torch import save_file

    rows, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(50):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    save_file(model.state_dict(), folder / "model.safetensors")
    layers = [{"linear": "0"}, "gelu", {"linear": "2"}]
    declared = {"input": {"shape": [-1, 64]}, "output": "logits", "layers": layers}
    (folder / "architecture.json").write_text(json.dumps(declared))
    return rows[:40].astype(np.float32), {"logits": model(x[:40]).detach().numpy()}


def tensorflow_classifier(folder: Path) -> tuple[Array, Answers]:
    import tensorflow

    rows, labels = load_breast_cancer(return_X_y=True)
    rows = (rows / rows.max(0)).astype(np.float32)
    module = tensorflow.Module()
    module.weights = tensorflow.Variable(np.linalg.lstsq(rows, labels * 2.0 - 1, rcond=None)[0][:, None].astype("f4"))
    takes = tensorflow.TensorSpec([None, 30], tensorflow.float32, name="x")
    serve = tensorflow.function(lambda x: {"score": x @ module.weights}, input_signature=[takes])
    tensorflow.saved_model.save(module, str(folder / "model.savedmodel"), signatures={"serving_default": serve})
    return rows[:40], {"score": serve(rows[:40])["score"].numpy()}


def keras_classifier(folder: Path) -> tuple[Array, Answers]:
    import os

    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    rows, labels = load_breast_cancer(return_X_y=True)
    rows = (rows / rows.max(0)).astype(np.float32)
    given = keras.Input((30,), name="x")
    model = keras.Model(given, keras.layers.Dense(1, "sigmoid", name="score")(given))
    model.compile("adam", "binary_crossentropy")
    model.fit(rows, labels, verbose=0)
    model.save(folder / "model.keras")
    return rows[:40], {"score": model.predict(rows[:40], verbose=0)}


FORMATS: Final[dict[str, tuple[str, str, Callable[[Path], tuple[Array, Answers]]]]] = {
    "xgboost_classifier": ("xgboost", "mlserver_xgboost.XGBoostModel", xgboost_classifier),
    "xgboost_regressor": ("xgboost", "", xgboost_regressor),
    "lightgbm_classifier": ("lightgbm", "mlserver_lightgbm.LightGBMModel", lightgbm_classifier),
    "openvino_classifier": ("openvino", "", openvino_classifier),
    "safetensors_network": ("safetensors", "", safetensors_network),
    "tensorflow_classifier": ("tensorflow", "", tensorflow_classifier),
    "keras_classifier": ("keras", "", keras_classifier),
    "mlflow_classifier": ("mlflow", "mlserver_mlflow.MLflowRuntime", mlflow_classifier),
}
"""By model: its format, MLServer's implementation of it if any, and what makes it."""


@pytest.fixture(scope="module")
def frontend() -> str:
    return "h2"


@pytest.fixture(scope="module")
def pod_settings() -> dict[str, str]:
    return {"allow_code": "tensorflow,keras"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Array, Answers]]:
    """By model: its directory, rows and expected answers. Formats whose packages are missing are left out."""
    root = tmp_path_factory.mktemp("formats")
    models = {}
    for name, (_, implementation, make) in FORMATS.items():
        folder = root / name
        folder.mkdir()
        try:
            models[name] = (folder, *make(folder))
        except ImportError:
            folder.rmdir()
            continue
        if implementation:
            (folder / "model-settings.json").write_text(json.dumps({"implementation": implementation}))
    return models


@pytest.fixture(scope="module")
def repository(made: dict[str, tuple[Path, Array, Answers]]) -> Path:
    return next(iter(made.values()))[0].parent


@pytest.fixture(scope="module")
def client(pod: LocalPod) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(pod.address) as connected:
        yield connected


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_the_frameworks_own(
    client: triton.InferenceServerClient, made: dict[str, tuple[Path, Array, Answers]], name: str
) -> None:
    if name not in made:
        pytest.skip(f"{FORMATS[name][0]} is not installed")
    _, rows, expected = made[name]
    told = client.get_model_metadata(name)
    given = triton.InferInput(told.inputs[0].name, rows.shape, np_to_triton_dtype(rows.dtype))
    given.set_data_from_numpy(rows)
    by_default = client.infer(name, [given]).get_response()
    assert [output.name for output in by_default.outputs] == list(expected)[:1]
    answer = client.infer(name, [given], outputs=[triton.InferRequestedOutput(output) for output in expected])
    for output, values in expected.items():
        assert output in [spec.name for spec in told.outputs]
        np.testing.assert_allclose(answer.as_numpy(output), values, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_another_width_are_the_clients_fault(
    client: triton.InferenceServerClient, made: dict[str, tuple[Path, Array, Answers]], name: str
) -> None:
    if name not in made:
        pytest.skip(f"{FORMATS[name][0]} is not installed")
    rows = np.ascontiguousarray(made[name][1][:, 1:])
    given = triton.InferInput(
        client.get_model_metadata(name).inputs[0].name, rows.shape, np_to_triton_dtype(rows.dtype)
    )
    given.set_data_from_numpy(rows)
    with pytest.raises(triton.InferenceServerException, match=f"{rows.shape[1]}") as refusal:
        client.infer(name, [given])
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_models_have_no_threads_of_their_own(pod: LocalPod, made: dict[str, tuple[Path, Array, Answers]]) -> None:
    """Issue 6, "Executors": N models never mean N thread pools. MLflow's are XGBoost's and others' here."""
    names = [name for name in made if FORMATS[name][0] != "mlflow"]

    def threads() -> int:
        return len(list(Path(f"/proc/{pod.pid}/task").iterdir()))

    async with Client(pod.address) as client:

        async def serve(name: str, count: int) -> None:
            folder, rows, _ = made[name]
            for number in range(count):
                model_id = f"{name}-{count}-{number}"
                info = mm.ModelInfo(type=FORMATS[name][0], path=str(folder))
                request = mm.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
                status = await client.call("registerModel", request)
                assert status.status == mm.ModelStatusInfo.LOADED, status
                told = await client.call("ModelMetadata", v2.ModelMetadataRequest(name=model_id))
                asked = v2.ModelInferRequest(model_name=model_id, raw_input_contents=[rows.tobytes()])
                asked.inputs.add(name=told.inputs[0].name, datatype=np_to_triton_dtype(rows.dtype), shape=rows.shape)
                await asyncio.gather(*(client.call("ModelInfer", asked) for _ in range(4)))

        for name in names:
            await serve(name, 1)
        before, more = threads(), 8
        for name in names:
            await serve(name, more)
        assert threads() - before < more, "the pod's own pools start threads as they need them, up to their limits"
